"""Finite scalar quantisation of dense rows with at most 8 levels a dimension, and few dimensions.

A thread has whole rows: as many as begin and end where loads of 128 bits do. The dimension of each
of its registers is therefore known when the kernel is compiled, and so where its thresholds are:
in registers, too, loaded once for several tiles. Nothing is looked up, and most often nothing is
exchanged between threads: at D 6 15 to 18 instructions a number, where the tables take about 70.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import at_most, ceil_div, num_programs, num_threads, rounded, widened
from mmfast.kernels.launching import launch

_THREADS = 128
_MOST_STEPS = 3
_MOST_NUMBERS = 40  # of a thread
# Indices and what they are added up from are exact in float32.
_MOST_CODES = 1 << 22
_MOST_TILES = 4  # of a program


@triton.jit
def apart(b_x):
    """The columns of [P, 4] or [P, 8], each [P]."""
    P: tl.constexpr = b_x.shape[0]
    V: tl.constexpr = b_x.shape[1]
    if V == 8:
        b_even, b_odd = tl.split(tl.reshape(b_x, [P, 4, 2]))
        e = apart(b_even)
        o = apart(b_odd)
        return e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3]
    else:
        b_even, b_odd = tl.split(tl.reshape(b_x, [P, 2, 2]))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        return b_0, b_1, b_2, b_3


@triton.jit
def together(b_x, FIRST: tl.constexpr, V: tl.constexpr):
    """Of a tuple of [P], V from FIRST on: as columns of [P, V], 1, 2, 4 or 8."""
    P: tl.constexpr = b_x[0].shape[0]
    if V == 1:
        return tl.reshape(b_x[FIRST], [P, 1])
    elif V == 2:
        return tl.join(b_x[FIRST], b_x[FIRST + 1])
    elif V == 4:
        b_even = tl.join(b_x[FIRST], b_x[FIRST + 2])
        b_odd = tl.join(b_x[FIRST + 1], b_x[FIRST + 3])
        return tl.reshape(tl.join(b_even, b_odd), [P, 4])
    else:
        b_even = tl.reshape(
            tl.join(tl.join(b_x[FIRST], b_x[FIRST + 4]), tl.join(b_x[FIRST + 2], b_x[FIRST + 6])),
            [P, 4],
        )
        b_odd = tl.reshape(
            tl.join(
                tl.join(b_x[FIRST + 1], b_x[FIRST + 5]), tl.join(b_x[FIRST + 3], b_x[FIRST + 7])
            ),
            [P, 4],
        )
        return tl.reshape(tl.join(b_even, b_odd), [P, 8])


@triton.jit
def _number_of(b_z, bounds, FIRST: tl.constexpr, low, STEPS: tl.constexpr):
    """low + 2 level, from the thresholds of a dimension, which begin at FIRST, by bisection."""
    if STEPS == 1:
        return tl.where(b_z >= bounds[FIRST], low + 2, low)
    elif STEPS == 2:
        upper = b_z >= bounds[FIRST + 1]
        b_n = tl.where(upper, low + 4, low)
        b_t = tl.where(upper, bounds[FIRST + 2], bounds[FIRST])
        return tl.where(b_z >= b_t, b_n + 2, b_n)
    else:
        upper = b_z >= bounds[FIRST + 3]
        b_n = tl.where(upper, low + 8, low)
        b_t = tl.where(upper, bounds[FIRST + 5], bounds[FIRST + 1])
        b_high = tl.where(upper, bounds[FIRST + 6], bounds[FIRST + 2])
        b_low = tl.where(upper, bounds[FIRST + 4], bounds[FIRST])
        upper = b_z >= b_t
        b_n = tl.where(upper, b_n + 4, b_n)
        b_t = tl.where(upper, b_high, b_low)
        return tl.where(b_z >= b_t, b_n + 2, b_n)


@triton.jit
def _quantized(z, bounds, numbers, offset, D: tl.constexpr, STEPS: tl.constexpr):
    """Values of D columns, and their index."""
    b_index = tl.zeros(z[0].shape, tl.float32) + offset
    values = ()
    for d in tl.static_range(D):
        b_n = _number_of(z[d], bounds, d * ((1 << STEPS) - 1), -numbers[4 * d], STEPS)
        b_index = tl.fma(b_n, numbers[4 * d + 3], b_index)
        # n / width, rounded once: the first product is exact.
        b_v = tl.fma(b_n, numbers[4 * d + 1], b_n * numbers[4 * d + 2])
        values = values + (tl.where(z[d] == z[d], b_v, z[d]),)  # noqa: RUF005
    return values, b_index.to(tl.int32)


@triton.jit
def _tile(
    p_z, p_quantized, p_index, bounds, numbers, offset, D: tl.constexpr, STEPS: tl.constexpr,
    V: tl.constexpr, LOADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK times the rows of a thread."""
    ROWS: tl.constexpr = LOADS * V // D
    o_p = tl.arange(0, BLOCK)[:, None]
    places = o_p * (LOADS * V) + tl.arange(0, V)[None, :]
    z = ()
    for j in tl.static_range(LOADS):
        z = z + apart(widened(tl.load(p_z + (places + j * V)), tl.float32))
    values = ()
    indices = ()
    for r in tl.static_range(ROWS):
        row, b_index = _quantized(z[r * D : (r + 1) * D], bounds, numbers, offset, D, STEPS)
        values = values + row
        indices = indices + (b_index,)  # noqa: RUF005
    for j in tl.static_range(LOADS):
        b_v = together(values, j * V, V)
        tl.store(p_quantized + (places + j * V), rounded(b_v, p_quantized.dtype.element_ty))
    tl.store(p_index + (o_p * ROWS + tl.arange(0, ROWS)[None, :]), together(indices, 0, ROWS))


@triton.jit
def _rows(
    z_ptr, quantized_ptr, index_ptr, first, N, bounds, numbers, offset, D: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows, or fewer: one of a thread."""
    rows = first + tl.arange(0, BLOCK)
    mask = rows < N
    z = ()
    for d in tl.static_range(D):
        b_z = tl.load(z_ptr + rows * D + d, mask=mask, other=0.0)
        z = z + (widened(b_z, tl.float32),)  # noqa: RUF005
    values, b_index = _quantized(z, bounds, numbers, offset, D, STEPS)
    for d in tl.static_range(D):
        b_v = rounded(values[d], quantized_ptr.dtype.element_ty)
        tl.store(quantized_ptr + rows * D + d, b_v, mask=mask)
    tl.store(index_ptr + rows, b_index, mask=mask)


@triton.jit(do_not_specialize=["N", "tiles"])
def finite_scalar_quantize_few_kernel(
    z_ptr,  # [N, D]
    threshold_ptr,  # [D, 2^STEPS] float32, NaN behind a dimension's own
    number_ptr,  # [D, 4] float32: width, 1 / width in two parts, half of the basis
    quantized_ptr,  # [N, D]
    index_ptr,  # [N] int32
    N,
    tiles,  # of a program
    D: tl.constexpr,
    STEPS: tl.constexpr,
    V: tl.constexpr,  # numbers of a load
    LOADS: tl.constexpr,  # of a thread
    BLOCK: tl.constexpr,
):
    TILE: tl.constexpr = BLOCK * (LOADS * V // D)  # rows
    bounds = ()
    numbers = ()
    offset = 0.0
    for d in tl.static_range(D):
        for t in tl.static_range((1 << STEPS) - 1):
            bounds = bounds + (tl.load(threshold_ptr + (d << STEPS) + t),)  # noqa: RUF005
        for t in tl.static_range(4):
            numbers = numbers + (tl.load(number_ptr + 4 * d + t),)  # noqa: RUF005
        offset += numbers[4 * d] * numbers[4 * d + 3]
    begin = tl.program_id(0).to(tl.int64) * tiles * TILE
    end = tl.minimum(begin + tiles * TILE, N)
    whole = begin + (end - begin) // TILE * TILE
    for row in range(begin, whole, TILE):
        _tile(
            z_ptr + row * D, quantized_ptr + row * D, index_ptr + row, bounds, numbers, offset, D,
            STEPS, V, LOADS, BLOCK,
        )  # fmt: skip
    # A mask that may end anywhere would narrow the loads of a tile.
    for row in range(whole, end, BLOCK):
        _rows(z_ptr, quantized_ptr, index_ptr, row, N, bounds, numbers, offset, D, STEPS, BLOCK)


def fits(levels: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the kernel takes dense rows of these levels and dtype."""
    numbers = math.lcm(len(levels), _wide(dtype))
    return (
        dtype != torch.float64
        and max(levels) <= 1 << _MOST_STEPS
        and numbers <= _MOST_NUMBERS
        and math.prod(levels) <= _MOST_CODES
    )


def _wide(dtype: torch.dtype) -> int:
    """Numbers of a load of 128 bits."""
    return 16 // dtype.itemsize


def numbers_of(widths: Sequence[int], levels: Sequence[int]) -> Tensor:
    """What the kernel wants to know of each dimension, [D, 4]: width, 1 / width as the sum of two,
    of which the first has 16 bits, and half of what a level adds to the index."""
    width = torch.tensor(widths, dtype=torch.float64)
    high = ((1 / width).float().view(torch.int32) & ~0xFF).view(torch.float32)
    low = 1 / width - high.double()
    steps = [math.prod(levels[:d]) for d in range(len(levels))]
    basis = torch.tensor(steps, dtype=torch.float64) / 2
    return torch.stack([width.float(), high, low.float(), basis.float()], 1)


def finite_scalar_quantize_few(
    rows: Tensor, thresholds: Tensor, numbers: Tensor, quantized: Tensor, indices: Tensor
) -> None:
    """Write the codes and indices of dense ``rows`` (N, D), by tables that are on their device."""
    num_rows, num_dims = rows.shape
    wide = _wide(rows.dtype)
    loads = math.lcm(num_dims, wide) // wide
    # Bytes on their way, without too many numbers for the registers.
    while loads <= 2 and loads * wide <= 4 * num_dims:
        loads *= 2
    tile = _THREADS * loads * wide // num_dims  # rows
    tiles = ceil_div(num_rows, tile)
    # Of small inputs one each, so that no multiprocessor is without.
    each = max(1, min(_MOST_TILES, tiles // num_programs(rows.device, 4 * _MOST_TILES)))
    launch(finite_scalar_quantize_few_kernel, (ceil_div(tiles, each),),
        rows, thresholds, numbers, quantized, indices, num_rows, each, D=num_dims,
        STEPS=thresholds.shape[1].bit_length() - 1, V=wide, LOADS=loads, BLOCK=_THREADS,
        enable_fp_fusion=False, **num_threads(_THREADS),
        **at_most(128 if loads * wide <= 28 else 168),
    )  # fmt: skip
