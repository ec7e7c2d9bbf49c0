"""Thresholds of predictions in Triton: an exact quantile by digits, without a sort.

Bits of numbers that are not negative are in the numbers' order. For each digit of 8 bits, from the
highest on, the numbers that agree with what is known so far are counted by their digit; where the
rank falls is the quantile's next digit. Counts are added up atomically, as integers, whose order
does not matter.

1. ``dynamic_threshold_predict_kernel``: the predictions' absolute values, their greatest, and the
   counts of the first digit.
2. ``dynamic_threshold_count_kernel``, for each other digit.
3. ``dynamic_threshold_next_kernel``: the least of the numbers above the one found.
4. ``dynamic_threshold_kernel``: the quantile between the two, clamped.

Workspace: a float32 per number (float64 if x is), and 1 or 2 KiB per digit and sample.
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
    load_used,
    lying_together,
    multiple,
    num_threads,
)
from mmfast.kernels.sampler_step import guidance_weights, prediction
from mmfast.schedule.layout import Layout, M, N, X

_BLOCK = 4096
_TILE = 1024
_DIGIT = tl.constexpr(8)
_DIGITS = tl.constexpr(256)

_X = tl.constexpr(X)
_M = tl.constexpr(M)
_N = tl.constexpr(N)


@triton.jit
def _count(p_count, b_key, mask, PLACE: tl.constexpr):
    """Add the tile's digits, which end at bit PLACE, to the counts."""
    digit = ((b_key >> PLACE) & (_DIGITS - 1)).to(tl.int32)
    b_count = tl.histogram(digit, _DIGITS, mask=mask)
    o_digit = tl.arange(0, _DIGITS)
    tl.atomic_add(p_count + o_digit, b_count, mask=b_count != 0, sem="relaxed")


@triton.jit
def _found(p_count, rank, KNOWN: tl.constexpr, WIDE: tl.constexpr):
    """What KNOWN digits say: those digits, the rank among the numbers that have them, how many."""
    prefix = tl.full([], 0, tl.int64)
    number = tl.full([], 0, tl.int32)
    for i in tl.static_range(KNOWN):
        o_digit = tl.arange(0, _DIGITS)
        b_count = tl.load(p_count + i * _DIGITS + o_digit)
        b_upto = tl.cumsum(b_count, 0)
        digit = tl.sum((b_upto <= rank).to(tl.int32), 0)
        number = tl.sum(tl.where(o_digit == digit, b_count, 0), 0)
        rank -= tl.max(tl.where(b_upto <= rank, b_upto, 0), 0)
        prefix = (prefix << _DIGIT) | digit.to(tl.int64)
    if not WIDE:
        prefix = prefix.to(tl.int32)
    return prefix, rank, number


@triton.jit(
    do_not_specialize=[
        "E", "rows", "stride_step", "stride_guidance", "stride_x", "stride_m", "stride_u",
        "stride_count",
    ]
)  # fmt: skip
def dynamic_threshold_predict_kernel(
    x_ptr,
    m_ptr,
    u_ptr,  # or None
    guidance_scale: tl.float64,
    guidance_ptr,  # or None
    table_ptr,
    step_ptr,
    key_ptr,  # [B, E]
    count_ptr,  # [B, digits, 256] int32
    largest_ptr,  # [B]
    E,
    rows,
    columns,
    stride_step,
    stride_guidance,
    stride_x,
    stride_m,
    stride_u,
    stride_count,
    BITS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    KEY: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    place = tl.program_id(0).to(tl.int64)
    E = multiple(E, FACTOR)
    b = place // tl.cdiv(E, BLOCK)
    first = place % tl.cdiv(E, BLOCK) * BLOCK

    # A row that is not there, or takes noise, gives NaN.
    step = tl.load(step_ptr + b * stride_step)
    inside = (step >= 0) & (step < rows)
    p_row = table_ptr + tl.where(inside, step, 0) * columns
    inside = inside & (tl.load(p_row + _N) == 0)
    poison = tl.where(inside, 0.0, float("nan")).to(tl.float64)
    conditional, unconditional = guidance_weights(
        p_row, u_ptr, guidance_scale, guidance_ptr, b * stride_guidance
    )
    use_x = tl.load(p_row + _X) != 0
    use_m = tl.load(p_row + _M) != 0
    p_x = x_ptr + b * multiple(stride_x, FACTOR)
    p_m = m_ptr + b * multiple(stride_m, FACTOR)
    largest = tl.full([], 0, KEY)
    for start in range(0, BLOCK, TILE):
        places = first + start + tl.arange(0, TILE)
        mask = places < E
        b_x = load_used(p_x, places, mask, use_x, DTYPE)
        b_m = load_used(p_m, places, mask, use_m & (conditional != 0), DTYPE)
        b_u = tl.zeros_like(b_x)
        if u_ptr is not None:
            p_u = u_ptr + b * multiple(stride_u, FACTOR)
            b_u = load_used(p_u, places, mask, use_m & (unconditional != 0), DTYPE)
        b_n = tl.zeros_like(b_x)
        b_p = prediction(p_row, poison, b_x, b_m, b_u, b_n, conditional, unconditional)
        b_key = b_p.to(KEY, bitcast=True) & ((tl.full([], 1, KEY) << (BITS - 1)) - 1)
        tl.store(key_ptr + b * E + places, b_key, mask=mask)
        largest = tl.maximum(largest, tl.max(tl.where(mask, b_key, 0), 0))
        _count(count_ptr + b * stride_count, b_key, mask, BITS - _DIGIT)
    tl.atomic_max(largest_ptr + b, largest, sem="relaxed")


@triton.jit(do_not_specialize=["E", "rank", "stride_count"])
def dynamic_threshold_count_kernel(
    key_ptr,  # [B, E]
    count_ptr,  # [B, digits, 256] int32
    E,
    rank,
    stride_count,
    KNOWN: tl.constexpr,  # digits
    BITS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    PLACE: tl.constexpr = BITS - (KNOWN + 1) * _DIGIT
    place = tl.program_id(0).to(tl.int64)
    E = multiple(E, FACTOR)
    b = place // tl.cdiv(E, BLOCK)
    first = place % tl.cdiv(E, BLOCK) * BLOCK
    p_count = count_ptr + b * stride_count
    prefix, _, _ = _found(p_count, rank, KNOWN, BITS == 64)
    for start in range(0, BLOCK, TILE):
        places = first + start + tl.arange(0, TILE)
        b_key = tl.load(key_ptr + b * E + places, mask=places < E, other=0)
        mask = (places < E) & ((b_key >> (PLACE + _DIGIT)) == prefix)
        _count(p_count + KNOWN * _DIGITS, b_key, mask, PLACE)


@triton.jit(do_not_specialize=["E", "rank", "stride_count"])
def dynamic_threshold_next_kernel(
    key_ptr,  # [B, E]
    count_ptr,  # [B, digits, 256] int32
    next_ptr,  # [B]
    E,
    rank,
    stride_count,
    BITS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    E = multiple(E, FACTOR)
    b = place // tl.cdiv(E, BLOCK)
    first = place % tl.cdiv(E, BLOCK) * BLOCK
    low, _, _ = _found(count_ptr + b * stride_count, rank, BITS // _DIGIT, BITS == 64)
    most = (tl.full([], 1, low.dtype) << (BITS - 1)) - 1
    next = most
    for start in range(0, BLOCK, TILE):
        places = first + start + tl.arange(0, TILE)
        b_key = tl.load(key_ptr + b * E + places, mask=places < E, other=0)
        next = tl.minimum(next, tl.min(tl.where(b_key > low, b_key, most), 0))
    tl.atomic_min(next_ptr + b, next, sem="relaxed")


@triton.jit(do_not_specialize=["rank", "stride_count"])
def dynamic_threshold_kernel(
    count_ptr,  # [B, digits, 256] int32
    largest_ptr,  # [B]
    next_ptr,  # [B]
    out_ptr,  # [B]
    rank,
    part: tl.float64,
    maximum: tl.float64,
    stride_count,
    BITS: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    b = tl.program_id(0).to(tl.int64)
    low, left, number = _found(count_ptr + b * stride_count, rank, BITS // _DIGIT, BITS == 64)
    high = tl.where(left + 1 < number, low, tl.load(next_ptr + b))
    largest = tl.load(largest_ptr + b).to(DTYPE, bitcast=True)
    part = tl.full([], part, tl.float64)
    b_low = low.to(DTYPE, bitcast=True).to(tl.float64)
    b_high = high.to(DTYPE, bitcast=True).to(tl.float64)
    between = (high != low) & (part != 0)
    quantile = tl.where(between, b_low + (b_high - b_low) * part, b_low)
    maximum = tl.full([], maximum, tl.float64)
    quantile = tl.where(quantile < 1.0, 1.0, quantile)
    quantile = tl.where(quantile > maximum, maximum, quantile)
    quantile = tl.where(largest == largest, quantile, float("nan"))
    tl.store(out_ptr + b, quantile.to(DTYPE))


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    guidance_scale: float,
    guidance: Tensor | None,
    table: Tensor,
    step: Tensor,
    ratio: float,
    maximum: float,
) -> Tensor:
    """``torch.ops.mmfast.dynamic_threshold`` on checked arguments."""
    batch, numbers = x.shape[0], x.shape[1:].numel()
    wide = x.dtype == torch.float64
    result = x.new_empty(batch, dtype=torch.float64 if wide else torch.float32)
    if x.numel() == 0:
        return result.fill_(min(1.0, maximum))
    bits, digits = (64, 8) if wide else (32, 4)
    key = torch.int64 if wide else torch.int32
    keys = x.new_empty((batch, numbers), dtype=key)
    counts = x.new_zeros((batch, digits, 256), dtype=torch.int32)
    largest = x.new_zeros(batch, dtype=key)
    above = x.new_full((batch,), torch.iinfo(key).max, dtype=key)
    rank = ratio * (numbers - 1)
    x, m, u = (
        None if t is None else lying_together(t, 1) for t in (x, model_output, unconditional)
    )
    strides = [first_stride(t) for t in (x, m, u)]
    grid = (batch * triton.cdiv(numbers, _BLOCK),)
    options: dict[str, Any] = {
        "BITS": bits, "BLOCK": _BLOCK, "TILE": _TILE, "enable_fp_fusion": False,
        **num_threads(128), **at_most(255),
    }  # fmt: skip
    dynamic_threshold_predict_kernel[grid](
        x, m, u, guidance_scale, None if guidance is None else guidance.contiguous(),
        table.contiguous(), step, keys, counts, largest, numbers, table.shape[0], table.shape[1],
        step.stride(0) if step.dim() and batch > 1 else 0,
        2 if guidance is not None and guidance.shape[0] > 1 else 0, *strides, counts.stride(0),
        FACTOR=common_multiple(numbers, *strides), **options,
    )  # fmt: skip
    factor = common_multiple(numbers)
    for known in range(1, digits):
        dynamic_threshold_count_kernel[grid](
            keys, counts, numbers, int(rank), counts.stride(0), KNOWN=known, FACTOR=factor,
            **options,
        )  # fmt: skip
    dynamic_threshold_next_kernel[grid](
        keys, counts, above, numbers, int(rank), counts.stride(0), FACTOR=factor, **options
    )
    dynamic_threshold_kernel[(batch,)](
        counts, largest, above, result, int(rank), rank - int(rank), maximum, counts.stride(0),
        BITS=bits, enable_fp_fusion=False, **num_threads(128), **at_most(255),
    )  # fmt: skip
    return result


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(guided: bool, dtype: torch.dtype, quick: bool) -> Variant:
        def launch(n: int, _: int) -> None:
            x = torch.ones(n, 64, dtype=dtype)
            table = torch.ones(4, Layout(0).columns, dtype=torch.float64)
            step = torch.zeros(n, dtype=torch.int64)
            dynamic_threshold(x, x, x if guided else None, 7.5, None, table, step, 0.995, 9.0)

        return Variant(
            f"dynamic_threshold: {'guided, ' * guided}{dtype}".replace("torch.", ""),
            launch,
            wide=(
                ("dynamic_threshold_predict_kernel", "tl.load(pointer + places"),
                ("dynamic_threshold_count_kernel", "b_key = tl.load("),
            ),
            quick=quick,
        )

    return [
        variant(guided, t, guided and t in (torch.bfloat16, torch.float64))
        for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        for guided in (False, True)
    ]
