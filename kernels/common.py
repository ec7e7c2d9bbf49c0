"""What the kernels and their launch functions share."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def at_most(registers: int) -> dict[str, int]:
    """Launch option. Left to itself ptxas may spill to reach a rounder number."""
    if interpreting():
        return {}
    backend, _, _ = device_limits(triton.runtime.driver.active.get_current_device())
    return {"maxnreg": registers} if backend == "cuda" else {}


def num_threads(number: int) -> dict[str, int]:
    """Launch option: so many threads per program, whatever the device calls a warp."""
    warp = 32 if interpreting() else triton.runtime.driver.active.get_current_target().warp_size
    return {"num_warps": number // warp}


def strides(t: Tensor) -> tuple[int, ...]:
    """Strides of (H, ...). That of a single head would be but another number to specialise for."""
    return (first_stride(t), *t.stride()[1:])


def lying_together(t: Tensor, first: int) -> Tensor:
    """t, or a copy of it where the numbers of dimensions [first, dim) do not follow each other."""
    expected = 1
    for size, stride in zip(reversed(t.shape[first:]), reversed(t.stride()[first:]), strict=True):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


def first_stride(t: Tensor | None) -> int:
    """Stride of the first dimension. That of a single one would be but another number."""
    return t.stride(0) if t is not None and t.shape[0] > 1 else 0


def tile_sizes(num_dims: int, tile: int, widest: int, most_rows: int = 256) -> dict[str, int]:
    """Compile-time sizes of about ``tile`` elements for rows of D; functions of D alone."""
    block_d = min(triton.next_power_of_2(max(1, num_dims)), widest)
    return {"BLOCK_N": min(tile // block_d, most_rows), "BLOCK_D": block_d}


def row_sizes(num_dims: int, tile: int, widest: int = 256) -> dict[str, int]:
    """Of a kernel that walks whole rows: BLOCK_D once or more often, up to WIDTH.

    Where it is once, the compiler sees that, and keeps a tile that is read twice.
    """
    sizes = tile_sizes(num_dims, tile, widest)
    return sizes | {"WIDTH": triton.cdiv(max(1, num_dims), sizes["BLOCK_D"]) * sizes["BLOCK_D"]}


def common_multiple(*numbers: int) -> int:
    """The largest of 1, 2, 4, 8 and 16 of which all ``numbers`` are multiples."""
    return math.gcd(16, *numbers)


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
