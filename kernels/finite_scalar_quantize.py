"""Finite scalar quantisation in Triton, and its gradient.

Dense rows of few dimensions and levels have a kernel of their own. In that of the others a program
takes whole rows as they lie in memory, by loads of 128 bits whatever D is. A number's level is
found by bisection in a table of its dimension's thresholds, which stays in the first cache: log2(L)
loads and comparisons for L levels, and one load of the level's value. Rows come about only for the
indices: through shared memory, or without a move where D is a power of two.

The tables are copied to the device at the first call with new levels, which therefore cannot be
captured in a graph; later calls read nothing from the host.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import finite_scalar_quantize_few as few
from mmfast.kernels.common import (
    at_most,
    ceil_div,
    load_numbers,
    narrow_sizes,
    num_threads,
    store_numbers,
    to_rows,
)
from mmfast.kernels.launching import launch


@triton.jit
def _levels(b_z, column, threshold_ptr, STEPS: tl.constexpr):
    """How many thresholds of their dimensions the numbers reach."""
    level = tl.zeros(b_z.shape, tl.int32)
    p_first = threshold_ptr + (column << STEPS)
    for i in tl.static_range(STEPS):
        step = 1 << (STEPS - 1 - i)
        level += tl.where(b_z >= tl.load(p_first + level + (step - 1)), step, 0)
    return level


@triton.jit(do_not_specialize=["N", "stride_zn", "stride_nn"])
def finite_scalar_quantize_kernel(
    z_ptr,
    noise_ptr,  # if NOISE
    threshold_ptr,  # [D, 2^STEPS], NaN behind a dimension's own
    value_ptr,  # [D, 2^STEPS] of the levels; float64 if NOISE
    basis_ptr,  # [D] int32
    quantized_ptr,  # [N, D]
    index_ptr,  # [N] int32
    N,
    stride_zn,
    stride_zd,
    stride_nn,
    stride_nd,
    D: tl.constexpr,
    STEPS: tl.constexpr,
    FLAT: tl.constexpr,
    NOISE: tl.constexpr,
    NOISE_FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCK: tl.constexpr = BLOCK_N * BLOCK_D
    dtype: tl.constexpr = threshold_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    start = first * D
    total = N.to(tl.int64) * D
    b_z = load_numbers(
        z_ptr, start, total, stride_zn, stride_zd, dtype, D, FLAT, BLOCK_N * D, BLOCK
    )  # fmt: skip
    column = tl.arange(0, BLOCK) % D
    level = _levels(b_z, column, threshold_ptr, STEPS)
    b_value = tl.load(value_ptr + (column << STEPS) + level)
    b_value = tl.where(b_z == b_z, b_value, b_z.to(b_value.dtype))
    if NOISE:
        b_value += load_numbers(
            noise_ptr, start, total, stride_nn, stride_nd, tl.float64, D, NOISE_FLAT, BLOCK_N * D,
            BLOCK,
        )  # fmt: skip
        b_value = tl.where(b_value > 1, 1.0, tl.where(b_value < -1, -1.0, b_value))
    store_numbers(quantized_ptr, start, total, b_value, BLOCK_N * D, BLOCK)
    b_term = to_rows(level * tl.load(basis_ptr + column), D, BLOCK_N, BLOCK_D)
    b_index = tl.sum(tl.where(tl.arange(0, BLOCK_D)[None, :] < D, b_term, 0), 1)
    rows = first + tl.arange(0, BLOCK_N)
    tl.store(index_ptr + rows, b_index, mask=rows < N)


@triton.jit(do_not_specialize=["N", "stride_gn", "stride_zn", "stride_nn"])
def finite_scalar_quantize_bwd_kernel(
    grad_ptr,
    z_ptr,
    noise_ptr,  # if NOISE
    threshold_ptr,
    value_ptr,  # float64
    shift_ptr,  # [D] float64
    gain_ptr,  # [D] float64
    result_ptr,  # [N, D]
    N,
    stride_gn,
    stride_gd,
    stride_zn,
    stride_zd,
    stride_nn,
    stride_nd,
    D: tl.constexpr,
    STEPS: tl.constexpr,
    HARD: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    FLAT: tl.constexpr,
    NOISE: tl.constexpr,
    NOISE_FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCK: tl.constexpr = BLOCK_N * BLOCK_D
    dtype: tl.constexpr = threshold_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * (BLOCK_N * D)
    total = N.to(tl.int64) * D
    b_z = load_numbers(
        z_ptr, start, total, stride_zn, stride_zd, dtype, D, FLAT, BLOCK_N * D, BLOCK
    )  # fmt: skip
    b_grad = load_numbers(
        grad_ptr, start, total, stride_gn, stride_gd, dtype, D, GRAD_FLAT, BLOCK_N * D, BLOCK
    )  # fmt: skip
    column = tl.arange(0, BLOCK) % D
    gain = tl.load(gain_ptr + column).to(dtype)
    shift = tl.load(shift_ptr + column)
    if HARD:
        # The bounds are exact, as are those of the noise below.
        b_u = b_z.to(tl.float64) + shift
        slope = tl.where((b_u >= -1) & (b_u <= 1), gain, 0.0)
    else:
        b_u = b_z + shift.to(dtype)
        b_e = tl.exp(-2 * tl.abs(b_u))
        slope = 4 * b_e / ((1 + b_e) * (1 + b_e)) * gain
    if NOISE:
        level = _levels(b_z, column, threshold_ptr, STEPS)
        b_value = tl.load(value_ptr + (column << STEPS) + level)
        b_value += load_numbers(
            noise_ptr, start, total, stride_nn, stride_nd, tl.float64, D, NOISE_FLAT, BLOCK_N * D,
            BLOCK,
        )  # fmt: skip
        slope = tl.where((b_value >= -1) & (b_value <= 1), slope, 0.0)
    slope = tl.where(b_z == b_z, slope, b_z)
    store_numbers(result_ptr, start, total, b_grad * slope, BLOCK_N * D, BLOCK)


class Tables(NamedTuple):
    """What differs between dimensions and levels."""

    thresholds: Tensor  # [D, 2^steps]
    values: Tensor  # [D, 2^steps]
    basis: Tensor  # [D] int32
    shifts: Tensor  # [D] float64
    gains: Tensor  # [D] float64
    numbers: Tensor  # [D, 4] float32
    steps: int


@functools.lru_cache(maxsize=256)
def _tables(
    levels: tuple[int, ...],
    variant: str,
    hard_clamp: bool,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    device: torch.device,
) -> Tables:
    from mmfast.ops.finite_scalar_quantize import dimensions

    dims = dimensions(levels, variant, hard_clamp)
    steps = (max(levels) - 1).bit_length()
    exact = torch.full((len(levels), 1 << steps), math.nan, dtype=torch.float64)
    for row, spec in zip(exact, dims, strict=True):
        row[: len(spec.thresholds)] = torch.tensor(spec.thresholds, dtype=torch.float64)
    # Rounded up: what reaches the result reaches the threshold.
    thresholds = exact.to(dtype)
    up = torch.nextafter(thresholds, torch.full_like(thresholds, math.inf))
    thresholds = torch.where(thresholds.double() < exact, up, thresholds)
    width = torch.tensor([[d.width] for d in dims])
    values = (2 * torch.arange(1 << steps) - width).double() / width
    basis = torch.tensor([math.prod(levels[:d]) for d in range(len(levels))], dtype=torch.int32)
    shifts, gains = (
        torch.tensor(numbers, dtype=torch.float64)
        for numbers in ([d.shift for d in dims], [d.gain for d in dims])
    )
    numbers = few.numbers_of([d.width for d in dims], levels)
    tensors = (thresholds, values.to(value_dtype), basis, shifts, gains, numbers)
    return Tables(*(t.to(device) for t in tensors), steps)


def _tables_of(
    z: Tensor, levels: list[int], variant: str, hard_clamp: bool, exact_values: bool
) -> Tables:
    dtype = torch.promote_types(z.dtype, torch.float32)
    value_dtype = torch.float64 if exact_values else dtype
    return _tables(tuple(levels), variant, hard_clamp, dtype, value_dtype, z.device)


def finite_scalar_quantize(
    z: Tensor, levels: list[int], variant: str, hard_clamp: bool, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.finite_scalar_quantize`` on checked arguments."""
    quantized = z.new_empty(z.shape)
    indices = z.new_empty(z.shape[:-1], dtype=torch.int32)
    if z.numel() == 0:
        return quantized, indices
    rows = z.reshape(-1, len(levels))  # [N, D]
    # Without noise any tensor, which is not read.
    noisy = rows if noise is None else noise.reshape(rows.shape)
    tables = _tables_of(z, levels, variant, hard_clamp, noise is not None)
    if noise is None and rows.is_contiguous() and few.fits(levels, z.dtype):
        few.finite_scalar_quantize_few(rows, tables.thresholds, tables.numbers, quantized, indices)
        return quantized, indices
    sizes = narrow_sizes(len(levels))
    launch(finite_scalar_quantize_kernel, (ceil_div(len(rows), sizes["BLOCK_N"]),),
        rows, noisy, tables.thresholds, tables.values, tables.basis, quantized, indices, len(rows),
        *rows.stride(), *noisy.stride(), D=len(levels), STEPS=tables.steps,
        FLAT=rows.is_contiguous(), NOISE=noise is not None, NOISE_FLAT=noisy.is_contiguous(),
        **sizes, **num_threads(128), **at_most(128),
    )  # fmt: skip
    return quantized, indices


def finite_scalar_quantize_bwd(
    grad: Tensor,
    z: Tensor,
    levels: list[int],
    variant: str,
    hard_clamp: bool,
    noise: Tensor | None,
) -> Tensor:
    """``torch.ops.mmfast.finite_scalar_quantize_bwd`` on checked arguments."""
    result = z.new_empty(z.shape)
    if z.numel() == 0:
        return result
    rows = z.reshape(-1, len(levels))  # [N, D]
    passed = grad.reshape(rows.shape)
    noisy = rows if noise is None else noise.reshape(rows.shape)
    tables = _tables_of(z, levels, variant, hard_clamp, True)
    sizes = narrow_sizes(len(levels))
    launch(finite_scalar_quantize_bwd_kernel, (ceil_div(len(rows), sizes["BLOCK_N"]),),
        passed, rows, noisy, tables.thresholds, tables.values, tables.shifts, tables.gains, result,
        len(rows), *passed.stride(), *rows.stride(), *noisy.stride(), D=len(levels),
        STEPS=tables.steps, HARD=hard_clamp, GRAD_FLAT=passed.is_contiguous(),
        FLAT=rows.is_contiguous(), NOISE=noise is not None, NOISE_FLAT=noisy.is_contiguous(),
        **sizes, **num_threads(128), **at_most(128),
    )  # fmt: skip
    return result


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(
        levels: tuple[int, ...], dtype: torch.dtype, noisy: bool, hard: bool, quick: bool
    ) -> Variant:
        def launch(n: int, k: int) -> None:
            z = torch.ones(n, len(levels), dtype=dtype)
            others = (list(levels), "symmetric", hard, z if noisy else None)
            finite_scalar_quantize(z, *others)
            finite_scalar_quantize_bwd(z, z, *others)

        name = f"{dtype}{', noise' * noisy}{', hard' * hard}, D {len(levels)}"
        return Variant(
            f"finite_scalar_quantize: {name}".replace("torch.", ""), launch, wide=wide, quick=quick
        )

    # The loads of whole tiles, of z, and backward of the gradient.
    text = "b_x = tl.load(ptr + o_e, mask=o_e < COUNT"
    wide = (
        ("finite_scalar_quantize_few_kernel", "tl.load(p_z + (places"),
        *((f"finite_scalar_quantize{kind}_kernel", text) for kind in ("", "_bwd")),
    )
    some = {(torch.float32, 6), (torch.bfloat16, 4)}
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return [
        variant(levels, t, noisy, hard, (t, len(levels)) in some and noisy == hard)
        for levels in ((1024,), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 5, 5, 5), (3,) * 17)
        for t in floats
        for noisy, hard in ((False, False), (True, False), (True, True))
    ]
