"""Exact nearest codes in Triton: tensor cores screen in float16, float64 settles what is close.

Scores are x.c - |c|^2 / 2 (euclidean) or x.c, with codes less their mean: larger is nearer. For
cosine the codes are normalised first; the norm of x changes no order.

1. ``nearest_code_pack_kernel``: the codes, scaled by a power of two and rounded to float16.
2. ``nearest_code_screen_kernel``: a block of rows, rounded likewise, meets tile after tile of
   codes. Each place of a tile keeps its best score, with the tile's number in the lowest bits, and
   its second best. Two scores further apart than twice the error bound (Cauchy-Schwarz on the
   measured rounding residuals, plus the accumulation's own rounding) cannot have swapped. Rows
   with several codes that close go onto a list with these codes, the others, for which nothing is
   known, onto one without.
3. ``nearest_code_exact_kernel``: the codes that are left to the listed rows, in float64, in the
   definition's order.
4. ``nearest_code_distance_kernel``: the metric at the result.

Workspace: 2 bytes per element of the codebook, padded, and 36 bytes per row; for cosine 4 bytes
more per element; above 256 dimensions 2 bytes per element of the rows at work. Nothing is read
back to the host.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import (
    at_most,
    device_limits,
    interpreting,
    multiple,
    num_programs,
    strides,
)
from mmfast.kernels.tuned import Problem, Tuned

METRICS = {"euclidean": 0, "cosine": 1, "dot": 2}
_MOST_ROWS = 2**31 - 2**10
_MOST_CODES = 2**24  # the number of a tile goes into the lowest bits of a score
_MOST_HEADS = 65535
# Rows of up to so many dimensions stay on the chip in float16; longer ones are walked in steps.
_WHOLE_D = 256
_STEP_D = 64
# Codes are padded to a multiple of this, the largest tile of the screening.
_TILE = tl.constexpr(128)
# A tile is folded onto so many places: 2 k and 2 k + 1 of each 64 codes share place k.
_PLACES = tl.constexpr(32)
# What is kept of a row with several codes: their number, and up to 7 of them.
_NEAR = tl.constexpr(8)
# Norm term of the codes that fill the last tile: no score is as low, and none overflows.
_PAD = tl.constexpr(2.0**86)
_MAX_RATIO = tl.constexpr(2.0**36)
# Below this, elements may be lost beside the largest where denormals are flushed.
_TINY = tl.constexpr(2.0**-100)
_LEAST_NORMAL = tl.constexpr(1.2e-38)


@triton.jit
def _bits(x):
    """Of |x|. In this order NaN comes last, and does not get lost in a maximum."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(largest):
    """The power of two that brings ``largest`` to between 2^14 and 2^15: no float16 overflows, and
    those that a device may flush to zero are too small to matter. At most 2^114."""
    exponent = tl.maximum(largest, _TINY).to(tl.int32, bitcast=True) & 0x7F800000
    return (0x7F000000 - (exponent - (14 << 23))).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(b_x, scale):
    """Scaled rows in float16, and the squared norms of the rows and of what rounding took."""
    b_x = b_x * scale
    b_half = b_x.to(tl.float16)
    b_error = b_x - b_half.to(tl.float32)
    return b_half, tl.sum(b_x * b_x, 1), tl.sum(b_error * b_error, 1)


@triton.jit
def _centred(p_x, p_mean, m_n, m_d, CENTRE: tl.constexpr, WIDE: tl.constexpr):
    """Rows less the mean, in float32 after one rounding of the difference."""
    mask = m_n & m_d
    b_x = tl.load(p_x, mask=mask, other=0.0)  # [BN, BD]
    b_x = b_x.to(tl.float64 if WIDE else tl.float32)
    if CENTRE:
        b_x = tl.where(mask, b_x - tl.load(p_mean, mask=m_d, other=0.0), 0.0)
    return b_x.to(tl.float32)


@triton.jit(do_not_specialize=["K"])
def nearest_code_pack_kernel(
    code_ptr,
    mean_ptr,  # [H, D]
    low_ptr,  # [H, D] least of each dimension
    high_ptr,  # [H, D] largest
    half_ptr,  # [H, padded K, PADDED_D] float16, scaled
    term_ptr,  # [H, padded K] |scaled code|^2 / 2, or 0
    stats_ptr,  # [H, 4] bits of: the scale; squares of largest norm, residual, norm with the mean
    K,
    D: tl.constexpr,
    stride_ch,
    stride_ck,
    stride_cd,
    EUCLIDEAN: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    mean_ptr += head * D
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    m_k = codes < K
    largest = tl.zeros([BLOCK_D], tl.int32)
    for d in range(0, D, BLOCK_D):
        m_d = d + o_d < D
        b_mean = tl.load(mean_ptr + d + o_d, mask=m_d, other=0.0)
        b_low = tl.load(low_ptr + head * D + d + o_d, mask=m_d, other=0.0)
        b_high = tl.load(high_ptr + head * D + d + o_d, mask=m_d, other=0.0)
        # Rounding is monotone: no centred code is larger than these.
        largest = tl.maximum(largest, _bits((b_low - b_mean).to(tl.float32)))
        largest = tl.maximum(largest, _bits((b_high - b_mean).to(tl.float32)))
    largest = tl.max(largest, 0).to(tl.float32, bitcast=True)
    scale = _scale(largest)
    square = tl.zeros([BLOCK_K], tl.float32)
    residual = tl.zeros([BLOCK_K], tl.float32)
    whole = tl.zeros([BLOCK_K], tl.float32)
    p_c = code_ptr + head * stride_ch + codes[:, None].to(tl.int64) * stride_ck
    rows = head * tl.num_programs(0) * BLOCK_K + codes  # [BK] int64
    for d in range(0, PADDED_D, BLOCK_D):
        m_d = (d + o_d < D)[None, :]
        p_d = p_c + (d + o_d)[None, :].to(tl.int64) * stride_cd
        b_c = _centred(p_d, mean_ptr + (d + o_d)[None, :], m_k[:, None], m_d, True, WIDE)
        b_half, b_square, b_residual = _rounded(b_c, scale)
        tl.store(half_ptr + rows[:, None] * PADDED_D + (d + o_d)[None, :], b_half)
        square += b_square
        residual += b_residual
        if not EUCLIDEAN:
            b_c = tl.load(p_d, mask=m_k[:, None] & m_d, other=0.0).to(tl.float32) * scale
            whole += tl.sum(b_c * b_c, 1)
    term = square * 0.5
    if not EUCLIDEAN:
        term = square * 0.0
    tl.store(term_ptr + rows, tl.where(m_k, term, _PAD))
    # Codes so close to each other are not for screening.
    square = tl.where(largest < _TINY, float("inf"), square)
    p_stats = stats_ptr + head * 4
    tl.store(p_stats, scale.to(tl.int32, bitcast=True))
    tl.atomic_max(p_stats + 1, tl.max(_bits(square), 0), sem="relaxed")
    tl.atomic_max(p_stats + 2, tl.max(_bits(residual), 0), sem="relaxed")
    tl.atomic_max(p_stats + 3, tl.max(_bits(whole), 0), sem="relaxed")


@triton.jit
def _items(p_count, mask):
    """Where those in ``mask`` go on a list. One atomic for all."""
    count = mask.to(tl.int32)
    first = tl.atomic_add(p_count, tl.sum(count, 0), sem="relaxed")
    return first + tl.cumsum(count, 0) - count


@triton.jit
def _split(b_score, PAIRS: tl.constexpr):
    """Columns of [A, 2 B]: the even and the odd ones, or the first and the second half. A thread
    has both of a pair; of columns half a tile apart, on most devices."""
    A: tl.constexpr = b_score.shape[0]
    B: tl.constexpr = b_score.shape[1] // 2
    if PAIRS:
        return tl.split(tl.reshape(b_score, [A, B, 2]))
    else:
        return tl.split(tl.permute(tl.reshape(b_score, [A, 2, B]), [0, 2, 1]))


@triton.jit
def _code(place, number):
    """The number-th code of a place."""
    return number // 2 * 64 + place * 2 + number % 2


@triton.jit
def _keep(best, second, b_score, number, low):
    """Best and second best so far and in b_score, whose lowest bits become ``number``."""
    b_bits = (b_score.to(tl.int32, bitcast=True) & ~low) | number
    b_score = b_bits.to(tl.float32, bitcast=True)
    return tl.maximum(best, b_score), tl.maximum(second, tl.minimum(best, b_score))


@triton.jit(do_not_specialize=["N", "K"])
def nearest_code_screen_kernel(
    x_ptr,
    mean_ptr,  # [H, D]
    code_ptr,  # [H, padded K, PADDED_D] float16
    term_ptr,  # [H, padded K]
    stats_ptr,  # [H, 4]
    half_ptr,  # [H, programs, BLOCK_N, PADDED_D] float16, if BLOCK_D < PADDED_D
    index_ptr,  # [H, N]
    list_ptr,  # [H, N] from the front, rows with several codes; from the back, with any
    near_ptr,  # [H, N, NEAR] these codes, in the order of the list
    count_ptr,  # [H, 4] lengths of the two parts
    N,
    K,
    D: tl.constexpr,
    stride_xh,
    stride_xn,
    stride_xd,
    EUCLIDEAN: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    padded = tl.cdiv(K, _TILE) * _TILE
    if PACKED:
        # Multiples of D at compile time, for the sake of wide loads.
        x_ptr += head * N * D
        stride_xn = D
    else:
        x_ptr += head * stride_xh
    mean_ptr += head * D
    code_ptr += head * padded * PADDED_D
    term_ptr += head * padded
    half_ptr += (head * tl.num_programs(0) + tl.program_id(0)) * (BLOCK_N * PADDED_D)
    list_ptr += head * N
    near_ptr += head * N * _NEAR
    count_ptr += head * 4
    p_stats = stats_ptr + head * 4
    code_scale = tl.load(p_stats).to(tl.float32, bitcast=True)
    max_code = tl.sqrt(tl.load(p_stats + 1).to(tl.float32, bitcast=True)) * 1.001
    max_residual = tl.sqrt(tl.load(p_stats + 2).to(tl.float32, bitcast=True)) * 1.001
    max_whole = tl.sqrt(tl.load(p_stats + 3).to(tl.float32, bitcast=True)) * 1.001
    max_residual += code_scale * _LEAST_NORMAL * D  # denormals
    max_term = max_code * max_code if EUCLIDEAN else 0.0
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_p = tl.arange(0, _PLACES)[None, :]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    # Persistent: the launch has as many programs as the device runs at once.
    for first in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        rows = first * BLOCK_N + o_n.to(tl.int64)  # [BN]
        m_n = rows < N
        p_x = x_ptr + rows[:, None] * stride_xn
        p_half = half_ptr + o_n[:, None] * PADDED_D
        if BLOCK_D == PADDED_D:
            b_x = _centred(
                p_x + o_d.to(tl.int64) * stride_xd, mean_ptr + o_d, m_n[:, None], o_d < D,
                EUCLIDEAN, WIDE,
            )  # fmt: skip
            largest = tl.max(tl.abs(b_x), 1)
        else:
            largest = tl.zeros([BLOCK_N], tl.float32)
            for d in range(0, D, BLOCK_D):
                o_x = d + o_d
                b_x = _centred(
                    p_x + o_x.to(tl.int64) * stride_xd, mean_ptr + o_x, m_n[:, None], o_x < D,
                    EUCLIDEAN, WIDE,
                )  # fmt: skip
                largest = tl.maximum(largest, tl.max(tl.abs(b_x), 1))
        scale = _scale(largest)  # [BN]
        ratio = tl.full([BLOCK_N], 1.0, tl.float32)
        if EUCLIDEAN:
            # Of the norm term's unit to the product's. Rows beside which the codes are large need
            # no precision of their own.
            scale = tl.minimum(scale, code_scale * _MAX_RATIO)
            ratio = scale / code_scale
        if BLOCK_D == PADDED_D:
            b_half, norm, residual = _rounded(b_x, scale[:, None])
        else:
            norm = tl.zeros([BLOCK_N], tl.float32)
            residual = tl.zeros([BLOCK_N], tl.float32)
            tl.debug_barrier()  # the rows before have been read
            for d in range(0, PADDED_D, BLOCK_D):
                o_x = d + o_d
                b_x = _centred(
                    p_x + o_x.to(tl.int64) * stride_xd, mean_ptr + o_x, m_n[:, None], o_x < D,
                    EUCLIDEAN, WIDE,
                )  # fmt: skip
                b_rounded, b_norm, b_residual = _rounded(b_x, scale[:, None])
                tl.store(p_half + o_x, b_rounded)
                norm += b_norm
                residual += b_residual
            tl.debug_barrier()
        # Rounding of the factors.
        norm = tl.sqrt(norm) * 1.001
        residual = tl.sqrt(residual) * 1.001 + scale * _LEAST_NORMAL * D
        bound = residual * max_code + (norm + residual) * max_residual
        # Of the sums, which tensor cores may truncate; of x - mean, the norm terms and their
        # difference.
        bound += (D + 64) * 2.4e-7 * (norm * max_code + ratio * max_term)
        # Of the definition in float64, which does not see the mean; of normalised codes.
        if EUCLIDEAN:
            bound += (D + 8) * 2.3e-16 * norm * (norm / ratio)
        else:
            bound += ((D + 8) * 2.3e-16 + 1.2e-7) * norm * max_whole
        # False for NaN.
        known = (bound < 1e30) & (ratio * _MAX_RATIO >= 1)
        bound = tl.where(known, bound, float("inf"))

        # Bits for the number of a code within its place.
        low = padded // _PLACES - 1
        low |= low >> 1
        low |= low >> 2
        low |= low >> 4
        low |= low >> 8
        low |= low >> 16
        best = tl.full([BLOCK_N, _PLACES], -3e38, tl.float32)
        second = tl.full([BLOCK_N, _PLACES], -3e38, tl.float32)
        o_s = tl.arange(0, STEP_D)
        if BLOCK_D < STEP_D:
            b_half = tl.load(p_half + o_s[None, :])
        step = tl.full([], PADDED_D, tl.int64)
        for k in range(0, padded, BLOCK_K):
            b_term = tl.load(term_ptr + k + o_k)
            p_c = code_ptr + k * step + (o_k[None, :] * PADDED_D + o_s[:, None])
            if STEP_D == PADDED_D:
                b_score = tl.dot(b_half, tl.load(p_c))  # [BN, BK]
            else:
                b_score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for d in range(0, PADDED_D, STEP_D):
                    b_step = tl.load(p_half + (d + o_s)[None, :])
                    b_score = tl.dot(b_step, tl.load(p_c + d), b_score)
            b_score -= ratio[:, None] * b_term[None, :]
            number = k // _PLACES
            b_even, b_odd = _split(b_score, True)
            if BLOCK_K == 64:
                best, second = _keep(best, second, b_even, number, low)
                best, second = _keep(best, second, b_odd, number + 1, low)
            else:
                b_even, b_even_2 = _split(b_even, False)
                b_odd, b_odd_2 = _split(b_odd, False)
                best, second = _keep(best, second, b_even, number, low)
                best, second = _keep(best, second, b_odd, number + 1, low)
                best, second = _keep(best, second, b_even_2, number + 2, low)
                best, second = _keep(best, second, b_odd_2, number + 3, low)

        top = tl.max(best, 1)
        place = tl.min(tl.where(best == top[:, None], o_p, _PLACES - 1), 1)
        rest = tl.max(tl.where(o_p == place[:, None], second, best), 1)
        # The numbers in the lowest bits, too, are an error.
        numbers = (low + 1).to(tl.float32) * 2.5e-7
        margin = (2 * bound + numbers * tl.abs(top)) * (1 + numbers) + 1e-20
        certain = top - rest > margin
        index = _code(place, top.to(tl.int32, bitcast=True) & low)
        tl.store(index_ptr + head * N + rows, index.to(tl.int64), mask=m_n)
        unsure = m_n & (certain == 0)
        if tl.max(unsure.to(tl.int32), 0) > 0:
            limit = top - margin
            number = tl.sum((best >= limit[:, None]).to(tl.int32), 1)
            # A row with a NaN may have no score that passes the limit, and has all codes to look
            # at.
            some = unsure & known & (number < _NEAR)
            item = _items(count_ptr, some).to(tl.int64)
            tl.store(list_ptr + item, rows.to(tl.int32), mask=some)
            p_near = near_ptr + item * _NEAR
            tl.store(p_near, number, mask=some)
            for i in range(0, tl.max(tl.where(some, number, 0), 0)):
                top = tl.max(best, 1)
                place = tl.min(tl.where(best == top[:, None], o_p, _PLACES - 1), 1)
                code = _code(place, top.to(tl.int32, bitcast=True) & low)
                b_here = o_p == place[:, None]
                # Where the second best is near as well, any of the place's codes may be.
                behind = tl.max(tl.where(b_here, second, -3e38), 1)
                code = tl.where(behind >= limit, -1 - place, code)
                tl.store(p_near + 1 + i, code, mask=some & (i < number))
                best = tl.where(b_here, -3e38, best)
            others = unsure & (some == 0)
            item = N - 1 - _items(count_ptr + 1, others).to(tl.int64)
            tl.store(list_ptr + item, rows.to(tl.int32), mask=others)


@triton.jit
def _four(p, mask, d, D, stride):
    """The next four dimensions from ``d`` of p [A, B], zero beyond D and outside the mask: one
    wide load where the stride is 1."""
    o = tl.arange(0, 4)
    m = mask[:, :, None] & (d + o < D)[None, None, :]
    b = tl.load(p[:, :, None] + (d + o)[None, None, :].to(tl.int64) * stride, mask=m, other=0.0)
    even, odd = tl.split(tl.reshape(b, (b.shape[0], b.shape[1], 2, 2)))
    b_0, b_2 = tl.split(even)
    b_1, b_3 = tl.split(odd)
    return b_0, b_1, b_2, b_3


@triton.jit
def _add(total, b_x, b_c, METRIC: tl.constexpr):
    b_x = b_x.to(total.dtype)
    b_c = b_c.to(total.dtype)
    if METRIC == 0:
        b_difference = b_x - b_c
        return total + b_difference * b_difference
    elif METRIC == 3:
        return total + tl.abs(b_x * b_c)
    else:
        return total - b_x * b_c


@triton.jit
def _summed(p_x, p_c, mask, D, stride_xd, stride_cd, METRIC: tl.constexpr, dtype: tl.constexpr):
    """Squared distances (METRIC 0), negated products, or sums of absolute products (3) of rows
    p_x and p_c [A, B], dimension by dimension."""
    total = tl.zeros(mask.shape, dtype)
    for d in range(0, D, 4):
        x_0, x_1, x_2, x_3 = _four(p_x, mask, d, D, stride_xd)
        c_0, c_1, c_2, c_3 = _four(p_c, mask, d, D, stride_cd)
        total = _add(total, x_0, c_0, METRIC)
        total = _add(total, x_1, c_1, METRIC)
        total = _add(total, x_2, c_2, METRIC)
        total = _add(total, x_3, c_3, METRIC)
    return total


@triton.jit
def _definition(
    p_x, code_ptr, norm_ptr, b_code, mask, norm_x, D, stride_xd, stride_ck, stride_cd,
    METRIC: tl.constexpr,
):  # fmt: skip
    """The metric in float64, smaller is nearer, of rows p_x and codes b_code [A, B]."""
    p_c = code_ptr + b_code.to(tl.int64) * stride_ck
    total = _summed(p_x, p_c, mask, D, stride_xd, stride_cd, METRIC, tl.float64)
    if METRIC == 1:
        norms = norm_x * tl.load(norm_ptr + b_code, mask=mask, other=1.0)
        total = tl.where(norms == 0, tl.abs(total) * 0, total / norms)
    return total


@triton.jit
def _defined_norm(p_x, mask, D, stride_xd):
    """In float64, of rows [A, 1]."""
    total = tl.zeros(mask.shape, tl.float64)
    for d in range(0, D, 4):
        x_0, x_1, x_2, x_3 = _four(p_x, mask, d, D, stride_xd)
        total = _add(total, x_0, x_0, 3)
        total = _add(total, x_1, x_1, 3)
        total = _add(total, x_2, x_2, 3)
        total = _add(total, x_3, x_3, 3)
    return tl.sqrt(total)


@triton.jit(do_not_specialize=["K"])
def nearest_code_norm_kernel(
    code_ptr,
    norm_ptr,  # [H, K] float64
    unit_ptr,  # [H, K, D] the codes divided by it, float32
    K,
    D,
    stride_ch,
    stride_ck,
    stride_cd,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    codes = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
    m_k = codes < K
    p_c = code_ptr + head * stride_ch + codes * stride_ck
    norm = _defined_norm(p_c, m_k, D, stride_cd)  # [BK, 1]
    tl.store(norm_ptr + head * K + codes, norm, mask=m_k)
    # Norms that may overflow in a product are not for screening: NaN says so.
    norm = tl.where(norm < 1e200, norm, float("nan"))
    o_d = tl.arange(0, 16)[None, :]
    p_unit = unit_ptr + (head * K + codes) * D
    for d in range(0, D, 16):
        mask = m_k & (d + o_d < D)
        b_c = tl.load(p_c + (d + o_d) * stride_cd, mask=mask, other=0.0).to(tl.float64)
        b_unit = tl.where(norm == 0, b_c * 0, b_c / norm)
        tl.store(p_unit + d + o_d, b_unit.to(tl.float32), mask=mask)


@triton.jit
def _least(b_value, b_code, mask, best, index):
    """Best value and lowest index of it, so far and among b_value [A, B]."""
    b_value = tl.where(mask, b_value, float("inf"))
    least = tl.min(b_value, 1)
    where = tl.min(tl.where(mask & (b_value == least[:, None]), b_code, 0x7FFFFFFF), 1)
    index = tl.where((least < best) | ((least == best) & (where < index)), where, index)
    return tl.minimum(best, least), index


@triton.jit(do_not_specialize=["N", "K"])
def nearest_code_exact_kernel(
    x_ptr,
    code_ptr,
    norm_ptr,  # [H, K] of the codes, for cosine
    index_ptr,  # [H, N]
    list_ptr,
    near_ptr,
    count_ptr,
    N,
    K,
    D,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ch,
    stride_ck,
    stride_cd,
    METRIC: tl.constexpr,
    SCREEN: tl.constexpr,
    FOUR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if FOUR:
        D = multiple(D, 4)
        stride_xh = multiple(stride_xh, 4)
        stride_xn = multiple(stride_xn, 4)
        stride_ch = multiple(stride_ch, 4)
        stride_ck = multiple(stride_ck, 4)
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head * stride_xh
    code_ptr += head * stride_ch
    norm_ptr += head * K
    index_ptr += head * N
    list_ptr += head * N
    near_ptr += head * N * _NEAR
    some = tl.load(count_ptr + head * 4)
    others = tl.load(count_ptr + head * 4 + 1)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)[None, :]
    o_near = tl.arange(0, _NEAR)[None, :]

    for first in range(tl.program_id(0) * BLOCK_N, some, tl.num_programs(0) * BLOCK_N):
        item = (first + o_n).to(tl.int64)
        m_n = item < some
        rows = tl.load(list_ptr + item, mask=m_n, other=0).to(tl.int64)
        p_x = x_ptr + rows[:, None] * stride_xn  # [BN, 1]
        norm_x = tl.zeros([BLOCK_N, 1], tl.float64)
        if METRIC == 1:
            norm_x = _defined_norm(p_x, m_n[:, None], D, stride_xd)
        p_near = near_ptr + item[:, None] * _NEAR
        count = tl.load(p_near, mask=m_n[:, None], other=0)
        b_near = tl.load(p_near + o_near, mask=(o_near > 0) & (o_near <= count), other=-_PLACES - 1)
        m_near = b_near >= 0
        b_value = _definition(
            tl.broadcast_to(p_x, [BLOCK_N, _NEAR]), code_ptr, norm_ptr, b_near, m_near, norm_x,
            D, stride_xd, stride_ck, stride_cd, METRIC,
        )  # fmt: skip
        best = tl.full([BLOCK_N], float("inf"), tl.float64)
        index = tl.full([BLOCK_N], 0x7FFFFFFF, tl.int32)
        best, index = _least(b_value, b_near, m_near, best, index)
        # Places of which any code may be the nearest, from the last.
        b_place = tl.where(m_near | (b_near < -_PLACES), -1, -1 - b_near)
        place = tl.max(b_place, 1)
        while tl.max(place, 0) >= 0:
            for number in range(0, tl.cdiv(K, 64) * 2, BLOCK_K):
                b_code = _code(place[:, None], number + o_k)
                mask = (place >= 0)[:, None] & (b_code < K)
                b_all = _definition(
                    tl.broadcast_to(p_x, [BLOCK_N, BLOCK_K]), code_ptr, norm_ptr, b_code, mask,
                    norm_x, D, stride_xd, stride_ck, stride_cd, METRIC,
                )  # fmt: skip
                best, index = _least(b_all, b_code, mask, best, index)
            place = tl.max(tl.where(b_place < place[:, None], b_place, -1), 1)
        tl.store(index_ptr + rows, index.to(tl.int64), mask=m_n)

    for first in range(tl.program_id(0) * BLOCK_N, others, tl.num_programs(0) * BLOCK_N):
        m_n = first + o_n < others
        item = N - 1 - (first + o_n).to(tl.int64)
        rows = tl.load(list_ptr + item, mask=m_n, other=0).to(tl.int64)
        p_row = x_ptr + rows[:, None] * stride_xn  # [BN, 1]
        norm_x = tl.zeros([BLOCK_N, 1], tl.float64)
        if METRIC == 1:
            norm_x = _defined_norm(p_row, m_n[:, None], D, stride_xd)
        p_x = tl.broadcast_to(p_row, [BLOCK_N, BLOCK_K])
        best = tl.full([BLOCK_N], float("inf"), tl.float64)
        index = tl.full([BLOCK_N], 0x7FFFFFFF, tl.int32)
        first_nan = index
        for k in range(0, K, BLOCK_K):
            b_code = tl.broadcast_to(k + o_k, [BLOCK_N, BLOCK_K])
            mask = m_n[:, None] & (b_code < K)
            needed = True
            if SCREEN:
                p_c = code_ptr + b_code.to(tl.int64) * stride_ck
                b_sum = _summed(p_x, p_c, mask, D, stride_xd, stride_cd, METRIC, tl.float32)
                b_size = b_sum
                if METRIC != 0:
                    b_size = _summed(p_x, p_c, mask, D, stride_xd, stride_cd, 3, tl.float32)
                # Underflow is covered by the constant, overflow and NaN by the negation.
                b_error = (D + 8) * (1.2e-7 * b_size + 2 * _LEAST_NORMAL)
                b_far = (b_sum - b_error).to(tl.float64) > best[:, None]
                needed = tl.max(tl.max((mask & (b_far == 0)).to(tl.int32), 1), 0) > 0
            if needed:
                b_value = _definition(
                    p_x, code_ptr, norm_ptr, b_code, mask, norm_x,
                    D, stride_xd, stride_ck, stride_cd, METRIC,
                )  # fmt: skip
                b_nan = (b_value != b_value) & mask
                b_first = tl.where(b_nan, b_code, 0x7FFFFFFF)
                first_nan = tl.minimum(first_nan, tl.min(b_first, 1))
                best, index = _least(b_value, b_code, mask & (b_nan == 0), best, index)
        # NaN is nearest of all.
        index = tl.where(first_nan < K, first_nan, index)
        tl.store(index_ptr + rows, index.to(tl.int64), mask=m_n)


@triton.jit(do_not_specialize=["N", "K"])
def nearest_code_distance_kernel(
    x_ptr,
    code_ptr,
    norm_ptr,
    index_ptr,
    distance_ptr,
    N,
    K,
    D,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ch,
    stride_ck,
    stride_cd,
    METRIC: tl.constexpr,
    FOUR: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if FOUR:
        D = multiple(D, 4)
        stride_xh = multiple(stride_xh, 4)
        stride_xn = multiple(stride_xn, 4)
        stride_ch = multiple(stride_ch, 4)
        stride_ck = multiple(stride_ck, 4)
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BN, 1]
    mask = rows < N
    index = tl.load(index_ptr + head * N + rows, mask=mask, other=0)
    p_x = x_ptr + head * stride_xh + rows * stride_xn
    norm_x = tl.zeros([BLOCK_N, 1], tl.float64)
    if METRIC == 1:
        norm_x = _defined_norm(p_x, mask, D, stride_xd)
    value = _definition(
        p_x, code_ptr + head * stride_ch, norm_ptr + head * K, index, mask, norm_x,
        D, stride_xd, stride_ck, stride_cd, METRIC,
    )  # fmt: skip
    if METRIC != 0:
        value = 0.0 - value
    p_distance = distance_ptr + head * N + rows
    tl.store(p_distance, value.to(distance_ptr.dtype.element_ty), mask=mask)


SCREEN_CONFIGS = [
    triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for n, k, warps in ((128, 128, 8), (128, 64, 8), (64, 128, 4), (64, 64, 4))
    for stages in (3, 2)
]


def _fitting(
    configs: list[triton.Config], *, PADDED_D: int, STEP_D: int, **others: Any
) -> list[triton.Config]:
    """Of each size the configuration with most stages whose float16 tiles fit the device."""
    backend, arch, limit = device_limits(triton.runtime.driver.active.get_current_device())
    fitting: dict[tuple[int, int], triton.Config] = {}
    for c in configs:
        block_n, block_k = c.kwargs["BLOCK_N"], c.kwargs["BLOCK_K"]
        # On AMD one of the stages is in registers, and more than two do not pay.
        stages = c.num_stages - (backend == "hip")
        # Elsewhere threads do not hold columns that are half a tile of 128 apart.
        apart = block_k == 64 or (backend == "cuda" and arch < 100)
        size = 2 * STEP_D * (block_n * (1 if STEP_D == PADDED_D else stages) + block_k * stages)
        if apart and size <= limit and stages <= (1 if backend == "hip" else 3):
            fitting.setdefault((block_n, block_k), c)
    return list(fitting.values()) or configs[-1:]


_screen = Tuned(
    nearest_code_screen_kernel,
    [triton.Config({"BLOCK_N": 32, "BLOCK_K": 128})] if interpreting() else SCREEN_CONFIGS,
    ["PADDED_D"],
    _fitting,
)


def _padded(num_dims: int) -> dict[str, int]:
    """Compile-time sizes of the screening: of a row, and of a step through it."""
    if num_dims > _WHOLE_D:
        return {"PADDED_D": triton.cdiv(num_dims, _STEP_D) * _STEP_D, "STEP_D": _STEP_D}
    power = max(16, triton.next_power_of_2(num_dims))
    return {"PADDED_D": power, "STEP_D": power}


def _problems(device: torch.device) -> list[Problem]:
    """Of every width that has tiles of its own."""
    made = []
    for num_dims in (16, 32, 64, 128, 256, 512):
        x, codes = (torch.randn(n, num_dims, device=device) for n in (65536, 8192))
        call = functools.partial(nearest_code, x, codes, "euclidean")
        made.append(Problem(_padded(num_dims), call))
    return made


# What ``python -m mmfast.kernels.tuned`` searches.
tuning = _screen, _problems


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.nearest_code`` on checked arguments."""
    shape = x.shape[:-1]
    codes = codebook if codebook.dim() == 3 else codebook[None]  # [H, K, D]
    num_heads, num_codes, num_dims = codes.shape
    wide = torch.float64 in (x.dtype, codebook.dtype)
    indices = x.new_empty(shape, dtype=torch.int64)
    distances = x.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    if indices.numel() == 0:
        return indices, distances
    if num_heads > _MOST_HEADS:
        parts = zip(x.split(_MOST_HEADS), codes.split(_MOST_HEADS), strict=True)
        results = [nearest_code(a, b, metric) for a, b in parts]
        return torch.cat([i for i, _ in results]), torch.cat([d for _, d in results])
    rows = x.reshape(num_heads, -1, num_dims)  # [H, N, D]
    num_rows = rows.shape[1]
    if num_rows > _MOST_ROWS or num_codes > _MOST_CODES:
        raise ValueError(
            f"the Triton kernels take at most {_MOST_ROWS} vectors and {_MOST_CODES} codes, "
            f"got {num_rows} and {num_codes}"
        )
    x_strides, code_strides = strides(rows), strides(codes)
    packed_rows = x_strides[1:] == (num_dims, 1) and x_strides[0] in (0, num_rows * num_dims)
    euclidean = metric == "euclidean"
    norms = x.new_empty((num_heads, 0 if metric != "cosine" else num_codes), dtype=torch.float64)
    source, source_strides = codes, code_strides
    if metric == "cosine":
        source = x.new_empty(codes.shape, dtype=torch.float32)
        source_strides = source.stride()
        nearest_code_norm_kernel[(triton.cdiv(num_codes, 32), num_heads)](
            codes, norms, source, num_codes, num_dims, *code_strides,
            BLOCK_K=32, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip

    sizes = _padded(num_dims)
    padded = sizes["PADDED_D"]
    block_d = min(padded, _STEP_D)
    padded_codes = triton.cdiv(num_codes, _TILE.value) * _TILE.value
    wide_codes = source.dtype == torch.float64
    mean = source.mean(1, dtype=torch.float64 if wide_codes else torch.float32).contiguous()
    low, high = (t.contiguous() for t in torch.aminmax(source, dim=1))
    half = x.new_empty((num_heads, padded_codes, padded), dtype=torch.float16)
    terms = x.new_empty((num_heads, padded_codes), dtype=torch.float32)
    statistics, counts = x.new_zeros((2, num_heads, 4), dtype=torch.int32)
    nearest_code_pack_kernel[(padded_codes // 32, num_heads)](
        source, mean, low, high, half, terms, statistics, num_codes, num_dims, *source_strides,
        EUCLIDEAN=euclidean, WIDE=wide_codes, PADDED_D=padded, BLOCK_D=block_d,
        BLOCK_K=32, **at_most(128),
    )  # fmt: skip

    listed = x.new_empty((num_heads, num_rows), dtype=torch.int32)
    near = x.new_empty((num_heads, num_rows, _NEAR.value), dtype=torch.int32)
    programs = triton.cdiv(num_programs(x.device), num_heads)
    scratch = num_heads * programs * 128 * padded if block_d < padded else 0
    rounded = x.new_empty(scratch, dtype=torch.float16)
    _screen[lambda meta: (min(programs, triton.cdiv(num_rows, meta["BLOCK_N"])), num_heads)](
        rows, mean, half, terms, statistics, rounded, indices, listed, near, counts,
        num_rows, num_codes, num_dims, *x_strides, EUCLIDEAN=euclidean, WIDE=wide,
        PACKED=packed_rows, BLOCK_D=block_d, **sizes, **at_most(255),
    )  # fmt: skip
    programs = triton.cdiv(num_programs(x.device, 4), num_heads)
    both = (num_rows, num_codes, num_dims, *x_strides, *code_strides)
    four = not any(n % 4 for n in (num_dims, *x_strides[:2], *code_strides[:2]))
    nearest_code_exact_kernel[(programs, num_heads)](
        rows, codes, norms, indices, listed, near, counts, *both,
        METRIC=METRICS[metric], SCREEN=not wide and metric != "cosine", FOUR=four, BLOCK_N=16,
        BLOCK_K=16, enable_fp_fusion=False, **at_most(128),
    )  # fmt: skip
    nearest_code_distance_kernel[(triton.cdiv(num_rows, 256), num_heads)](
        rows, codes, norms, indices, distances, *both,
        METRIC=METRICS[metric], FOUR=four, BLOCK_N=256, enable_fp_fusion=False, **at_most(128),
    )  # fmt: skip
    return indices, distances


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dims: int, dtype: torch.dtype, metric: str, quick: bool) -> Variant:
        return Variant(
            f"nearest_code: {metric}, {dtype}, D {dims}".replace("torch.", ""),
            lambda n, k: nearest_code(
                torch.ones(n, dims, dtype=dtype), torch.ones(k, dims, dtype=dtype), metric
            ),
            matrix=frozenset({"nearest_code_screen_kernel"}),
            wide=wide if dtype.itemsize > 2 else wide[: dims >= 32],
            quick=quick,
        )

    # The kernels that read all vectors.
    wide = (
        ("nearest_code_screen_kernel", "b_x = tl.load(p_x"),
        ("nearest_code_distance_kernel", "b = tl.load(p["),
    )
    dims = (8, 32, 64, 128, 256, 512)
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    some = {("euclidean", torch.float32, 64), ("cosine", torch.float16, 512)}
    return [variant(d, t, m, (m, t, d) in some) for m in METRICS for t in floats for d in dims]
