"""The products of the lookup: codes packed for tensor cores, and scores that certify what they can.

Codes are packed so that a thread has in its accumulators whole groups of GROUP codes that follow
each other: of a group only the best score is kept, at about one instruction a product, and which
code of the group it was is settled afterwards, in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Codes are padded to a multiple of this, the largest tile of the screening.
TILE = tl.constexpr(128)
# What is kept of a row with several groups: their number, and up to 7 of them.
NEAR = tl.constexpr(8)
# Groups of a tile are folded onto at most so many places, of which each has a best and a second.
MOST_PLACES = tl.constexpr(16)
# Norm term of the codes that fill the last tile: no score is as low, and none overflows.
_PAD = tl.constexpr(2.0**86)
_MAX_RATIO = tl.constexpr(2.0**36)
# Below this, elements may be lost beside the largest where denormals are flushed.
_TINY = tl.constexpr(2.0**-100)
LEAST_NORMAL = tl.constexpr(1.2e-38)


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
def _halves(b_x, scale):
    """Scaled rows as two float16 to add up, and squared norms: of the rows, of what the first
    leaves of them, and of what both leave."""
    b_x = b_x * scale
    b_high = b_x.to(tl.float16)
    b_left = b_x - b_high.to(tl.float32)
    b_low = b_left.to(tl.float16)
    b_rest = b_left - b_low.to(tl.float32)
    square, left, rest = (
        tl.sum(b_x * b_x, 1),
        tl.sum(b_left * b_left, 1),
        tl.sum(b_rest * b_rest, 1),
    )
    return b_high, b_low, square, left, rest


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
    half_ptr,  # [2, H, padded K, PADDED_D] float16, scaled: codes, and what their rounding left
    term_ptr,  # [H, padded K] |scaled code|^2 / 2, or 0
    # [H, 8] bits of: the scale; squares of the largest norm, of what one and two float16 leave, of
    # the norm with the mean
    stats_ptr,
    K,
    D: tl.constexpr,
    stride_ch,
    stride_ck,
    stride_cd,
    EUCLIDEAN: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
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
    left = tl.zeros([BLOCK_K], tl.float32)
    rest = tl.zeros([BLOCK_K], tl.float32)
    whole = tl.zeros([BLOCK_K], tl.float32)
    p_c = code_ptr + head * stride_ch + codes[:, None].to(tl.int64) * stride_ck
    # Of each 8 columns of a tensor core's result, lane q of four has columns 2 q and 2 q + 1.
    member = codes % GROUP
    column = member // 2 * 8 + codes // GROUP % 4 * 2 + member % 2
    padded = tl.num_programs(0) * BLOCK_K
    rows = head * padded + codes // (4 * GROUP) * (4 * GROUP) + column  # [BK] int64
    p_half = half_ptr + rows[:, None] * PADDED_D
    lower = tl.num_programs(1) * padded.to(tl.int64) * PADDED_D
    for d in range(0, PADDED_D, BLOCK_D):
        m_d = (d + o_d < D)[None, :]
        p_d = p_c + (d + o_d)[None, :].to(tl.int64) * stride_cd
        b_c = _centred(p_d, mean_ptr + (d + o_d)[None, :], m_k[:, None], m_d, True, WIDE)
        b_high, b_low, b_square, b_left, b_rest = _halves(b_c, scale)
        tl.store(p_half + (d + o_d)[None, :], b_high)
        tl.store(p_half + lower + (d + o_d)[None, :], b_low)
        square += b_square
        left += b_left
        rest += b_rest
        if not EUCLIDEAN:
            b_c = tl.load(p_d, mask=m_k[:, None] & m_d, other=0.0).to(tl.float32) * scale
            whole += tl.sum(b_c * b_c, 1)
    term = square * 0.5
    if not EUCLIDEAN:
        term = square * 0.0
    tl.store(term_ptr + rows, tl.where(m_k, term, _PAD))
    # Codes so close to each other are not for screening.
    square = tl.where(largest < _TINY, float("inf"), square)
    p_stats = stats_ptr + head * 8
    tl.store(p_stats, scale.to(tl.int32, bitcast=True))
    tl.atomic_max(p_stats + 1, tl.max(_bits(square), 0), sem="relaxed")
    tl.atomic_max(p_stats + 2, tl.max(_bits(left), 0), sem="relaxed")
    tl.atomic_max(p_stats + 3, tl.max(_bits(rest), 0), sem="relaxed")
    tl.atomic_max(p_stats + 4, tl.max(_bits(whole), 0), sem="relaxed")


@triton.jit
def _items(p_count, mask):
    """Where those in ``mask`` go on a list. One atomic for all."""
    count = mask.to(tl.int32)
    first = tl.atomic_add(p_count, tl.sum(count, 0), sem="relaxed")
    return first + tl.cumsum(count, 0) - count


@triton.jit
def _norm(p_square):
    """A norm of the codes' statistics, not less than it is."""
    return tl.sqrt(tl.load(p_square).to(tl.float32, bitcast=True)) * 1.001


@triton.jit
def _best_of_groups(b_score, GROUP: tl.constexpr):
    """[BN, BK] in the order of the packed codes to [BN, BK / GROUP] in the order of the groups."""
    A: tl.constexpr = b_score.shape[0]
    B: tl.constexpr = b_score.shape[1]
    b_best = tl.max(tl.reshape(b_score, [A, B // 2, 2]), 2)
    if GROUP > 2:
        b_best = tl.max(tl.reshape(b_best, [A, B // (4 * GROUP), GROUP // 2, 4]), 2)
    return tl.reshape(b_best, [A, B // GROUP])


@triton.jit
def _keep(best, second, b_score, number, low):
    """Best and second best so far and in b_score, whose lowest bits become ``number``."""
    if b_score.shape[1] > best.shape[1]:
        A: tl.constexpr = b_score.shape[0]
        B: tl.constexpr = b_score.shape[1] // 2
        b_first, b_last = tl.split(tl.permute(tl.reshape(b_score, [A, 2, B]), [0, 2, 1]))
        best, second = _keep(best, second, b_first, number, low)
        return _keep(best, second, b_last, number + B // best.shape[1], low)
    else:
        b_bits = (b_score.to(tl.int32, bitcast=True) & ~low) | number
        b_score = b_bits.to(tl.float32, bitcast=True)
        return tl.maximum(best, b_score), tl.maximum(second, tl.minimum(best, b_score))


@triton.jit
def _tile(
    code_ptr, row, d, STEP_D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[STEP_D, BK] of the packed codes, from a row and a dimension on."""
    if TMA:
        return code_ptr.load([row, d]).T
    else:
        o_k = tl.arange(0, BLOCK_K)[None, :]
        o_s = tl.arange(0, STEP_D)[:, None]
        return tl.load(code_ptr + row.to(tl.int64) * PADDED_D + d + (o_k * PADDED_D + o_s))


@triton.jit(do_not_specialize=["N", "K"])
def nearest_code_screen_kernel(
    x_ptr,
    mean_ptr,  # [H, D]
    code_ptr,  # [2, H, padded K, PADDED_D] float16; a descriptor of its rows if TMA
    term_ptr,  # [H, padded K]
    stats_ptr,  # [H, 8]
    half_ptr,  # [H, programs, 2, BLOCK_N, PADDED_D] float16, if BLOCK_D < PADDED_D
    index_ptr,  # [H, N] -1 - group, of rows that are certain of it
    again_ptr,  # [H, N] rows that two float16 are to tell
    list_ptr,  # [H, N] from the front, rows with several groups; from the back, with any code
    near_ptr,  # [H, N, NEAR] these groups, in the order of the list
    count_ptr,  # [H, 4] lengths: of the list's front, its back, of the rows to look at again
    N,
    K,
    D: tl.constexpr,
    stride_xh,
    stride_xn,
    stride_xd,
    EUCLIDEAN: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    AGAIN: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PLACES: tl.constexpr = MOST_PLACES if BLOCK_K // GROUP > MOST_PLACES else BLOCK_K // GROUP
    head = tl.program_id(1).to(tl.int64)
    padded = tl.cdiv(K, TILE) * TILE
    first_code = tl.program_id(1) * padded
    lower = tl.num_programs(1) * padded  # rows to those that rounding left
    if PACKED:
        # Multiples of D at compile time, for the sake of wide loads.
        x_ptr += head * N * D
        stride_xn = D
    else:
        x_ptr += head * stride_xh
    mean_ptr += head * D
    term_ptr += head * padded
    half_ptr += (head * tl.num_programs(0) + tl.program_id(0)) * (2 * BLOCK_N * PADDED_D)
    again_ptr += head * N
    list_ptr += head * N
    near_ptr += head * N * NEAR
    count_ptr += head * 4
    p_stats = stats_ptr + head * 8
    code_scale = tl.load(p_stats).to(tl.float32, bitcast=True)
    max_code = _norm(p_stats + 1)
    max_left = _norm(p_stats + 2)
    max_rest = _norm(p_stats + 3)
    max_whole = _norm(p_stats + 4)
    max_residual = (max_rest if AGAIN else max_left) + code_scale * LEAST_NORMAL * D  # denormals
    max_term = max_code * max_code if EUCLIDEAN else 0.0
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_p = tl.arange(0, PLACES)[None, :]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    number_of_rows = N
    if AGAIN:
        number_of_rows = tl.load(count_ptr + 2)
    for block in range(tl.program_id(0), tl.cdiv(number_of_rows, BLOCK_N), tl.num_programs(0)):
        rows = block * BLOCK_N + o_n.to(tl.int64)  # [BN]
        m_n = rows < number_of_rows
        if AGAIN:
            rows = tl.load(again_ptr + rows, mask=m_n, other=0).to(tl.int64)
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
            b_high, b_low, norm, left, rest = _halves(b_x, scale[:, None])
        else:
            norm = tl.zeros([BLOCK_N], tl.float32)
            left = tl.zeros([BLOCK_N], tl.float32)
            rest = tl.zeros([BLOCK_N], tl.float32)
            tl.debug_barrier()  # the rows before have been read
            for d in range(0, PADDED_D, BLOCK_D):
                o_x = d + o_d
                b_x = _centred(
                    p_x + o_x.to(tl.int64) * stride_xd, mean_ptr + o_x, m_n[:, None], o_x < D,
                    EUCLIDEAN, WIDE,
                )  # fmt: skip
                b_high, b_low, b_norm, b_left, b_rest = _halves(b_x, scale[:, None])
                tl.store(p_half + o_x, b_high)
                if AGAIN:
                    tl.store(p_half + BLOCK_N * PADDED_D + o_x, b_low)
                norm += b_norm
                left += b_left
                rest += b_rest
            tl.debug_barrier()
        # Rounding of the factors.
        norm = tl.sqrt(norm) * 1.001
        left = tl.sqrt(left) * 1.001
        residual = (tl.sqrt(rest) * 1.001 if AGAIN else left) + scale * LEAST_NORMAL * D
        bound = residual * max_code + (norm + residual) * max_residual
        if AGAIN:
            # The product of what rounding left of both is none of the three.
            bound += (left + residual) * (max_left + max_residual)
        # Of the sums, which tensor cores may truncate; of x - mean, the norm terms and their
        # difference. The sums of small products, which come first, are 2^-9 of those.
        bound += (1.01 * D + 64) * 2.4e-7 * (norm * max_code + ratio * max_term)
        # Of the definition in float64, which does not see the mean; of normalised codes.
        if EUCLIDEAN:
            bound += (D + 8) * 2.3e-16 * norm * (norm / ratio)
        else:
            bound += ((D + 8) * 2.3e-16 + 1.2e-7) * norm * max_whole
        # False for NaN.
        bound = tl.where((bound < 1e30) & (ratio * _MAX_RATIO >= 1), bound, float("inf"))

        # Bits for the number of a group within its place.
        low = padded // (GROUP * PLACES) - 1
        low |= low >> 1
        low |= low >> 2
        low |= low >> 4
        low |= low >> 8
        low |= low >> 16
        best = tl.full([BLOCK_N, PLACES], -3e38, tl.float32)
        second = tl.full([BLOCK_N, PLACES], -3e38, tl.float32)
        o_s = tl.arange(0, STEP_D)[None, :]
        if BLOCK_D < STEP_D:
            b_high = tl.load(p_half + o_s)
            if AGAIN:
                b_low = tl.load(p_half + BLOCK_N * PADDED_D + o_s)
        for k in range(0, padded, BLOCK_K):
            b_term = tl.load(term_ptr + k + o_k)
            row = first_code + k
            if STEP_D == PADDED_D:
                b_c = _tile(code_ptr, row, 0, STEP_D, PADDED_D, BLOCK_K, TMA)
                if AGAIN:
                    b_left = _tile(code_ptr, row + lower, 0, STEP_D, PADDED_D, BLOCK_K, TMA)
                    b_score = tl.dot(b_high, b_left)
                    b_score = tl.dot(b_low, b_c, b_score)
                    b_score = tl.dot(b_high, b_c, b_score)
                else:
                    b_score = tl.dot(b_high, b_c)  # [BN, BK]
            else:
                b_score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                if AGAIN:
                    for d in range(0, PADDED_D, STEP_D):
                        b_left = _tile(code_ptr, row + lower, d, STEP_D, PADDED_D, BLOCK_K, TMA)
                        b_c = _tile(code_ptr, row, d, STEP_D, PADDED_D, BLOCK_K, TMA)
                        b_score = tl.dot(tl.load(p_half + d + o_s), b_left, b_score)
                        b_low = tl.load(p_half + BLOCK_N * PADDED_D + d + o_s)
                        b_score = tl.dot(b_low, b_c, b_score)
                for d in range(0, PADDED_D, STEP_D):
                    b_c = _tile(code_ptr, row, d, STEP_D, PADDED_D, BLOCK_K, TMA)
                    b_score = tl.dot(tl.load(p_half + d + o_s), b_c, b_score)
            b_score -= ratio[:, None] * b_term[None, :]
            b_score = _best_of_groups(b_score, GROUP)
            best, second = _keep(best, second, b_score, k // (GROUP * PLACES), low)

        # Once more, rather than kept in registers.
        rows = block * BLOCK_N + o_n
        m_n = rows < number_of_rows
        if AGAIN:
            rows = tl.load(again_ptr + rows, mask=m_n, other=0)
        known = bound < 1e30
        top = tl.max(best, 1)
        place = tl.min(tl.where(best == top[:, None], o_p, PLACES - 1), 1)
        others = tl.max(tl.where(o_p == place[:, None], second, best), 1)
        # The numbers in the lowest bits, too, are an error.
        numbers = (low + 1).to(tl.float32) * 2.5e-7
        margin = (2 * bound + numbers * tl.abs(top)) * (1 + numbers) + 1e-20
        certain = top - others > margin
        group = (top.to(tl.int32, bitcast=True) & low) * PLACES + place
        tl.store(index_ptr + head * N + rows, (-1 - group).to(tl.int64), mask=m_n)
        unsure = m_n & (certain == 0)
        if tl.max(unsure.to(tl.int32), 0) > 0:
            limit = top - margin
            number = tl.sum((best >= limit[:, None]).to(tl.int32), 1)
            behind = tl.max(second, 1) >= limit
            # A row with a NaN may have no score that passes the limit, and has all codes to look
            # at.
            some = unsure & known & (number < NEAR)
            if not AGAIN:
                some = some & (behind == 0)
            item = _items(count_ptr, some).to(tl.int64)
            tl.store(list_ptr + item, rows, mask=some)
            p_near = near_ptr + item * NEAR
            tl.store(p_near, number, mask=some)
            for i in range(0, tl.max(tl.where(some, number, 0), 0)):
                top = tl.max(best, 1)
                place = tl.min(tl.where(best == top[:, None], o_p, PLACES - 1), 1)
                entry = (top.to(tl.int32, bitcast=True) & low) * PLACES + place
                b_here = o_p == place[:, None]
                if AGAIN:
                    # Where the second best is near as well, any of the place's groups may be.
                    b_behind = tl.max(tl.where(b_here, second, -3e38), 1)
                    entry = tl.where(
                        b_behind >= limit, -1 - place * MOST_PLACES * 2 - PLACES, entry
                    )
                tl.store(p_near + 1 + i, entry, mask=some & (i < number))
                best = tl.where(b_here, -3e38, best)
            rest_of_them = unsure & (some == 0)
            if not AGAIN:
                again = rest_of_them & known
                item = _items(count_ptr + 2, again).to(tl.int64)
                tl.store(again_ptr + item, rows, mask=again)
                rest_of_them = rest_of_them & (known == 0)
            item = N - 1 - _items(count_ptr + 1, rest_of_them).to(tl.int64)
            tl.store(list_ptr + item, rows, mask=rest_of_them)
