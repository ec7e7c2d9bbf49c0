"""Factors of guided outputs in Triton: sums over samples, whose order does not depend on the batch.

1. ``guidance_sums_kernel``: of each block of a sample, the sums of two numbers' products, or their
   means and the sums of the squared deviations from them. It updates the average.
2. ``guidance_factors_kernel``: the factors of a sample from those of its blocks.

Everything is float64: the kernels wait for memory.

Workspace: 32 bytes per 8192 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import (
    at_most,
    common_multiple,
    first_stride,
    lying_together,
    multiple,
    num_threads,
    rounded,
    sum_rows,
)

# These decide the order of the sums, and with it the last bits.
_BLOCK = 8192
_TILE = 1024
_PARTS = 256


@triton.jit
def _total(b_x):
    """Of [N, 1]."""
    return tl.sum(sum_rows(b_x))


@triton.jit
def _load(p_x, places, E):
    return tl.load(p_x + places, mask=places < E, other=0.0).to(tl.float64)


@triton.jit(
    do_not_specialize=["E", "stride_c", "stride_u", "stride_a"],
)
def guidance_sums_kernel(
    c_ptr,
    u_ptr,
    a_ptr,  # or None; changed
    part_ptr,  # [B, blocks, 4] float64
    E,
    stride_c,
    stride_u,
    stride_a,
    scale: tl.float64,
    momentum: tl.float64,
    PROJECT: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    E = multiple(E, FACTOR)
    b = place // tl.cdiv(E, BLOCK)
    first = place % tl.cdiv(E, BLOCK) * BLOCK
    p_c = c_ptr + b * multiple(stride_c, FACTOR)
    p_u = u_ptr + b * multiple(stride_u, FACTOR)
    p_part = part_ptr + place * 4
    scale = tl.full([], scale, tl.float64)
    momentum = tl.full([], momentum, tl.float64)
    b_0 = tl.zeros([TILE, 1], tl.float64)
    b_1 = tl.zeros([TILE, 1], tl.float64)
    b_2 = tl.zeros([TILE, 1], tl.float64)
    if PROJECT:
        for start in range(0, BLOCK, TILE):
            places = first + start + tl.arange(0, TILE)[:, None]
            b_c = _load(p_c, places, E)
            b_d = b_c - _load(p_u, places, E)
            if a_ptr is not None:
                # What is kept has been rounded, and is what the factors are for.
                p_a = a_ptr + b * multiple(stride_a, FACTOR)
                b_kept = rounded(b_d + momentum * _load(p_a, places, E), a_ptr.dtype.element_ty)
                tl.store(p_a + places, b_kept, mask=places < E)
                b_d = b_kept.to(tl.float64)
            b_0 += b_c * b_c
            b_1 += b_c * b_d
            b_2 += b_d * b_d
        tl.store(p_part, _total(b_0))
        tl.store(p_part + 1, _total(b_1))
        tl.store(p_part + 2, _total(b_2))
    else:
        for start in range(0, BLOCK, TILE):
            places = first + start + tl.arange(0, TILE)[:, None]
            b_c = _load(p_c, places, E)
            b_0 += b_c
            b_1 += scale * b_c + (1.0 - scale) * _load(p_u, places, E)
        count = tl.minimum(E - first, BLOCK).to(tl.float64)
        mean_c = _total(b_0) / count
        mean_g = _total(b_1) / count
        b_1 = tl.zeros([TILE, 1], tl.float64)
        for start in range(0, BLOCK, TILE):
            places = first + start + tl.arange(0, TILE)[:, None]
            b_c = _load(p_c, places, E)
            b_g = scale * b_c + (1.0 - scale) * _load(p_u, places, E) - mean_g
            b_c = tl.where(places < E, b_c - mean_c, 0.0)
            b_g = tl.where(places < E, b_g, 0.0)
            b_1 += b_c * b_c
            b_2 += b_g * b_g
        tl.store(p_part, mean_c)
        tl.store(p_part + 1, mean_g)
        tl.store(p_part + 2, _total(b_1))
        tl.store(p_part + 3, _total(b_2))


@triton.jit
def _squares(p_part, E, blocks, WHICH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Squared deviations from a sample's mean, of its blocks' means and their own deviations."""
    b_sum = tl.zeros([PARTS, 1], tl.float64)
    for start in range(0, blocks, PARTS):
        o_part = start + tl.arange(0, PARTS)[:, None]
        count = tl.minimum(E - o_part * BLOCK, BLOCK).to(tl.float64)
        b_mean = tl.load(p_part + o_part * 4 + WHICH, mask=o_part < blocks, other=0.0)
        b_sum += tl.where(o_part < blocks, b_mean * count, 0.0)
    mean = _total(b_sum) / E.to(tl.float64)
    b_sum = tl.zeros([PARTS, 1], tl.float64)
    for start in range(0, blocks, PARTS):
        o_part = start + tl.arange(0, PARTS)[:, None]
        count = tl.minimum(E - o_part * BLOCK, BLOCK).to(tl.float64)
        b_off = tl.load(p_part + o_part * 4 + WHICH, mask=o_part < blocks, other=0.0) - mean
        b_own = tl.load(p_part + o_part * 4 + WHICH + 2, mask=o_part < blocks, other=0.0)
        b_sum += tl.where(o_part < blocks, b_own + b_off * b_off * count, 0.0)
    return _total(b_sum)


@triton.jit
def _sum(p_part, blocks, WHICH: tl.constexpr, PARTS: tl.constexpr):
    b_sum = tl.zeros([PARTS, 1], tl.float64)
    for start in range(0, blocks, PARTS):
        o_part = start + tl.arange(0, PARTS)[:, None]
        b_sum += tl.load(p_part + o_part * 4 + WHICH, mask=o_part < blocks, other=0.0)
    return _total(b_sum)


@triton.jit(do_not_specialize=["E", "blocks", "stride_fb", "stride_fc"])
def guidance_factors_kernel(
    part_ptr,  # [B, blocks, 4] float64
    factor_ptr,  # [B, 2] float64
    E,
    blocks,
    stride_fb,
    stride_fc,
    scale: tl.float64,
    rescale: tl.float64,
    eta: tl.float64,
    norm_threshold: tl.float64,
    PROJECT: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    E = E.to(tl.int64)
    p_part = part_ptr + b * blocks * 4
    scale = tl.full([], scale, tl.float64)
    rescale = tl.full([], rescale, tl.float64)
    if PROJECT:
        aa = _sum(p_part, blocks, 0, PARTS)
        ab = _sum(p_part, blocks, 1, PARTS)
        norm = tl.sqrt(_sum(p_part, blocks, 2, PARTS))
        norm_threshold = tl.full([], norm_threshold, tl.float64)
        k = (scale - 1.0) * tl.where(norm > norm_threshold, norm_threshold / norm, 1.0)
        rho = tl.where(aa == 0, 0.0, ab / aa)
        along = k * (1.0 - tl.full([], eta, tl.float64)) * rho
        if AVERAGE:
            first = 1.0 - along
            second = k
        else:
            first = 1.0 + k - along
            second = -k
    else:
        squares_c = _squares(p_part, E, blocks, 0, BLOCK, PARTS)
        squares_g = _squares(p_part, E, blocks, 1, BLOCK, PARTS)
        # The quotient of the deviations; 0 / 0 for a single number, as they are.
        freedom = (E - 1).to(tl.float64)
        f = rescale * (tl.sqrt(squares_c / freedom) / tl.sqrt(squares_g / freedom)) + 1.0 - rescale
        first = f * scale
        second = f * (1.0 - scale)
    tl.store(factor_ptr + b * stride_fb, first)
    tl.store(factor_ptr + b * stride_fb + stride_fc, second)


def guidance_factors(
    conditional: Tensor,
    unconditional: Tensor,
    guidance_scale: float,
    rescale: float,
    eta: float,
    norm_threshold: float,
    momentum: float,
    project: bool,
    average: Tensor | None,
    factors: Tensor,
) -> None:
    """``torch.ops.mmfast.guidance_factors`` on checked arguments."""
    batch, numbers = conditional.shape[0], conditional.shape[1:].numel()
    if batch == 0:
        return
    if not project and rescale == 0:
        factors[:, 0] = guidance_scale
        factors[:, 1] = 1 - guidance_scale
        return
    c, u = lying_together(conditional, 1), lying_together(unconditional, 1)
    kept = None if average is None else lying_together(average, 1)
    blocks = triton.cdiv(numbers, _BLOCK)
    parts = c.new_empty((batch, blocks, 4), dtype=torch.float64)
    strides = [first_stride(t) for t in (c, u, kept)]
    if numbers:
        guidance_sums_kernel[(batch * blocks,)](
            c, u, kept, parts, numbers, *strides, guidance_scale, momentum, PROJECT=project,
            FACTOR=common_multiple(numbers, *strides), BLOCK=_BLOCK, TILE=_TILE,
            enable_fp_fusion=False, **num_threads(128), **at_most(255),
        )  # fmt: skip
    guidance_factors_kernel[(batch,)](
        parts, factors, numbers, blocks, *factors.stride(), guidance_scale, rescale, eta,
        norm_threshold, PROJECT=project, AVERAGE=average is not None, BLOCK=_BLOCK, PARTS=_PARTS,
        enable_fp_fusion=False, **num_threads(128), **at_most(255),
    )  # fmt: skip
    if average is not None and kept is not average:
        average.copy_(kept)


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(kind: str, dtype: torch.dtype, quick: bool) -> Variant:
        def launch(n: int, _: int) -> None:
            x = torch.ones(n, 64, dtype=dtype)
            average = x if kind == "momentum" else None
            factors = torch.ones(n, 2, dtype=torch.float64)
            guidance_factors(x, x, 7.5, 0.7, 0.0, 15.0, -0.5, kind != "rescale", average, factors)

        return Variant(
            f"guidance_factors: {kind}, {dtype}".replace("torch.", ""),
            launch,
            wide=(("guidance_sums_kernel", "tl.load(p_x + places"),),
            quick=quick,
        )

    return [
        variant(kind, t, (kind, t) in {("rescale", torch.float32), ("momentum", torch.bfloat16)})
        for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        for kind in ("rescale", "project", "momentum")
    ]
