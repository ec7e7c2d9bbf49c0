"""What the kernels and their launch functions share."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import _allocation


@functools.cache
def interpreting() -> bool:
    """Whether Triton interprets kernels, on CPU tensors. Fixed when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_INTERPRETING = tl.constexpr(interpreting())


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(device: torch.device, each: int = 2) -> int:
    """Programs of a persistent grid: ``each`` per multiprocessor."""
    if device.type != "cuda":
        return 2
    index = torch.cuda.current_device() if device.index is None else device.index
    return each * _multiprocessors(index)


@functools.cache
def device_limits(index: Any) -> tuple[str, Any, int]:
    """Triton's backend, the architecture, and the bytes of shared memory for one block."""
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    return target.backend, target.arch, int(properties["max_shared_mem"])


@contextlib.contextmanager
def scratch(device: torch.device) -> Iterator[None]:
    """Launches inside the block have memory for descriptors that kernels make; Triton has none of
    its own."""
    allocator = _allocation._allocator

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    before = allocator.set(allocate)
    try:
        yield
    finally:
        allocator.reset(before)


def at_most(registers: int) -> dict[str, int]:
    """Launch option. Left to itself ptxas may spill to reach a rounder number."""
    if interpreting():
        return {}
    backend, _, _ = device_limits(triton.runtime.driver.active.get_current_device())
    return {"maxnreg": registers} if backend == "cuda" else {}


def device_kind() -> str:
    """What devices have in common that share a choice, such as ``"sm_90"`` or ``"gfx942"``."""
    backend, arch, _ = device_limits(triton.runtime.driver.active.get_current_device())
    return f"sm_{arch}" if backend == "cuda" else str(arch)


def pipelined() -> bool:
    """Whether a loop's loads can be on their way to shared memory before it is their turn."""
    return not interpreting() and device_kind().startswith("sm_")


def num_threads(number: int) -> dict[str, int]:
    """Launch option: so many threads per program, whatever the device calls a warp."""
    warp = 32 if interpreting() else _warp_size(triton.runtime.driver.active.get_current_device())
    return {"num_warps": number // warp}


@functools.cache
def _warp_size(index: Any) -> int:
    """Of device ``index``, the current one; asking takes longer than the rest of a launch."""
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def strides(t: Tensor) -> tuple[int, ...]:
    """Strides of (H, ...). That of a single head would be but another number to specialise for."""
    return (first_stride(t), *t.stride()[1:])


def lying_together(t: Tensor, first: int) -> Tensor:
    """t, or a copy of it where the numbers of dimensions [first, dim) do not follow each other."""
    if t.is_contiguous():
        return t
    expected = 1
    for size, stride in zip(reversed(t.shape[first:]), reversed(t.stride()[first:]), strict=True):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


def first_stride(t: Tensor | None) -> int:
    """Stride of the first dimension. That of a single one would be but another number."""
    return t.stride(0) if t is not None and t.size(0) > 1 else 0


def tile_sizes(num_dims: int, tile: int, widest: int, most_rows: int = 256) -> dict[str, int]:
    """Compile-time sizes of about ``tile`` elements for rows of D; functions of D alone."""
    block_d = min(triton.next_power_of_2(max(1, num_dims)), widest)
    return {"BLOCK_N": min(tile // block_d, most_rows), "BLOCK_D": block_d}


def row_sizes(num_dims: int, tile: int, widest: int = 256) -> dict[str, int]:
    """Of a kernel that walks whole rows: BLOCK_D once or more often, up to WIDTH.

    Where it is once, the compiler sees that, and keeps a tile that is read twice.
    """
    sizes = tile_sizes(num_dims, tile, widest)
    return sizes | {"WIDTH": ceil_div(max(1, num_dims), sizes["BLOCK_D"]) * sizes["BLOCK_D"]}


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's is for kernels: on the host it takes as long as a launch."""
    return -(-a // b)


def common_multiple(*numbers: int) -> int:
    """The largest of 1, 2, 4, 8 and 16 of which all ``numbers`` are multiples."""
    return math.gcd(16, *numbers)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """a b + total, in the dtype of the total."""
    if total.dtype == tl.float64:
        return tl.dot(a, b, total, input_precision="ieee", out_dtype=tl.float64)
    elif _INTERPRETING:
        # Which multiplies the bits of bfloat16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def multiple(x, FACTOR: tl.constexpr):
    """Tells the compiler that x, a multiple of FACTOR, is one. By itself it knows only of 16."""
    return x // FACTOR * FACTOR


@triton.jit
def sum_rows(b_x):
    """[2^n, D] to [1, D]. A sum of two has one order, that of more has the layout's."""
    for _ in tl.static_range(12):
        if b_x.shape[0] > 1:
            b_x = tl.sum(tl.reshape(b_x, [2, b_x.shape[0] // 2, b_x.shape[1]]), 0)
    return b_x


@triton.jit
def sum_columns(b_x):
    """[N, 2^n] to [N, 1], likewise. Neighbours first, which a thread has."""
    for _ in tl.static_range(12):
        if b_x.shape[1] > 1:
            b_x = tl.sum(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]), 2)
    return b_x


@triton.jit
def add_term(b_total, weight, b_x):
    """b_total + weight b_x; what x holds does not matter where the weight is 0."""
    weight = weight.to(b_total.dtype)
    return tl.where(weight != 0, tl.fma(b_x, weight, b_total), b_total)


@triton.jit
def load_used(pointer, places, mask, used, dtype: tl.constexpr):
    """The numbers as ``dtype``; zeros where nothing uses them."""
    # Not mask & used: the interpreter gives a scalar the type of what was compared for it.
    return tl.load(pointer + places, mask=tl.where(used, mask, False), other=0.0).to(dtype)


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """b_x in ``dtype``; from float64 by way of float32, as torch does."""
    if dtype.primitive_bitwidth == 16:
        b_x = b_x.to(tl.float32)
    if _INTERPRETING and dtype == tl.bfloat16:
        # The interpreter's own conversion truncates.
        bits = b_x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        even = tl.where(b_x == b_x, even, 0x7FC0)
        return even.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)


@triton.jit
def widened(b_x, dtype: tl.constexpr):
    """b_x in ``dtype``, float32 or float64."""
    if _INTERPRETING and b_x.dtype == tl.bfloat16:
        # The interpreter's own conversion loses what is below bfloat16's normal numbers.
        bits = b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return b_x.to(dtype)


# Rows too narrow for a tile of their own are taken as they lie in memory: a tile of BLOCK lanes has
# COUNT numbers, whole rows of them, whose beginning is aligned for the widest loads.


def narrow_sizes(num_dims: int, tile: int = 1024) -> dict[str, int]:
    """Compile-time sizes of about ``tile`` lanes for whole rows of D; functions of D alone."""
    block_d = triton.next_power_of_2(num_dims)
    return {"BLOCK_N": max(16, tile // block_d), "BLOCK_D": block_d}


@triton.jit
def load_numbers(
    ptr, start, total, stride_n, stride_d, dtype: tl.constexpr,
    WIDTH: tl.constexpr, FLAT: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[BLOCK]: numbers from ``start`` on, of rows of WIDTH with ``total`` numbers; zeros beyond.

    In ``dtype``, float32 or float64. FLAT: the rows are dense.
    """
    o_e = tl.arange(0, BLOCK)
    left = total - start
    if FLAT:
        ptr += start
        # A mask that may end anywhere would narrow the loads of all tiles.
        if left >= COUNT:
            b_x = tl.load(ptr + o_e, mask=o_e < COUNT, other=0.0)
        else:
            b_x = tl.load(ptr + o_e, mask=o_e < left, other=0.0)
    else:
        places = start + o_e  # of 64 bits
        p_x = ptr + places // WIDTH * stride_n + places % WIDTH * stride_d
        b_x = tl.load(p_x, mask=(o_e < COUNT) & (o_e < left), other=0.0)
    return widened(b_x, dtype)


@triton.jit
def store_numbers(ptr, start, total, b_x, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers [BLOCK] to dense rows, from ``start`` on."""
    o_e = tl.arange(0, BLOCK)
    left = total - start
    b_x = rounded(b_x, ptr.dtype.element_ty)
    ptr += start
    if left >= COUNT:
        tl.store(ptr + o_e, b_x, mask=o_e < COUNT)
    else:
        tl.store(ptr + o_e, b_x, mask=o_e < left)


@triton.jit
def to_rows(b_x, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Numbers [BLOCK_N * BLOCK_D] as rows [BLOCK_N, BLOCK_D]; behind D a row repeats itself."""
    if D != BLOCK_D:
        o_e = tl.arange(0, BLOCK_N * BLOCK_D)
        b_x = tl.gather(b_x, o_e // BLOCK_D * D + tl.minimum(o_e % BLOCK_D, D - 1), 0)
    return tl.reshape(b_x, [BLOCK_N, BLOCK_D])


@triton.jit
def to_numbers(b_x, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of :func:`to_rows`; what is behind the rows is arbitrary."""
    b_x = tl.reshape(b_x, [BLOCK_N * BLOCK_D])
    if D != BLOCK_D:
        o_e = tl.arange(0, BLOCK_N * BLOCK_D)
        row = tl.minimum(o_e // D, BLOCK_N - 1)
        b_x = tl.gather(b_x, row * BLOCK_D + o_e % D, 0)
    return b_x
