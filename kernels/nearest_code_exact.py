"""The lookup by its definition, in float64: of the groups that screening left, or all codes."""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.kernels.common import multiple
from mmfast.kernels.nearest_code_screen import LEAST_NORMAL, LISTED, MOST_PLACES, NEAR


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
def _summed(p_x, m_x, p_c, m_c, D, stride_xd, stride_cd, METRIC: tl.constexpr, dtype: tl.constexpr):
    """Squared distances (METRIC 0), negated products, or sums of absolute products (3), [A, B], of
    rows p_x [A, 1] and p_c [A, B] or [1, B], dimension by dimension."""
    total = tl.zeros((m_x & m_c).shape, dtype)
    for d in range(0, D, 4):
        x_0, x_1, x_2, x_3 = _four(p_x, m_x, d, D, stride_xd)
        c_0, c_1, c_2, c_3 = _four(p_c, m_c, d, D, stride_cd)
        total = _add(total, x_0, c_0, METRIC)
        total = _add(total, x_1, c_1, METRIC)
        total = _add(total, x_2, c_2, METRIC)
        total = _add(total, x_3, c_3, METRIC)
    return total


@triton.jit
def _definition(
    p_x, m_x, code_ptr, norm_ptr, b_code, m_c, norm_x, D, stride_xd, stride_ck, stride_cd,
    METRIC: tl.constexpr,
):  # fmt: skip
    """The metric in float64, smaller is nearer, of rows p_x [A, 1] and codes b_code [A or 1, B]."""
    p_c = code_ptr + b_code.to(tl.int64) * stride_ck
    total = _summed(p_x, m_x, p_c, m_c, D, stride_xd, stride_cd, METRIC, tl.float64)
    if METRIC == 1:
        norms = norm_x * tl.load(norm_ptr + b_code, mask=m_c, other=1.0)
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
def _sizes(p_x, mask, D, stride_xd, LARGEST: tl.constexpr):
    """Of rows p_x the sum of absolute elements, or the largest, in float32."""
    total = tl.zeros(mask.shape, tl.float32)
    for d in range(0, D, 4):
        x_0, x_1, x_2, x_3 = _four(p_x, mask, d, D, stride_xd)
        x_0, x_1 = tl.abs(x_0.to(tl.float32)), tl.abs(x_1.to(tl.float32))
        x_2, x_3 = tl.abs(x_2.to(tl.float32)), tl.abs(x_3.to(tl.float32))
        if LARGEST:
            total = tl.maximum(total, tl.maximum(tl.maximum(x_0, x_1), tl.maximum(x_2, x_3)))
        else:
            total += (x_0 + x_1) + (x_2 + x_3)
    return total


@triton.jit
def _least(b_value, b_code, mask, best, index):
    """Best value and lowest index of it, so far and among b_value [A, B]."""
    b_value = tl.where(mask, b_value, float("inf"))
    least = tl.min(b_value, 1)
    where = tl.min(tl.where(mask & (b_value == least[:, None]), b_code, 0x7FFFFFFF), 1)
    index = tl.where((least < best) | ((least == best) & (where < index)), where, index)
    return tl.minimum(best, least), index


@triton.jit
def _store(index_ptr, distance_ptr, rows, index, value, mask, METRIC: tl.constexpr):
    """What was found of rows; METRIC 1 and 2 have the sign of a distance."""
    tl.store(index_ptr + rows, index.to(tl.int64), mask=mask)
    if METRIC != 0:
        value = 0.0 - value
    tl.store(distance_ptr + rows, value.to(distance_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "K"])
def nearest_code_exact_kernel(
    x_ptr,
    code_ptr,
    norm_ptr,  # [H, K] of the codes, for cosine
    index_ptr,  # [H, N] of rows that are on no list -1 - group
    distance_ptr,  # [H, N]
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
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
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
    distance_ptr += head * N
    list_ptr += head * N
    near_ptr += head * N * NEAR
    some = tl.load(count_ptr + head * 4)
    others = tl.load(count_ptr + head * 4 + 1)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)[None, :]

    for first in range(tl.program_id(0) * BLOCK_N, some, tl.num_programs(0) * BLOCK_N):
        item = (first + o_n).to(tl.int64)
        m_n = item < some
        m_row = m_n[:, None]
        rows = tl.load(list_ptr + item, mask=m_n, other=0).to(tl.int64)
        p_x = x_ptr + rows[:, None] * stride_xn  # [BN, 1]
        norm_x = tl.zeros([BLOCK_N, 1], tl.float64)
        if METRIC == 1:
            norm_x = _defined_norm(p_x, m_row, D, stride_xd)
        p_near = near_ptr + item * NEAR
        count = tl.load(p_near, mask=m_n, other=0)
        best = tl.full([BLOCK_N], float("inf"), tl.float64)
        index = tl.full([BLOCK_N], 0x7FFFFFFF, tl.int32)
        for i in range(0, tl.max(count, 0)):
            m_i = m_n & (i < count)
            entry = tl.load(p_near + 1 + i, mask=m_i, other=0)
            # The groups of a place from its first on, or a single one.
            place = (-1 - entry) // (2 * MOST_PLACES)
            step = tl.where(entry < 0, (-1 - entry) % (2 * MOST_PLACES), 1)
            group = tl.where(entry < 0, place, entry)
            last = tl.where(m_i, tl.where(entry < 0, tl.cdiv(K, GROUP), entry + 1), 0)
            while tl.max(last - group, 0) > 0:
                b_group = group[:, None] + o_k // GROUP * step[:, None]
                b_code = b_group * GROUP + o_k % GROUP
                mask = (b_group < last[:, None]) & (b_code < K)
                b_value = _definition(
                    p_x, m_row, code_ptr, norm_ptr, b_code, mask, norm_x,
                    D, stride_xd, stride_ck, stride_cd, METRIC,
                )  # fmt: skip
                best, index = _least(b_value, b_code, mask, best, index)
                group += BLOCK_K // GROUP * step
        _store(index_ptr, distance_ptr, rows, index, best, m_n, METRIC)

    for first in range(tl.program_id(0) * BLOCK_N, others, tl.num_programs(0) * BLOCK_N):
        m_n = first + o_n < others
        m_row = m_n[:, None]
        item = N - 1 - (first + o_n).to(tl.int64)
        rows = tl.load(list_ptr + item, mask=m_n, other=0).to(tl.int64)
        p_x = x_ptr + rows[:, None] * stride_xn  # [BN, 1]
        norm_x = tl.zeros([BLOCK_N, 1], tl.float64)
        if METRIC == 1:
            norm_x = _defined_norm(p_x, m_row, D, stride_xd)
        best = tl.full([BLOCK_N], float("inf"), tl.float64)
        index = tl.full([BLOCK_N], 0x7FFFFFFF, tl.int32)
        first_nan = index
        size_x = tl.zeros([BLOCK_N, 1], tl.float32)
        if SCREEN and METRIC != 0:
            size_x = _sizes(p_x, m_row, D, stride_xd, False)
        for k in range(0, K, BLOCK_K):
            b_code = k + o_k  # [1, BK]
            m_k = b_code < K
            mask = m_row & m_k
            needed = True
            if SCREEN:
                p_c = code_ptr + b_code.to(tl.int64) * stride_ck
                b_sum = _summed(
                    p_x, m_row, p_c, m_k, D, stride_xd, stride_cd, METRIC, tl.float32
                )  # fmt: skip
                b_size = b_sum
                if METRIC != 0:
                    # Not less than the sum of absolute products, and not as dear.
                    b_size = size_x * _sizes(p_c, m_k, D, stride_cd, True)
                # Underflow is covered by the constant, overflow and NaN by the negation.
                b_error = (D + 8) * (1.2e-7 * b_size + 2 * LEAST_NORMAL)
                b_far = (b_sum - b_error).to(tl.float64) > best[:, None]
                needed = tl.max(tl.max((mask & (b_far == 0)).to(tl.int32), 1), 0) > 0
            if needed:
                b_value = _definition(
                    p_x, m_row, code_ptr, norm_ptr, b_code, m_k, norm_x,
                    D, stride_xd, stride_ck, stride_cd, METRIC,
                )  # fmt: skip
                b_nan = (b_value != b_value) & mask
                b_first = tl.where(b_nan, b_code, 0x7FFFFFFF)
                first_nan = tl.minimum(first_nan, tl.min(b_first, 1))
                best, index = _least(b_value, b_code, mask & (b_nan == 0), best, index)
        # NaN is nearest of all.
        index = tl.where(first_nan < K, first_nan, index)
        best = tl.where(first_nan < K, float("nan"), best)
        _store(index_ptr, distance_ptr, rows, index, best, m_n, METRIC)

    # Which code of the group it is, of rows that were certain of one.
    o_g = tl.arange(0, GROUP)[None, :]
    o_r = tl.arange(0, BLOCK_ROWS)
    for first in range(tl.program_id(0) * BLOCK_ROWS, N, tl.num_programs(0) * BLOCK_ROWS):
        rows = first + o_r.to(tl.int64)
        entry = tl.load(index_ptr + rows, mask=rows < N, other=0)
        # Others are, or will be, found from the lists.
        m_n = (entry < 0) & (entry != LISTED)
        m_row = m_n[:, None]
        b_code = ((-1 - entry)[:, None] * GROUP + o_g).to(tl.int32)
        mask = m_row & (b_code < K)
        p_x = x_ptr + rows[:, None] * stride_xn
        norm_x = tl.zeros([BLOCK_ROWS, 1], tl.float64)
        if METRIC == 1:
            norm_x = _defined_norm(p_x, m_row, D, stride_xd)
        b_value = _definition(
            p_x, m_row, code_ptr, norm_ptr, b_code, mask, norm_x,
            D, stride_xd, stride_ck, stride_cd, METRIC,
        )  # fmt: skip
        best = tl.full([BLOCK_ROWS], float("inf"), tl.float64)
        best, index = _least(
            b_value, b_code, mask, best, tl.full([BLOCK_ROWS], 0x7FFFFFFF, tl.int32)
        )
        _store(index_ptr, distance_ptr, rows, index, best, m_n, METRIC)
