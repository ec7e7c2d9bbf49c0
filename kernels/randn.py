"""Normal random numbers in Triton.

A program makes a piece of one sample: each thread whole blocks of Philox, whose four numbers lie
side by side. Float64 numbers take their logarithm from the device's library, and polynomials for
the angle, which is at most an eighth of a turn. No workspace; seeds and offsets are read on the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import common_multiple, multiple, num_threads, rounded
from mmfast.kernels.philox import in_order, normals_in_order, turns, uniform, words

_BLOCK = 1024


@triton.jit
def _box_muller_double(word0, word1):
    """As mmfast.philox.box_muller, in float64."""
    radius = tl.sqrt(-2.0 * tl.log(uniform(word0).to(tl.float64)))
    radius = tl.where((word1 >> 31) != 0, -radius, radius)
    x = turns(word1).to(tl.float64) * tl.full([], 6.283185307179586, tl.float64)
    z = x * x
    # Taylor's series: the next terms are below the last place.
    s = z * 0.0 + 1.0
    c = s
    for i in tl.static_range(8):
        s = 1.0 - s * z / ((17 - 2 * i) * (16 - 2 * i))
        c = 1.0 - c * z / ((18 - 2 * i) * (17 - 2 * i))
    c = 1.0 - c * z / 2
    s = s * x
    turned = (word1 & 0x40000000) != 0
    return radius * tl.where(turned, s, c), radius * tl.where(turned, c, s)


@triton.jit
def _normals_in_double(seed, offset, first, COUNT: tl.constexpr):
    w0, w1, w2, w3 = words(seed, offset, first // 4 + tl.arange(0, COUNT // 4))
    n0, n1 = _box_muller_double(w0, w1)
    n2, n3 = _box_muller_double(w2, w3)
    return in_order(n0, n1, n2, n3)


@triton.jit(do_not_specialize=["count", "seed_step", "offset_step"])
def randn_kernel(
    seed_ptr,
    offset_ptr,
    out_ptr,  # [samples, count]
    count,
    seed_step,
    offset_step,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = multiple(count, FACTOR)
    place = tl.program_id(0).to(tl.int64)
    sample = place // tl.cdiv(count, BLOCK)
    first = place % tl.cdiv(count, BLOCK) * BLOCK
    seed = tl.load(seed_ptr + sample * seed_step)
    offset = tl.load(offset_ptr + sample * offset_step)
    if out_ptr.dtype.element_ty == tl.float64:
        b_out = _normals_in_double(seed, offset, first, BLOCK)
    else:
        b_out = normals_in_order(seed, offset, first, BLOCK)
    elements = first + tl.arange(0, BLOCK)
    p_out = out_ptr + sample * count + elements
    tl.store(p_out, rounded(b_out, out_ptr.dtype.element_ty), mask=elements < count)


def randn(seed: Tensor, offset: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.ops.mmfast.randn`` on checked arguments."""
    result = seed.new_empty(shape, dtype=dtype)
    total = result.numel()
    if total == 0:
        return result
    samples = shape[0] if seed.dim() or offset.dim() else 1
    count = total // samples
    steps = [t.stride(0) if t.dim() else 0 for t in (seed, offset)]
    randn_kernel[(samples * triton.cdiv(count, _BLOCK),)](
        seed, offset, result, count, *steps,
        FACTOR=common_multiple(count), BLOCK=_BLOCK, **num_threads(128),
    )  # fmt: skip
    return result


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(factor: int, dtype: torch.dtype) -> Variant:
        def launch(n: int, _: int) -> None:
            randn(torch.zeros(n, dtype=torch.int64), torch.tensor(0), (n, 17 * factor), dtype)

        name = f"randn: {dtype}, multiples of {factor}".replace("torch.", "")
        return Variant(name, launch, quick=factor == 16 and dtype == torch.float32)

    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return [variant(factor, dtype) for factor in (1, 16) for dtype in dtypes]
