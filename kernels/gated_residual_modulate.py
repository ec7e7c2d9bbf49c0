"""A gated residual connection and a modulated norm in Triton, each or both, and their gradients.

Forward, ``gated_residual_modulate_kernel``: a tile of whole rows; x and y are read once where a row
fits into a tile.

Backward:

1. ``modulation_row_sums_kernel``, only where a row does not fit into a tile: two means per row.
2. ``gated_residual_modulate_bwd_kernel``: a part of the tokens of a frame, and a tile of channels.
   Gradients of x and y, and the part's terms of the sums over tokens.
3. ``modulation_frame_sums_kernel``, where frames have several parts: their sums, and with them the
   gradients of shift, scale and gate.
4. ``modulation_affine_kernel``, for gradients of weight and bias: sums over frames.

Parts depend on nothing but L and F; the order of all sums is written down here.

Workspace: three numbers for every ``_PART`` tokens of a frame and channel, where frames have so
many or weight or bias need a gradient; two for each token, where rows do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import (
    at_most,
    ceil_div,
    common_multiple,
    device_limits,
    load_used,
    lying_together,
    multiple,
    num_programs,
    num_threads,
    pipelined,
    rounded,
    row_sizes,
    sum_columns,
    sum_rows,
)
from mmfast.kernels.launching import launch

# These decide the order of the sums, and with it the last bits.
_PART = 16
_TILE = 2048
_WIDEST = 4096
_FRAMES = 64  # added at once by modulation_affine_kernel
_COLUMNS = 64

_NONE, _LAYER, _RMS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NORMS = {None: 0, "layer": 1, "rms": 2}


@triton.jit
def _tanh(b_x):
    """sinh / cosh near zero, where the other form loses digits."""
    b_size = tl.abs(b_x)
    b_square = tl.minimum(b_size, 1.0) * tl.minimum(b_size, 1.0)
    b_series = b_square * 0.0 + 1.0
    for i in tl.static_range(9):
        b_series = 1.0 + b_series * b_square / ((18 - 2 * i) * (19 - 2 * i))
    b_sinh = b_series * b_size
    b_near = b_sinh / tl.sqrt(1.0 + b_sinh * b_sinh)
    b_far = 1.0 - 2.0 / (tl.exp(2.0 * b_size) + 1.0)
    b_result = tl.where(b_size < 0.625, b_near, b_far)
    b_result = tl.where(b_x < 0, -b_result, b_result)
    return tl.where(b_x == b_x, b_result, b_x)


@triton.jit
def _tanh_slope(b_x):
    """Without the difference 1 - tanh^2, in which digits cancel."""
    b_e = tl.exp(-2.0 * tl.abs(b_x))
    return 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))


@triton.jit
def _gate(ptr, places, mask, dtype: tl.constexpr, TANH: tl.constexpr):
    b_gate = tl.load(ptr + places, mask=mask, other=0.0).to(dtype)
    if TANH:
        b_gate = _tanh(b_gate)
    return b_gate


@triton.jit
def _sums_of(
    x_ptr, y_ptr, gate_ptr, x_places, y_places, gate_places, mask, dtype: tl.constexpr,
    ADDS: tl.constexpr, GATED: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """x + act(gate) y, as it is rounded."""
    b_x = tl.load(x_ptr + x_places, mask=mask, other=0.0)
    if ADDS:
        b_sum = b_x.to(dtype)
        b_y = tl.load(y_ptr + y_places, mask=mask, other=0.0).to(dtype)
        if GATED:
            b_sum = tl.fma(_gate(gate_ptr, gate_places, mask, dtype, TANH), b_y, b_sum)
        else:
            b_sum += b_y
        return rounded(b_sum, x_ptr.dtype.element_ty)
    else:
        return b_x


@triton.jit(
    do_not_specialize=[
        "rows", "L", "EACH", "C", "xb", "xn", "yb", "yn", "gb", "gf", "hb", "hf", "sb", "sf"
    ]
)  # fmt: skip
def gated_residual_modulate_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr,
    residual_ptr, out_ptr, mean_ptr, rstd_ptr,  # [B, L, C], and of rows [B, L]
    rows, L, EACH, C,
    xb, xn, yb, yn, gb, gf, hb, hf, sb, sf,  # of samples and tokens, or frames
    EPS: tl.constexpr,
    ADDS: tl.constexpr, GATED: tl.constexpr, TANH: tl.constexpr, NORM: tl.constexpr,
    SHIFTS: tl.constexpr, SCALES: tl.constexpr, WEIGHTS: tl.constexpr, BIASED: tl.constexpr,
    FACTOR: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = rstd_ptr.dtype.element_ty
    C = multiple(C, FACTOR)
    # The next rows are on their way while these are added up.
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.num_programs(0), num_stages=STAGES
    ):
        row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BN, 1]
        m_n = row < rows
        b = row // L
        token = row % L
        frame = token // EACH
        x_row = b * multiple(xb, FACTOR) + token * multiple(xn, FACTOR)
        y_row = b * multiple(yb, FACTOR) + token * multiple(yn, FACTOR)
        g_row = b * multiple(gb, FACTOR) + frame * multiple(gf, FACTOR)
        h_row = b * multiple(hb, FACTOR) + frame * multiple(hf, FACTOR)
        s_row = b * multiple(sb, FACTOR) + frame * multiple(sf, FACTOR)
        # Nothing is stored before all is read: a tile that is a whole row is then read but once.
        if NORM != _NONE:
            b_mean = tl.zeros([BLOCK_N, 1], dtype)
            if NORM == _LAYER:
                for c in range(0, WIDTH, BLOCK_D):
                    o_c = c + tl.arange(0, BLOCK_D)[None, :]
                    m = m_n & (o_c < C)
                    b_sum = _sums_of(
                        x_ptr, y_ptr, gate_ptr, x_row + o_c, y_row + o_c, g_row + o_c, m, dtype,
                        ADDS, GATED, TANH,
                    )  # fmt: skip
                    b_mean += sum_columns(b_sum.to(dtype))
                b_mean = b_mean / C
            b_square = tl.zeros([BLOCK_N, 1], dtype)
            for c in range(0, WIDTH, BLOCK_D):
                o_c = c + tl.arange(0, BLOCK_D)[None, :]
                m = m_n & (o_c < C)
                b_sum = _sums_of(
                    x_ptr, y_ptr, gate_ptr, x_row + o_c, y_row + o_c, g_row + o_c, m, dtype,
                    ADDS, GATED, TANH,
                )  # fmt: skip
                b_less = tl.where(m, b_sum.to(dtype) - b_mean, 0.0)
                b_square += sum_columns(b_less * b_less)
            b_rstd = 1.0 / tl.sqrt(b_square / C + EPS)
        for c in range(0, WIDTH, BLOCK_D):
            o_c = c + tl.arange(0, BLOCK_D)[None, :]
            m = m_n & (o_c < C)
            b_sum = _sums_of(
                x_ptr, y_ptr, gate_ptr, x_row + o_c, y_row + o_c, g_row + o_c, m, dtype,
                ADDS, GATED, TANH,
            )  # fmt: skip
            if NORM != _NONE:
                b_out = (b_sum.to(dtype) - b_mean) * b_rstd
                if WEIGHTS:
                    b_out *= tl.load(weight_ptr + o_c, mask=o_c < C, other=0.0).to(dtype)
                if BIASED:
                    b_out += tl.load(bias_ptr + o_c, mask=o_c < C, other=0.0).to(dtype)
                if SCALES:
                    b_scale = tl.load(scale_ptr + s_row + o_c, mask=m, other=0.0).to(dtype)
                    b_out *= 1.0 + b_scale
                if SHIFTS:
                    b_out += tl.load(shift_ptr + h_row + o_c, mask=m, other=0.0).to(dtype)
                tl.store(out_ptr + row * C + o_c, rounded(b_out, out_ptr.dtype.element_ty), mask=m)
            if ADDS:
                tl.store(residual_ptr + row * C + o_c, b_sum, mask=m)
        if NORM == _LAYER:
            tl.store(mean_ptr + row, b_mean, mask=m_n)
        if NORM != _NONE:
            tl.store(rstd_ptr + row, b_rstd, mask=m_n)


@triton.jit
def _passed(
    passed_ptr, places, scale_ptr, s_row, weight_ptr, o_c, mask, C, dtype: tl.constexpr,
    SCALES: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The gradient of the modulated, and that of the norm."""
    b_above = tl.load(passed_ptr + places, mask=mask, other=0.0).to(dtype)
    b_grad = b_above
    if SCALES:
        b_grad *= 1.0 + tl.load(scale_ptr + s_row + o_c, mask=mask, other=0.0).to(dtype)
    if WEIGHTS:
        b_grad *= tl.load(weight_ptr + o_c, mask=o_c < C, other=0.0).to(dtype)
    return b_above, b_grad


@triton.jit
def _normed(x_ptr, places, b_mean, b_rstd, mask, dtype: tl.constexpr):
    b_x = tl.load(x_ptr + places, mask=mask, other=0.0).to(dtype)
    return tl.where(mask, (b_x - b_mean) * b_rstd, 0.0)


@triton.jit(do_not_specialize=["rows", "L", "EACH", "C", "pb", "pn", "xb", "xn", "sb", "sf"])
def modulation_row_sums_kernel(
    passed_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, weight_ptr,
    row_ptr,  # [B, L, 2]: means of the norm's gradient, and of its product with the norm
    rows, L, EACH, C,
    pb, pn, xb, xn, sb, sf,
    NORM: tl.constexpr, SCALES: tl.constexpr, WEIGHTS: tl.constexpr,
    FACTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = rstd_ptr.dtype.element_ty
    C = multiple(C, FACTOR)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m_n = row < rows
    b = row // L
    token = row % L
    p_row = b * multiple(pb, FACTOR) + token * multiple(pn, FACTOR)
    x_row = b * multiple(xb, FACTOR) + token * multiple(xn, FACTOR)
    s_row = b * multiple(sb, FACTOR) + token // EACH * multiple(sf, FACTOR)
    b_mean = load_used(mean_ptr, row, m_n, NORM == _LAYER, dtype)
    b_rstd = tl.load(rstd_ptr + row, mask=m_n, other=0.0)
    b_level = tl.zeros([BLOCK_N, 1], dtype)
    b_along = tl.zeros([BLOCK_N, 1], dtype)
    for c in range(0, WIDTH, BLOCK_D):
        o_c = c + tl.arange(0, BLOCK_D)[None, :]
        m = m_n & (o_c < C)
        _, b_grad = _passed(
            passed_ptr, p_row + o_c, scale_ptr, s_row, weight_ptr, o_c, m, C, dtype,
            SCALES, WEIGHTS,
        )  # fmt: skip
        b_normed = _normed(x_ptr, x_row + o_c, b_mean, b_rstd, m, dtype)
        b_level += sum_columns(b_grad)
        b_along += sum_columns(b_grad * b_normed)
    tl.store(row_ptr + row * 2, b_level / C, mask=m_n)
    tl.store(row_ptr + row * 2 + 1, b_along / C, mask=m_n)


@triton.jit
def _finish(
    b_above, b_normed, b_gated, frame, b, o_c, C, F,
    gate_ptr, scale_ptr, weight_ptr, bias_ptr, gb, gf, sb, sf,
    to_gate_ptr, to_shift_ptr, to_scale_ptr,  # [B, F, C]
    TANH: tl.constexpr, WEIGHTS: tl.constexpr, BIASED: tl.constexpr,
    TO_GATE: tl.constexpr, TO_SHIFT: tl.constexpr, TO_SCALE: tl.constexpr,
):  # fmt: skip
    """Gradients of a frame's modulation from its sums [1, BD]."""
    dtype: tl.constexpr = b_above.dtype
    m_c = o_c < C
    place = (b * F + frame) * C + o_c
    if TO_SHIFT:
        tl.store(to_shift_ptr + place, rounded(b_above, to_shift_ptr.dtype.element_ty), mask=m_c)
    if TO_SCALE:
        b_grad = b_normed
        if WEIGHTS:
            b_grad *= tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(dtype)
        if BIASED:
            b_grad += b_above * tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(dtype)
        tl.store(to_scale_ptr + place, rounded(b_grad, to_scale_ptr.dtype.element_ty), mask=m_c)
    if TO_GATE:
        b_grad = b_gated
        if TANH:
            p_gate = gate_ptr + b * gb + frame * gf + o_c
            b_grad *= _tanh_slope(tl.load(p_gate, mask=m_c, other=0.0).to(dtype))
        tl.store(to_gate_ptr + place, rounded(b_grad, to_gate_ptr.dtype.element_ty), mask=m_c)


@triton.jit(
    do_not_specialize=[
        "L", "EACH", "C", "F", "P", "ob", "on", "pb", "pn", "xb", "xn", "yb", "yn", "gb", "gf",
        "sb", "sf",
    ]
)  # fmt: skip
def gated_residual_modulate_bwd_kernel(
    own_ptr, passed_ptr, x_ptr, y_ptr, mean_ptr, rstd_ptr, row_ptr,
    gate_ptr, scale_ptr, weight_ptr, bias_ptr,
    to_x_ptr, to_y_ptr, to_gate_ptr, to_shift_ptr, to_scale_ptr,
    part_ptr,  # [B, F, P, 3, C], if KEPT
    L, EACH, C, F, P,
    ob, on, pb, pn, xb, xn, yb, yn, gb, gf, sb, sf,
    ADDS: tl.constexpr, GATED: tl.constexpr, TANH: tl.constexpr, NORM: tl.constexpr,
    SCALES: tl.constexpr, WEIGHTS: tl.constexpr, BIASED: tl.constexpr,
    TO_X: tl.constexpr, TO_Y: tl.constexpr, TO_GATE: tl.constexpr, TO_SHIFT: tl.constexpr,
    TO_SCALE: tl.constexpr, AFFINE: tl.constexpr, KEPT: tl.constexpr, DIRECT: tl.constexpr,
    FACTOR: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = rstd_ptr.dtype.element_ty
    C = multiple(C, FACTOR)
    place = tl.program_id(0).to(tl.int64)
    o_c = place % (WIDTH // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [1, BD]
    m_c = o_c < C
    place = place // (WIDTH // BLOCK_D)
    part = place % P
    frame = place // P % F
    b = place // P // F
    b_above_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    b_normed_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    b_gated_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    s_row = b * multiple(sb, FACTOR) + frame * multiple(sf, FACTOR)
    if TO_Y:
        g_row = b * multiple(gb, FACTOR) + frame * multiple(gf, FACTOR)
        b_gate = _gate(gate_ptr, g_row + o_c, m_c, dtype, TANH)
    for first in tl.range(0, PART, BLOCK_N, num_stages=STAGES):
        o_t = part * PART + first + tl.arange(0, BLOCK_N)[:, None]  # [BN, 1], in the frame
        m_n = o_t < EACH
        m = m_n & m_c
        token = frame * EACH + o_t
        row = b * L + token
        b_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        if NORM != _NONE:
            b_mean = load_used(mean_ptr, row, m_n, NORM == _LAYER, dtype)
            b_rstd = tl.load(rstd_ptr + row, mask=m_n, other=0.0)
            p_row = b * multiple(pb, FACTOR) + token * multiple(pn, FACTOR)
            x_row = b * multiple(xb, FACTOR) + token * multiple(xn, FACTOR)
            b_above, b_grad = _passed(
                passed_ptr, p_row + o_c, scale_ptr, s_row, weight_ptr, o_c, m, C, dtype,
                SCALES, WEIGHTS,
            )  # fmt: skip
            b_normed = _normed(x_ptr, x_row + o_c, b_mean, b_rstd, m, dtype)
            b_above_sum += b_above
            b_normed_sum += b_above * b_normed
            if TO_X or TO_Y or TO_GATE:
                if WIDTH == BLOCK_D:
                    b_level = sum_columns(b_grad) / C
                    b_along = sum_columns(b_grad * b_normed) / C
                else:
                    b_level = tl.load(row_ptr + row * 2, mask=m_n, other=0.0)
                    b_along = tl.load(row_ptr + row * 2 + 1, mask=m_n, other=0.0)
                if NORM == _LAYER:
                    b_grad -= b_level
                b_grad = (b_grad - b_along * b_normed) * b_rstd
        if ADDS:
            o_row = b * multiple(ob, FACTOR) + token * multiple(on, FACTOR)
            b_grad += tl.load(own_ptr + o_row + o_c, mask=m, other=0.0).to(dtype)
        if TO_X:
            b_x = rounded(b_grad, to_x_ptr.dtype.element_ty)
            tl.store(to_x_ptr + row * C + o_c, b_x, mask=m)
        if TO_Y:
            b_y = rounded(b_grad * b_gate, to_y_ptr.dtype.element_ty)
            tl.store(to_y_ptr + row * C + o_c, b_y, mask=m)
        if TO_GATE:
            y_row = b * multiple(yb, FACTOR) + token * multiple(yn, FACTOR)
            b_y = tl.load(y_ptr + y_row + o_c, mask=m, other=0.0).to(dtype)
            b_gated_sum += tl.where(m, b_grad * b_y, 0.0)
    if KEPT or DIRECT:
        b_above_sum = sum_rows(b_above_sum)
        b_normed_sum = sum_rows(b_normed_sum)
        b_gated_sum = sum_rows(b_gated_sum)
    if DIRECT:
        _finish(
            b_above_sum, b_normed_sum, b_gated_sum, frame, b, o_c, C, F, gate_ptr, scale_ptr,
            weight_ptr, bias_ptr, gb, gf, sb, sf, to_gate_ptr, to_shift_ptr, to_scale_ptr,
            TANH, WEIGHTS, BIASED, TO_GATE, TO_SHIFT, TO_SCALE,
        )  # fmt: skip
        if AFFINE and SCALES:
            b_one = 1.0 + tl.load(scale_ptr + s_row + o_c, mask=m_c, other=0.0).to(dtype)
            b_above_sum *= b_one
            b_normed_sum *= b_one
    if KEPT:
        p_part = part_ptr + place * 3 * C + o_c
        tl.store(p_part, b_above_sum, mask=m_c)
        tl.store(p_part + C, b_normed_sum, mask=m_c)
        tl.store(p_part + 2 * C, b_gated_sum, mask=m_c)


@triton.jit(do_not_specialize=["C", "F", "P", "gb", "gf", "sb", "sf"])
def modulation_frame_sums_kernel(
    part_ptr,  # [B, F, P, 3, C]; if AFFINE, the first part becomes the terms of weight and bias
    gate_ptr, scale_ptr, weight_ptr, bias_ptr,
    to_gate_ptr, to_shift_ptr, to_scale_ptr,
    C, F, P,
    gb, gf, sb, sf,
    TANH: tl.constexpr, SCALES: tl.constexpr, WEIGHTS: tl.constexpr, BIASED: tl.constexpr,
    TO_GATE: tl.constexpr, TO_SHIFT: tl.constexpr, TO_SCALE: tl.constexpr, AFFINE: tl.constexpr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    C = multiple(C, FACTOR)
    place = tl.program_id(0).to(tl.int64)
    o_c = place % tl.cdiv(C, BLOCK) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_c = o_c < C
    place = place // tl.cdiv(C, BLOCK)
    frame = place % F
    b = place // F
    p_first = part_ptr + place * P * 3 * C + o_c
    b_above = tl.zeros([1, BLOCK], tl.float64)
    b_normed = tl.zeros([1, BLOCK], tl.float64)
    b_gated = tl.zeros([1, BLOCK], tl.float64)
    p_part = p_first
    for _ in range(0, P):
        b_above += tl.load(p_part, mask=m_c, other=0.0)
        b_normed += tl.load(p_part + C, mask=m_c, other=0.0)
        b_gated += tl.load(p_part + 2 * C, mask=m_c, other=0.0)
        p_part += 3 * C
    b_above = b_above.to(part_ptr.dtype.element_ty)
    b_normed = b_normed.to(part_ptr.dtype.element_ty)
    _finish(
        b_above, b_normed, b_gated.to(part_ptr.dtype.element_ty), frame, b, o_c, C, F, gate_ptr,
        scale_ptr, weight_ptr, bias_ptr, gb, gf, sb, sf, to_gate_ptr, to_shift_ptr, to_scale_ptr,
        TANH, WEIGHTS, BIASED, TO_GATE, TO_SHIFT, TO_SCALE,
    )  # fmt: skip
    if AFFINE:
        if SCALES:
            p_scale = scale_ptr + b * sb + frame * sf + o_c
            b_one = 1.0 + tl.load(p_scale, mask=m_c, other=0.0).to(part_ptr.dtype.element_ty)
            b_above *= b_one
            b_normed *= b_one
        tl.store(p_first, b_above, mask=m_c)
        tl.store(p_first + C, b_normed, mask=m_c)


@triton.jit(do_not_specialize=["C", "frames", "P"])
def modulation_affine_kernel(
    part_ptr,  # [frames, P, 3, C], of which the first part counts
    to_weight_ptr, to_bias_ptr,  # [C]
    C, frames, P,
    TO_WEIGHT: tl.constexpr, TO_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_c = o_c < C
    b_above = tl.zeros([BLOCK_N, BLOCK], tl.float64)
    b_normed = tl.zeros([BLOCK_N, BLOCK], tl.float64)
    for first in range(0, frames, BLOCK_N):
        o_f = first + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        m = (o_f < frames) & m_c
        p_part = part_ptr + o_f * P * 3 * C + o_c
        b_above += tl.load(p_part, mask=m, other=0.0)
        b_normed += tl.load(p_part + C, mask=m, other=0.0)
    if TO_WEIGHT:
        b_sum = rounded(sum_rows(b_normed), to_weight_ptr.dtype.element_ty)
        tl.store(to_weight_ptr + o_c, b_sum, mask=m_c)
    if TO_BIAS:
        b_sum = rounded(sum_rows(b_above), to_bias_ptr.dtype.element_ty)
        tl.store(to_bias_ptr + o_c, b_sum, mask=m_c)


class _Views:
    """Tensors whose channels lie one after another, or a stand-in; their strides."""

    def __init__(self, stand_in: Tensor) -> None:
        self._stand_in = stand_in
        self._strides: list[int] = [stand_in.shape[2]]

    def __call__(self, tensor: Tensor | None) -> tuple[Tensor, int, int]:
        """With the strides of samples and of tokens or frames."""
        if tensor is None:
            return self._stand_in, 0, 0
        tensor = lying_together(tensor, tensor.dim() - 1)
        if tensor.dim() != 3:
            return tensor, 0, 0
        strides = tensor.stride(0), tensor.stride(1)
        self._strides += strides
        return tensor, *strides

    def factor(self) -> int:
        """Of which all strides are multiples."""
        return common_multiple(*self._strides)


def _threads(sizes: dict[str, int], x: Tensor, each: int, registers: int) -> dict[str, int]:
    """Launch options for ``each`` numbers of a row in a thread; more registers for float64."""
    threads = 128 * max(1, min(sizes["BLOCK_D"] // each // 128, 4))
    return num_threads(threads) | at_most(255 if x.dtype == torch.float64 else registers)


def _stages(x: Tensor, sizes: dict[str, int], most: int) -> int:
    """Of a loop whose rows are copied to shared memory ahead of their time, as many as there is
    room for; 1: they are not."""
    if not pipelined() or x.element_size() > 4:
        return 1
    _, arch, shared = device_limits(triton.runtime.driver.active.get_current_device())
    tensors = 4 * sizes["BLOCK_N"] * sizes["BLOCK_D"] * x.element_size()
    # Elsewhere the addresses of more are spilled.
    most = most if arch == 90 else 2 if sizes["BLOCK_D"] < _WIDEST else 1
    return max(1, min(most, shared // tensors))


def forward(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str | None,
    tanh: bool,
    residual: Tensor | None,
    out: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Fills residual (where there is y) and out, mean, rstd (where there is a norm)."""
    batch, length, channels = x.shape
    if x.numel() == 0:
        return
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    views = _Views(x)
    given = [views(t) for t in (x, y, gate, shift, scale)]
    frames = next((t.shape[1] for t in (gate, shift, scale) if t is not None), 1)
    stand_in = x.new_empty(0, dtype=wide)
    sizes = row_sizes(channels, _TILE, _WIDEST)
    sizes["BLOCK_N"] = max(1, sizes["BLOCK_N"])
    tiles = ceil_div(batch * length, sizes["BLOCK_N"])
    stages, registers = 1, 128
    if sizes["WIDTH"] == sizes["BLOCK_D"]:
        stages = _stages(x, sizes, 2)
    if stages > 1:
        registers = 64 if sizes["BLOCK_D"] > 1024 else 96
    options = _threads(sizes, x, 8, registers)
    if stages > 1:
        # As many programs as there is room for, with so many registers each.
        room = 65536 // (32 * options["num_warps"] * registers)
        tiles = min(tiles, num_programs(x.device, room))
    launch(gated_residual_modulate_kernel, (tiles,),
        *(t for t, *_ in given), views(weight)[0], views(bias)[0],
        x if residual is None else residual, x if out is None else out,
        stand_in if mean is None else mean, stand_in if rstd is None else rstd,
        batch * length, length, length // frames, channels,
        *(stride for _, *strides in given for stride in strides),
        EPS=eps, ADDS=y is not None, GATED=gate is not None, TANH=tanh, NORM=NORMS[norm],
        SHIFTS=shift is not None, SCALES=scale is not None, WEIGHTS=weight is not None,
        BIASED=bias is not None, FACTOR=views.factor(), STAGES=stages, **sizes, **options,
    )  # fmt: skip


def backward(
    own: Tensor | None,
    passed: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    gate: Tensor | None,
    y: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    frames: int,
    norm: str | None,
    tanh: bool,
    outputs: dict[str, Tensor],
) -> None:
    """Fills the gradients ``outputs``, by the names of what they are of.

    Args:
        own: gradient of x itself.
        passed: gradient of the modulated.
        x: what was normalised, or anything of its shape where there is no ``norm``.
    """
    batch, length, channels = x.shape
    norm = norm if passed is not None else None
    needs = {f"TO_{name.upper()}": name in outputs for name in ("x", "y", "gate", "shift", "scale")}
    affine = "weight" in outputs or "bias" in outputs
    if x.numel() == 0:
        for output in outputs.values():
            output.zero_()
        return
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    views = _Views(x)
    given = {
        name: views(t)
        for name, t in (
            ("own", own), ("passed", passed), ("x", x), ("y", y), ("gate", gate), ("scale", scale)
        )
    }  # fmt: skip
    weights, biases = views(weight)[0], views(bias)[0]
    each = length // frames
    parts = ceil_div(each, _PART)
    direct = parts == 1
    modulated = needs["TO_GATE"] or needs["TO_SHIFT"] or needs["TO_SCALE"]
    kept = affine or (modulated and not direct)
    part = x.new_empty((batch, frames, parts, 3, channels) if kept else 0, dtype=wide)
    sizes = row_sizes(channels, _TILE, _WIDEST)
    sizes["BLOCK_N"] = min(max(1, sizes["BLOCK_N"]), _PART)
    factor = views.factor()
    stand_in = x.new_empty(0, dtype=wide)
    means = stand_in if mean is None else mean.contiguous()
    rstds = stand_in if rstd is None else rstd.contiguous()
    has = {"SCALES": scale is not None, "WEIGHTS": weight is not None}
    row = stand_in

    def of(*names: str) -> tuple[int, ...]:
        return tuple(stride for name in names for stride in given[name][1:])

    if norm is not None and sizes["WIDTH"] > sizes["BLOCK_D"]:
        row = x.new_empty(batch, length, 2, dtype=wide)
        launch(modulation_row_sums_kernel, (ceil_div(batch * length, sizes["BLOCK_N"]),),
            given["passed"][0], given["x"][0], means, rstds, given["scale"][0], weights, row,
            batch * length, length, each, channels, *of("passed", "x", "scale"),
            NORM=NORMS[norm], **has, FACTOR=factor, **sizes, **_threads(sizes, x, 8, 128),
        )  # fmt: skip
    to = [outputs.get(name, x) for name in ("x", "y", "gate", "shift", "scale")]
    grid = (batch * frames * parts * (sizes["WIDTH"] // sizes["BLOCK_D"]),)
    launch(gated_residual_modulate_bwd_kernel, grid,
        *(given[name][0] for name in ("own", "passed", "x", "y")), means, rstds, row,
        given["gate"][0], given["scale"][0], weights, biases, *to, part,
        length, each, channels, frames, parts,
        *of("own", "passed", "x", "y", "gate", "scale"),
        ADDS=own is not None, GATED=gate is not None, TANH=tanh, NORM=NORMS[norm], **has,
        BIASED=bias is not None, **needs, AFFINE=affine, KEPT=kept,
        DIRECT=direct and modulated, FACTOR=factor, PART=_PART, STAGES=_stages(x, sizes, 3),
        **sizes, **_threads(
            sizes, x, 4 if x.dtype == torch.float32 else 8, 128 if sizes["BLOCK_D"] > 1024 else 168
        ),
    )  # fmt: skip
    if kept and not direct:
        blocks = ceil_div(channels, _COLUMNS)
        launch(modulation_frame_sums_kernel, (batch * frames * blocks,),
            part, given["gate"][0], given["scale"][0], weights, biases, *to[2:],
            channels, frames, parts, *of("gate", "scale"),
            TANH=tanh, **has, BIASED=bias is not None,
            **{name: needs[name] for name in ("TO_GATE", "TO_SHIFT", "TO_SCALE")}, AFFINE=affine,
            FACTOR=factor, BLOCK=_COLUMNS, **num_threads(64),
        )  # fmt: skip
    if affine:
        launch(modulation_affine_kernel, (ceil_div(channels, _COLUMNS),),
            part, outputs.get("weight", x), outputs.get("bias", x), channels, batch * frames, parts,
            TO_WEIGHT="weight" in outputs, TO_BIAS="bias" in outputs,
            BLOCK_N=_FRAMES, BLOCK=_COLUMNS, **num_threads(128),
        )  # fmt: skip


def gated_residual_modulate(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend ``triton`` of ``mmfast::gated_residual_modulate``."""
    from mmfast.ops.gated_residual_modulate import fake

    arguments = (x, gate, y, shift, scale, weight, bias, eps, norm)
    outputs = fake(*arguments, gate_activation)
    forward(*arguments, gate_activation == "tanh", *outputs)
    return outputs


def gated_residual_modulate_bwd(
    grad_residual: Tensor | None,
    grad_modulated: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    gate_activation: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    """Backend ``triton`` of ``mmfast::gated_residual_modulate_bwd``."""
    from mmfast.ops.gated_residual_modulate import GRADIENTS, fake_bwd
    from mmfast.ops.modulation import frames_of

    outputs = fake_bwd(
        grad_residual, grad_modulated, residual, mean, rstd, gate, y, shift, scale, weight, bias,
        norm, gate_activation, *needs,
    )  # fmt: skip
    backward(
        grad_residual, grad_modulated, residual, mean, rstd, gate, y, scale, weight, bias,
        frames_of(gate, shift, scale), norm, gate_activation == "tanh",
        needed(GRADIENTS, outputs, needs),
    )  # fmt: skip
    return outputs


def needed(
    names: tuple[str, ...], outputs: tuple[Tensor, ...], needs: tuple[bool, ...]
) -> dict[str, Tensor]:
    """The outputs that are needed, by name."""
    return {name: t for name, t, need in zip(names, outputs, needs, strict=True) if need}


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(
        channels: int, dtype: torch.dtype, length: int, frames: int, affine: bool, quick: bool
    ) -> Variant:
        def launch(n: int, _: int) -> None:
            x = torch.ones(n, length, channels, dtype=dtype)
            gate, shift, scale = torch.ones(n, frames, 6 * channels).chunk(6, -1)[2:5]
            weight = torch.ones(channels) if affine else None
            arguments = (gate, shift, scale, weight, weight)
            outputs = gated_residual_modulate(
                x, gate, x, shift, scale, weight, weight, 1e-6, "layer", "tanh"
            )
            _, _, mean, rstd = outputs
            gated_residual_modulate_bwd(
                x, x, x, mean, rstd, gate, x, *arguments[1:], "layer", "tanh",
                True, True, True, True, True, affine, affine,
            )  # fmt: skip

        name = f"C {channels}, {dtype}, F {frames} of {length}{', affine' * affine}"
        wide = [
            ("gated_residual_modulate_kernel", "b_x = tl.load(x_ptr + x_places"),
            ("gated_residual_modulate_bwd_kernel", "b_above = tl.load(passed_ptr + places"),
            ("gated_residual_modulate_bwd_kernel", "tl.load(own_ptr + o_row"),
        ]
        return Variant(
            f"gated_residual_modulate: {name}".replace("torch.", ""),
            launch,
            wide=tuple(wide),
            quick=quick,
        )

    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [
        variant(channels, dtype, 64, frames, affine, quick)
        for channels, dtype, frames, affine, quick in (
            (1152, torch.float32, 1, False, True),
            (1152, torch.bfloat16, 1, False, True),
            (72, torch.bfloat16, 4, True, False),
            (3072, torch.bfloat16, 1, False, False),
            (3072, torch.float32, 1, False, False),
            (5120, torch.bfloat16, 64, True, False),
            (16384, torch.bfloat16, 1, True, False),
            *((1536, dtype, 64, False, False) for dtype in floats),
        )
    ]
