"""Lookup-free quantisation in Triton, and its gradient.

Forward:

1. ``lookup_free_quantize_kernel``: signs, indices, and a block's squared errors and entropies.
   Vectors are taken as they lie in memory, by loads of 128 bits whatever their number of bits.
2. ``lookup_free_quantize_means_kernel``: sums of the distributions of each group's bits, over
   slices of the vectors, as matrix products of those of its upper and its lower bits.
3. ``lookup_free_quantize_finish_kernel``: the blocks' and the slices' sums become the losses.

Backward:

1. ``lookup_free_quantize_norm_kernel``, if spherical.
2. ``lookup_free_quantize_group_gradient_kernel``: what the means' gradients say of the logits, by
   the same products with a table of gradients.
3. ``lookup_free_quantize_gradient_kernel``: the rest, in one pass over the vectors.

Sums over vectors are float64 after at most 1024 of them, in an order that depends on shapes alone;
there are no atomics, and nothing is read back to the host. Products are sums of three of TF32 where
the device has those, which keeps float32's precision.

Workspace: 16 bytes per block of vectors, and a number per vector if spherical; at most 4 MiB, or a
float64 table, of sums; backward, with gradients of the means, a gradient of z in float32 (float64
if z is) and two such tables.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import (
    at_most,
    device_limits,
    interpreting,
    load_numbers,
    narrow_sizes,
    num_threads,
    store_numbers,
    sum_columns,
    sum_rows,
    to_numbers,
    to_rows,
)

# These decide the order of the sums, and with it the last bits.
_SLICE = 2048  # vectors, where that many sums fit the workspace
_SUMS = 1 << 19
_FLUSH = tl.constexpr(1024)
_FINISH = 256
_LEAST_NORM = tl.constexpr(1e-12)


@triton.jit
def _bounded(logit):
    """What exp can tell from infinity; NaN stays."""
    MOST: tl.constexpr = 700.0 if logit.dtype == tl.float64 else 100.0
    return tl.where(logit > MOST, MOST, tl.where(logit < -MOST, -MOST, logit))


@triton.jit
def _log_one_plus(b_e):
    """log(1 + e), e from 0 to 1: twice the area tangent of e / (2 + e), at most a third."""
    TERMS: tl.constexpr = 17 if b_e.dtype == tl.float64 else 8
    s = b_e / (b_e + 2)
    q = s * s
    series = tl.full(q.shape, 1.0 / (2 * TERMS + 1), q.dtype)
    for i in tl.static_range(TERMS):
        series = series * q + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return 2 * s * series


@triton.jit
def _probabilities(logit):
    """Of one and of zero; both are right where they are small."""
    b_e = tl.exp(-tl.abs(logit))
    large = 1 / (1 + b_e)
    small = b_e * large
    return tl.where(logit > 0, large, small), tl.where(logit > 0, small, large)


@triton.jit
def _norm(b_x):
    """Of rows [BN, BD], as [BN, 1] float64."""
    b_x = b_x.to(tl.float64)
    return tl.sqrt(sum_columns(b_x * b_x))


@triton.jit
def _at_least(norm):
    """The norm that divides; NaN stays."""
    return tl.where(norm < _LEAST_NORM, _LEAST_NORM, norm)


@triton.jit(do_not_specialize=["N", "stride_zn", "stride_mn"])
def lookup_free_quantize_kernel(
    z_ptr,
    mask_ptr,  # if MASKED
    quantized_ptr,  # [N, C, B]
    index_ptr,  # [N, C] int64
    factor_ptr,  # [N, C], scale by the norms, if LOSSES and SPHERICAL
    part_ptr,  # [blocks, 2] float64, sums of squares and entropies, if LOSSES
    N,
    magnitude: tl.float64,
    scale: tl.float64,
    to_logit: tl.float64,
    stride_zn,
    stride_zd,
    stride_mn,
    C: tl.constexpr,
    B: tl.constexpr,
    FLAT: tl.constexpr,
    LOSSES: tl.constexpr,
    SPHERICAL: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCK: tl.constexpr = BLOCK_N * BLOCK_D
    COUNT: tl.constexpr = BLOCK_N * B
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK_N
    total = N.to(tl.int64) * (C * B)
    b_z = load_numbers(
        z_ptr, first * B, total, stride_zn, stride_zd, dtype, C * B, FLAT, COUNT, BLOCK
    )  # fmt: skip
    up = tl.full([], magnitude, tl.float64).to(dtype)
    store_numbers(quantized_ptr, first * B, total, tl.where(b_z > 0, up, -up), COUNT, BLOCK)
    b_z = to_rows(b_z, B, BLOCK_N, BLOCK_D)
    vectors = first + tl.arange(0, BLOCK_N)  # N C of them
    columns = tl.arange(0, BLOCK_D)[None, :]
    m_n = vectors < N.to(tl.int64) * C
    m_d = columns < B
    b_bit = ((b_z > 0) & m_d).to(tl.int64 if B > 31 else tl.int32)
    b_bit = b_bit << tl.maximum(B - 1 - columns, 0)
    tl.store(index_ptr + vectors, tl.sum(b_bit, 1).to(tl.int64), mask=m_n)
    if LOSSES:
        inside = m_n
        if MASKED:
            p_mask = mask_ptr + vectors // C * stride_mn
            inside = tl.load(p_mask, mask=m_n, other=0).to(tl.int1)
        inside = inside[:, None] & m_d
        b_x = b_z
        if SPHERICAL:
            factor = (scale / _at_least(_norm(tl.where(m_d, b_z, 0.0)))).to(dtype)
            tl.store(factor_ptr + vectors[:, None], factor, mask=m_n[:, None])
            b_x *= factor
        b_difference = b_x - tl.where(b_z > 0, up, -up)
        logit = _bounded(b_x * tl.full([], to_logit, tl.float64).to(dtype))
        size = tl.abs(logit)
        b_e = tl.exp(-size)
        b_entropy = _log_one_plus(b_e) + size * b_e / (1 + b_e)
        square = sum_columns(tl.where(inside, b_difference * b_difference, 0.0)).to(tl.float64)
        entropy = sum_columns(tl.where(inside, b_entropy, 0.0)).to(tl.float64)
        tl.store(part_ptr + block * 2, tl.sum(sum_rows(square)))
        tl.store(part_ptr + block * 2 + 1, tl.sum(sum_rows(entropy)))


@triton.jit
def _outcomes(p_z, m_z, factor, to_logit, codes, stride_zd, bits, SPHERICAL: tl.constexpr):
    """Probability of each of the ``codes`` of independent bits, whose numbers start at p_z.

    Shapes of vectors and of codes are to be broadcast to that of the result. ``bits`` is not known
    when compiling: a loop that is unrolled keeps more than the registers hold.
    """
    b_all = tl.zeros((m_z & (codes >= 0)).shape, to_logit.dtype) + 1
    for i in range(bits):
        b_x = tl.load(p_z + i * stride_zd, mask=m_z, other=0.0).to(to_logit.dtype)
        if SPHERICAL:
            b_x *= factor
        one, zero = _probabilities(b_x * to_logit)
        b_all *= tl.where((codes >> (bits - 1 - i) & 1) == 1, one, zero)
    return b_all


@triton.jit(do_not_specialize=["N", "stride_zn"])
def lookup_free_quantize_norm_kernel(
    z_ptr,
    factor_ptr,  # [N, C]
    N,
    scale: tl.float64,
    stride_zn,
    stride_zd,
    C: tl.constexpr,
    B: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    b_z = load_numbers(
        z_ptr, first * B, N.to(tl.int64) * (C * B), stride_zn, stride_zd,
        factor_ptr.dtype.element_ty, C * B, FLAT, BLOCK_N * B, BLOCK_N * BLOCK_D,
    )  # fmt: skip
    b_z = to_rows(b_z, B, BLOCK_N, BLOCK_D)
    b_z = tl.where(tl.arange(0, BLOCK_D)[None, :] < B, b_z, 0.0)
    factor = (scale / _at_least(_norm(b_z))).to(factor_ptr.dtype.element_ty)
    vectors = first + tl.arange(0, BLOCK_N)[:, None]
    tl.store(factor_ptr + vectors, factor, mask=vectors < N.to(tl.int64) * C)


@triton.jit
def _add_product(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a @ b_b."""
    if b_sum.dtype == tl.float64:
        # Triton 3.7 compiles tl.dot of float64 for some shapes and devices only.
        return b_sum + tl.sum(b_a[:, :, None] * b_b[None, :, :], 1)
    else:
        return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)


@triton.jit(do_not_specialize=["N", "slice_rows", "upper", "lower", "stride_zn", "stride_mn"])
def lookup_free_quantize_means_kernel(
    z_ptr,
    mask_ptr,  # if MASKED
    factor_ptr,  # [N, C], if SPHERICAL
    sum_ptr,  # [slices, C G, 2^g] float64
    N,
    slice_rows,
    upper,  # bits
    lower,
    to_logit: tl.float64,
    stride_zn,
    stride_zd,
    stride_mn,
    C: tl.constexpr,
    B: tl.constexpr,
    GROUP: tl.constexpr,
    SPHERICAL: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    UPPER: tl.constexpr = GROUP // 2
    LOWER: tl.constexpr = GROUP - UPPER
    TILES: tl.constexpr = ((1 << LOWER) + BLOCK_V - 1) // BLOCK_V
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    tile = tl.program_id(0)
    group = tl.program_id(1)
    begin = tl.program_id(2).to(tl.int64) * slice_rows
    end = tl.minimum(begin + slice_rows, N)
    codes_u = tile // TILES * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]  # [BU, 1]
    codes_v = tile % TILES * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]  # [1, BV]
    p_group = z_ptr + (group * GROUP).to(tl.int64) * stride_zd
    to_logit = tl.full([], to_logit, tl.float64).to(dtype)
    b_total = tl.zeros([BLOCK_U, BLOCK_V], tl.float64)
    for flushed in range(begin, end, _FLUSH):
        b_sum = tl.zeros([BLOCK_U, BLOCK_V], dtype)
        for row in range(flushed, tl.minimum(flushed + _FLUSH, end), BLOCK_N):
            rows = row + tl.arange(0, BLOCK_N)
            m_n = rows < end
            if MASKED:
                m_n &= tl.load(mask_ptr + rows * stride_mn, mask=m_n, other=0).to(tl.int1)
            factor = tl.full([BLOCK_N], 1.0, dtype)
            if SPHERICAL:
                factor = tl.load(factor_ptr + rows * C + group * GROUP // B, mask=m_n, other=0.0)
            p_u = p_group + rows[None, :] * stride_zn
            p_v = p_group + rows[:, None] * stride_zn + UPPER * stride_zd
            m_u = m_n[None, :]
            b_u = _outcomes(
                p_u, m_u, factor[None, :], to_logit, codes_u, stride_zd, upper, SPHERICAL
            )  # fmt: skip
            b_u = tl.where(m_u, b_u, 0.0)  # [BU, BN]
            b_v = _outcomes(
                p_v, m_n[:, None], factor[:, None], to_logit, codes_v, stride_zd, lower, SPHERICAL
            )  # fmt: skip
            b_sum = _add_product(b_u, b_v, b_sum, PRECISION)
        b_total += b_sum.to(tl.float64)
    place = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + group) << GROUP
    p_sum = sum_ptr + place + (codes_u << LOWER) + codes_v
    tl.store(p_sum, b_total, mask=(codes_u < (1 << UPPER)) & (codes_v < (1 << LOWER)))


@triton.jit(do_not_specialize=["N", "blocks", "slices", "cells"])
def lookup_free_quantize_finish_kernel(
    part_ptr,  # [blocks, 2]
    sum_ptr,  # [slices, cells]
    total_ptr,  # of vectors inside, if MASKED
    commitment_ptr,
    entropy_ptr,
    mean_ptr,  # [cells]
    N,
    blocks,
    slices,
    cells,
    C: tl.constexpr,
    B: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inside = tl.load(total_ptr).to(tl.float64) if MASKED else N.to(tl.float64)
    inside = tl.maximum(inside, 1.0)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_k = places < cells
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i in range(0, slices):
        b_sum += tl.load(sum_ptr + i * cells.to(tl.int64) + places, mask=m_k, other=0.0)
    tl.store(mean_ptr + places, (b_sum / inside).to(mean_ptr.dtype.element_ty), mask=m_k)
    if tl.program_id(0) == 0:
        b_square = tl.zeros([BLOCK, 1], tl.float64)
        b_entropy = tl.zeros([BLOCK, 1], tl.float64)
        for i in range(0, blocks, BLOCK):
            o_part = i + tl.arange(0, BLOCK)[:, None]
            p_part = part_ptr + o_part.to(tl.int64) * 2
            b_square += tl.load(p_part, mask=o_part < blocks, other=0.0)
            b_entropy += tl.load(p_part + 1, mask=o_part < blocks, other=0.0)
        square = tl.sum(sum_rows(b_square)) / inside / (C * B)
        entropy = tl.sum(sum_rows(b_entropy)) / inside / C
        tl.store(commitment_ptr, square.to(commitment_ptr.dtype.element_ty))
        tl.store(entropy_ptr, entropy.to(entropy_ptr.dtype.element_ty))


@triton.jit
def _bit_columns(codes, BITS: tl.constexpr, dtype: tl.constexpr):
    """[BK, 16] of codes [BK, 1]: their bits, zeros, and a one in the last column."""
    columns = tl.arange(0, 16)[None, :]
    bits = codes >> tl.maximum(BITS - 1 - columns, 0) & 1
    return tl.where(columns < BITS, bits, tl.where(columns == 15, 1, 0)).to(dtype)


@triton.jit
def _store_bits(
    b_ones, p_z, p_result, m_n, factor, to_logit, stride_zd,
    BITS: tl.constexpr, SPHERICAL: tl.constexpr,
):  # fmt: skip
    """sum of u v (bit - p) from sums of u v bit and, in the last column, u v."""
    columns = tl.arange(0, 16)[None, :]
    mask = m_n & (columns < BITS)
    total = tl.sum(tl.where(columns == 15, b_ones, 0.0), 1)[:, None]
    b_x = tl.load(p_z + columns.to(tl.int64) * stride_zd, mask=mask, other=0.0).to(to_logit.dtype)
    if SPHERICAL:
        b_x *= factor
    one, _ = _probabilities(b_x * to_logit)
    tl.store(p_result + columns, b_ones - one * total, mask=mask)


@triton.jit(do_not_specialize=["N", "upper", "lower", "stride_zn"])
def lookup_free_quantize_group_gradient_kernel(
    z_ptr,
    factor_ptr,  # [N, C], if SPHERICAL
    table_ptr,  # [C G, 2^upper, 2^lower], gradients of the means
    result_ptr,  # [N, C B]
    N,
    upper,  # bits
    lower,
    to_logit: tl.float64,
    stride_zn,
    stride_zd,
    C: tl.constexpr,
    B: tl.constexpr,
    GROUP: tl.constexpr,
    SPHERICAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    UPPER: tl.constexpr = GROUP // 2
    LOWER: tl.constexpr = GROUP - UPPER
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    group = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = rows < N
    to_logit = tl.full([], to_logit, tl.float64).to(dtype)
    factor = tl.full([BLOCK_N], 1.0, dtype)
    if SPHERICAL:
        factor = tl.load(factor_ptr + rows * C + group * GROUP // B, mask=m_n, other=0.0)
    factor = factor[:, None]
    rows = rows[:, None]
    m_n = m_n[:, None]
    p_u = z_ptr + rows * stride_zn + (group * GROUP).to(tl.int64) * stride_zd
    p_v = p_u + UPPER * stride_zd
    p_result = result_ptr + rows * (C * B) + group * GROUP
    table_ptr += group.to(tl.int64) << GROUP
    o_u = tl.arange(0, BLOCK_U)
    o_v = tl.arange(0, BLOCK_V)
    if UPPER > 0:
        b_ones = tl.zeros([BLOCK_N, 16], dtype)
        for u in range(0, 1 << UPPER, BLOCK_U):
            b_along = tl.zeros([BLOCK_N, BLOCK_U], dtype)
            for v in range(0, 1 << LOWER, BLOCK_V):
                codes_u = u + o_u[None, :]
                codes_v = v + o_v[:, None]
                m_table = (codes_u < (1 << UPPER)) & (codes_v < (1 << LOWER))
                p_table = table_ptr + (codes_u << LOWER) + codes_v
                b_table = tl.load(p_table, mask=m_table, other=0.0)  # [BV, BU]
                b_v = _outcomes(
                    p_v, m_n, factor, to_logit, v + o_v[None, :], stride_zd, lower, SPHERICAL
                )  # fmt: skip
                b_along = _add_product(b_v, b_table, b_along, PRECISION)
            b_along *= _outcomes(
                p_u, m_n, factor, to_logit, u + o_u[None, :], stride_zd, upper, SPHERICAL
            )  # fmt: skip
            b_bits = _bit_columns(u + o_u[:, None], UPPER, dtype)
            b_ones = _add_product(b_along, b_bits, b_ones, PRECISION)
        _store_bits(b_ones, p_u, p_result, m_n, factor, to_logit, stride_zd, UPPER, SPHERICAL)
    b_ones = tl.zeros([BLOCK_N, 16], dtype)
    for v in range(0, 1 << LOWER, BLOCK_V):
        b_along = tl.zeros([BLOCK_N, BLOCK_V], dtype)
        for u in range(0, 1 << UPPER, BLOCK_U):
            codes_u = u + o_u[:, None]
            codes_v = v + o_v[None, :]
            m_table = (codes_u < (1 << UPPER)) & (codes_v < (1 << LOWER))
            p_table = table_ptr + (codes_u << LOWER) + codes_v
            b_table = tl.load(p_table, mask=m_table, other=0.0)  # [BU, BV]
            b_u = _outcomes(
                p_u, m_n, factor, to_logit, u + o_u[None, :], stride_zd, upper, SPHERICAL
            )  # fmt: skip
            b_along = _add_product(b_u, b_table, b_along, PRECISION)
        b_along *= _outcomes(
            p_v, m_n, factor, to_logit, v + o_v[None, :], stride_zd, lower, SPHERICAL
        )  # fmt: skip
        b_bits = _bit_columns(v + o_v[:, None], LOWER, dtype)
        b_ones = _add_product(b_along, b_bits, b_ones, PRECISION)
    _store_bits(b_ones, p_v, p_result + UPPER, m_n, factor, to_logit, stride_zd, LOWER, SPHERICAL)


@triton.jit(do_not_specialize=["N", "stride_gn", "stride_zn", "stride_mn"])
def lookup_free_quantize_gradient_kernel(
    grad_ptr,  # of the codes, if PASSED
    commitment_ptr,  # its gradient, if COMMITMENT
    entropy_ptr,  # likewise, if ENTROPY
    through_ptr,  # [N, C B] what comes by the means, if MEANS
    z_ptr,
    mask_ptr,  # if MASKED
    total_ptr,  # of vectors inside, if MASKED
    result_ptr,  # [N, C B]
    N,
    magnitude: tl.float64,
    scale: tl.float64,
    to_logit: tl.float64,
    stride_gn,
    stride_gd,
    stride_zn,
    stride_zd,
    stride_mn,
    C: tl.constexpr,
    B: tl.constexpr,
    PASSED: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    FLAT: tl.constexpr,
    COMMITMENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEANS: tl.constexpr,
    SPHERICAL: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCK: tl.constexpr = BLOCK_N * BLOCK_D
    COUNT: tl.constexpr = BLOCK_N * B
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    start = first * B
    total = N.to(tl.int64) * (C * B)
    b_z = load_numbers(z_ptr, start, total, stride_zn, stride_zd, dtype, C * B, FLAT, COUNT, BLOCK)
    b_x = b_z
    if SPHERICAL:
        m_d = tl.arange(0, BLOCK_D)[None, :] < B
        norm = _norm(tl.where(m_d, to_rows(b_z, B, BLOCK_N, BLOCK_D), 0.0))
        norm = to_numbers(tl.broadcast_to(norm, [BLOCK_N, BLOCK_D]), B, BLOCK_N, BLOCK_D)
        moving = norm > _LEAST_NORM
        norm = _at_least(norm)
        b_x *= (scale / norm).to(dtype)
    b_loss = tl.zeros([BLOCK], dtype)
    inside = tl.maximum(tl.load(total_ptr).to(tl.float64) if MASKED else N.to(tl.float64), 1.0)
    logit_scale = tl.full([], to_logit, tl.float64).to(dtype)
    if COMMITMENT:
        by = (tl.load(commitment_ptr).to(tl.float64) * 2 / inside / (C * B)).to(dtype)
        up = tl.full([], magnitude, tl.float64).to(dtype)
        b_loss += by * (b_x - tl.where(b_z > 0, up, -up))
    if ENTROPY:
        by = (tl.load(entropy_ptr).to(tl.float64) / inside / C * to_logit).to(dtype)
        logit = _bounded(b_x * logit_scale)
        b_e = tl.exp(-tl.abs(logit))
        b_loss -= by * logit * b_e / ((1 + b_e) * (1 + b_e))
    if MEANS:
        b_through = load_numbers(through_ptr, start, total, 0, 0, dtype, C * B, True, COUNT, BLOCK)
        b_loss += (to_logit / inside).to(dtype) * b_through
    if MASKED:
        vectors = first + tl.arange(0, BLOCK) // B
        m_n = vectors < N.to(tl.int64) * C
        b_mask = tl.load(mask_ptr + vectors // C * stride_mn, mask=m_n, other=0).to(tl.int1)
        b_loss = tl.where(b_mask, b_loss, 0.0)
    b_result = b_loss
    if PASSED:
        b_result += load_numbers(
            grad_ptr, start, total, stride_gn, stride_gd, dtype, C * B, GRAD_FLAT, COUNT, BLOCK
        )  # fmt: skip
    if SPHERICAL:
        # In float64: what is along the vector cancels.
        unit = b_z.to(tl.float64) / norm
        b_wide = b_result.to(tl.float64)
        along = tl.where(m_d, to_rows(unit * b_wide, B, BLOCK_N, BLOCK_D), 0.0)
        along = tl.broadcast_to(sum_columns(along), [BLOCK_N, BLOCK_D])
        along = to_numbers(along, B, BLOCK_N, BLOCK_D)
        b_wide = (b_wide - tl.where(moving, along * unit, 0.0)) * (scale / norm)
        store_numbers(result_ptr, start, total, b_wide, COUNT, BLOCK)
    else:
        store_numbers(result_ptr, start, total, b_result, COUNT, BLOCK)


def _product_sizes(group: int, wide: bool) -> dict[str, Any]:
    """Compile-time options of the kernels with products; functions of the arguments alone."""
    most = 16 if wide else 32
    block_u, block_v = (
        max(16, min(most, 1 << half)) for half in (group // 2, group - group // 2)
    )  # fmt: skip
    three = not wide and not interpreting() and _on_cuda()
    return {
        "GROUP": group,
        "BLOCK_N": 4 if wide else 32,
        "BLOCK_U": block_u,
        "BLOCK_V": block_v,
        "PRECISION": "tf32x3" if three else "ieee",
        # Columns of a tile are no copies for a pipeline to make ahead.
        "num_stages": 1,
        **num_threads(128),
    }


def _on_cuda() -> bool:
    backend, _, _ = device_limits(triton.runtime.driver.active.get_current_device())
    return backend == "cuda"


def _common(
    z: Tensor, num_codebooks: int, scale: float, spherical: bool, inv_temperature: float
) -> tuple[Tensor, float, float, dict[str, Any]]:
    """z as rows, the codes' entries, what makes logits, and what the kernels are compiled for."""
    rows = z.reshape(-1, z.shape[-1])  # [N, C B]
    bits = z.shape[-1] // num_codebooks
    magnitude = scale / bits**0.5 if spherical else scale
    options = {
        "C": num_codebooks,
        "B": bits,
        "SPHERICAL": spherical,
        "WIDE": z.dtype == torch.float64,
    }
    return rows, magnitude, 4 * inv_temperature * magnitude, options


def lookup_free_quantize(
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.lookup_free_quantize`` on checked arguments."""
    rows, magnitude, to_logit, options = _common(
        z, num_codebooks, scale, spherical, inv_temperature
    )
    bits, num_rows = options["B"], len(rows)
    dtype = torch.promote_types(z.dtype, torch.float32)
    quantized = z.new_empty(z.shape)
    indices = z.new_empty((*z.shape[:-1], num_codebooks), dtype=torch.int64)
    commitment, entropy = (z.new_zeros((), dtype=dtype) for _ in range(2))
    num_groups = bits // group_bits if group_bits else 0
    means = z.new_empty((num_codebooks, num_groups, 1 << group_bits), dtype=dtype)
    outputs = quantized, indices, commitment, entropy, means
    if num_rows == 0:
        means.zero_()
        return outputs
    # Without a mask any tensor, which is not read.
    inside = rows if mask is None else mask.reshape(-1)
    sizes = narrow_sizes(bits)
    blocks = triton.cdiv(num_rows * num_codebooks, sizes["BLOCK_N"])
    parts = z.new_empty((blocks, 2), dtype=torch.float64)
    factors = z.new_empty(indices.shape if spherical else (0,), dtype=dtype)
    masked = mask is not None
    lookup_free_quantize_kernel[(blocks,)](
        rows, inside, quantized, indices, factors, parts, num_rows, magnitude, scale, to_logit,
        *rows.stride(), inside.stride(0), FLAT=rows.is_contiguous(), LOSSES=group_bits > 0,
        MASKED=masked, **options, **sizes, **num_threads(128), **at_most(128),
    )  # fmt: skip
    if not group_bits:
        return outputs
    total = inside.sum() if masked else inside
    cells = means.numel()
    slices = max(1, min(triton.cdiv(num_rows, _SLICE), _SUMS // cells))
    slice_rows = triton.cdiv(triton.cdiv(num_rows, slices), 32) * 32
    sums = z.new_empty((slices, cells), dtype=torch.float64)
    products = _product_sizes(group_bits, options["WIDE"])
    upper, lower = group_bits // 2, group_bits - group_bits // 2
    tiles = triton.cdiv(1 << upper, products["BLOCK_U"]) * triton.cdiv(
        1 << lower, products["BLOCK_V"]
    )
    lookup_free_quantize_means_kernel[(tiles, num_codebooks * num_groups, slices)](
        rows, inside, factors, sums, num_rows, slice_rows, upper, lower, to_logit, *rows.stride(),
        inside.stride(0), MASKED=masked, **options, **products, **at_most(255),
    )  # fmt: skip
    lookup_free_quantize_finish_kernel[(triton.cdiv(cells, _FINISH),)](
        parts, sums, total, commitment, entropy, means, num_rows, blocks, slices, cells,
        C=num_codebooks, B=bits, MASKED=masked, BLOCK=_FINISH,
    )  # fmt: skip
    return outputs


def lookup_free_quantize_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    entropy: Tensor | None,
    means: Tensor | None,
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> Tensor:
    """``torch.ops.mmfast.lookup_free_quantize_bwd`` on checked arguments."""
    rows, magnitude, to_logit, options = _common(
        z, num_codebooks, scale, spherical, inv_temperature
    )
    bits, num_rows = options["B"], len(rows)
    result = z.new_empty(z.shape)
    if num_rows == 0:
        return result
    sizes = narrow_sizes(bits, 512 if spherical else 1024)
    blocks = (triton.cdiv(num_rows * num_codebooks, sizes["BLOCK_N"]),)
    losses = group_bits > 0
    through = rows  # any tensor in place of what is not there
    if losses and means is not None:
        # Probabilities sum to one: what the gradients have in common has no effect but rounding.
        wide = means.double()
        dtype = torch.promote_types(z.dtype, torch.float32)
        table = (wide - wide.mean(2, keepdim=True)).to(dtype).contiguous()
        through = z.new_empty(rows.shape, dtype=dtype)
        factors = z.new_empty((num_rows, num_codebooks if spherical else 0), dtype=dtype)
        if spherical:
            lookup_free_quantize_norm_kernel[blocks](
                rows, factors, num_rows, scale, *rows.stride(), C=num_codebooks, B=bits,
                FLAT=rows.is_contiguous(), **sizes, **num_threads(128), **at_most(128),
            )  # fmt: skip
        products = _product_sizes(group_bits, options["WIDE"])
        grid = triton.cdiv(num_rows, products["BLOCK_N"]), rows.shape[1] // group_bits
        lookup_free_quantize_group_gradient_kernel[grid](
            rows, factors, table, through, num_rows, group_bits // 2,
            group_bits - group_bits // 2, to_logit, *rows.stride(), **options,
            **products, **at_most(255),
        )  # fmt: skip
    masked = mask is not None
    inside = rows if mask is None else mask.reshape(-1)
    total = inside.sum() if masked else inside
    passed = rows if quantized is None else quantized.reshape(rows.shape)
    lookup_free_quantize_gradient_kernel[blocks](
        passed, rows if commitment is None else commitment, rows if entropy is None else entropy,
        through, rows, inside, total, result, num_rows, magnitude, scale, to_logit,
        *passed.stride(), *rows.stride(), inside.stride(0), PASSED=quantized is not None,
        GRAD_FLAT=passed.is_contiguous(), FLAT=rows.is_contiguous(),
        COMMITMENT=losses and commitment is not None, ENTROPY=losses and entropy is not None,
        MEANS=losses and means is not None, MASKED=masked, **options, **sizes,
        **num_threads(128), **at_most(128),
    )  # fmt: skip
    return result


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(
        bits: int, group: int, dtype: torch.dtype, spherical: bool, masked: bool, quick: bool
    ) -> Variant:
        def launch(n: int, k: int) -> None:
            z = torch.ones(n, bits, dtype=dtype)
            mask = torch.ones(n, dtype=torch.bool) if masked else None
            others = (1, 1.0, spherical, 100.0, group, mask)
            passed, _, *losses = lookup_free_quantize(z, *others)
            lookup_free_quantize_bwd(passed, *losses, z, *others)

        name = f"{dtype}{', spherical' * spherical}{', masked' * masked}, {bits} bits by {group}"
        return Variant(
            f"lookup_free_quantize: {name}".replace("torch.", ""),
            launch,
            wide=wide,
            matrix=frozenset(() if dtype == torch.float64 else matrix),
            quick=quick,
        )

    # The loads of whole tiles.
    text = "b_x = tl.load(ptr + o_e, mask=o_e < COUNT"
    wide = tuple((f"lookup_free_quantize{kind}_kernel", text) for kind in ("", "_gradient"))
    matrix = [f"lookup_free_quantize_{kind}_kernel" for kind in ("means", "group_gradient")]
    some = {(10, torch.float32, False), (18, torch.bfloat16, True)}
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return [
        variant(bits, group, t, s, s, (bits, t, s) in some)
        for bits, group in ((1, 1), (10, 10), (16, 16), (18, 9), (36, 18))
        for t in floats
        for s in (False, True)
    ]
