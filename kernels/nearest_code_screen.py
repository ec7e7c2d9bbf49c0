"""The products of the lookup: scores that certify what they can.

Of each group of packed codes only the best score is looked at (``nearest_code_pack.py``). Where
products are asynchronous (AHEAD), those of a tile begin while the scores of the one before are
compared: over the first half of the dimensions, so that those over the second half, which add to
them in place, are all that is waited for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.kernels.common import interpreting
from mmfast.kernels.nearest_code_pack import TILE, centred, halves, scale_of

# What is kept of a row with several groups: their number, and up to 7 of them.
NEAR = tl.constexpr(8)
# Groups of a tile are folded onto at most so many places, of which each has a best and a second.
MOST_PLACES = tl.constexpr(16)
# Index of a row that is on a list.
LISTED = tl.constexpr(-(2**31))
LEAST_NORMAL = tl.constexpr(1.2e-38)
_MAX_RATIO = tl.constexpr(2.0**36)
_INTERPRETING = tl.constexpr(interpreting())


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
def _add_now(b_score, b_x, b_y):
    """b_score + b_x b_y before what comes next in the program, a product that is issued into the
    registers of b_score; the compiler would make the sums later, and wait for the product."""
    if _INTERPRETING:
        return b_score + b_x * b_y
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [b_x, b_y, b_score],
            dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip


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
    centre_ptr,  # [H, D]
    code_ptr,  # [2, H, padded K, PADDED_D] float16; a descriptor of its rows if TMA
    term_ptr,  # [H, padded K]
    stats_ptr,  # [H, 8]
    half_ptr,  # [H, programs, 2, BLOCK_N, PADDED_D] float16, if BLOCK_D < PADDED_D
    index_ptr,  # [H, N] -1 - group, of rows that are certain of it; LISTED of others
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
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,  # of the loop over tiles, where it loads norm terms ahead, too; else 0
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
    centre_ptr += head * D
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
            b_x = centred(
                p_x + o_d.to(tl.int64) * stride_xd, centre_ptr + o_d, m_n[:, None], o_d < D,
                EUCLIDEAN, WIDE,
            )  # fmt: skip
            largest = tl.max(tl.abs(b_x), 1)
        else:
            largest = tl.zeros([BLOCK_N], tl.float32)
            for d in range(0, D, BLOCK_D):
                o_x = d + o_d
                b_x = centred(
                    p_x + o_x.to(tl.int64) * stride_xd, centre_ptr + o_x, m_n[:, None], o_x < D,
                    EUCLIDEAN, WIDE,
                )  # fmt: skip
                largest = tl.maximum(largest, tl.max(tl.abs(b_x), 1))
        scale = scale_of(largest)  # [BN]
        ratio = tl.full([BLOCK_N], 1.0, tl.float32)
        if EUCLIDEAN:
            # Of the norm term's unit to the product's. Rows beside which the codes are large need
            # no precision of their own.
            scale = tl.minimum(scale, code_scale * _MAX_RATIO)
            ratio = scale / code_scale
        if BLOCK_D == PADDED_D:
            b_high, b_low, norm, left, rest = halves(b_x, scale[:, None])
        else:
            norm = tl.zeros([BLOCK_N], tl.float32)
            left = tl.zeros([BLOCK_N], tl.float32)
            rest = tl.zeros([BLOCK_N], tl.float32)
            tl.debug_barrier()  # the rows before have been read
            for d in range(0, PADDED_D, BLOCK_D):
                o_x = d + o_d
                b_x = centred(
                    p_x + o_x.to(tl.int64) * stride_xd, centre_ptr + o_x, m_n[:, None], o_x < D,
                    EUCLIDEAN, WIDE,
                )  # fmt: skip
                b_high, b_low, b_norm, b_left, b_rest = halves(b_x, scale[:, None])
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
        # Of the sums, which tensor cores may truncate; of x - centre, the norm terms and their
        # difference. The sums of small products, which come first, are 2^-9 of those.
        bound += (1.01 * D + 64) * 2.4e-7 * (norm * max_code + ratio * max_term)
        # Of the definition in float64, which does not see the centre; of normalised codes.
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
        if AHEAD:
            HALF: tl.constexpr = PADDED_D // 2
            if BLOCK_D < PADDED_D:
                o_h = tl.arange(0, HALF)[None, :]
                b_one = tl.load(p_half + o_h)
                b_two = tl.load(p_half + HALF + o_h)
            else:
                b_both = tl.reshape(b_high, [BLOCK_N, 2, HALF])
                b_one, b_two = tl.split(tl.permute(b_both, [0, 2, 1]))
            b_c = _tile(code_ptr, first_code, 0, HALF, PADDED_D, BLOCK_K, TMA)
            b_begun = tl.dot(b_one, b_c)
            for k in tl.range(0, padded, BLOCK_K, num_stages=STAGES if STAGES > 0 else None):
                b_term = tl.load(term_ptr + k + o_k)
                b_c = _tile(code_ptr, first_code + k, HALF, HALF, PADDED_D, BLOCK_K, TMA)
                b_score = tl.dot(b_two, b_c, b_begun)
                b_score = _add_now(b_score, -ratio[:, None], b_term[None, :])
                # Of the last tile twice, for nothing.
                row = first_code + tl.minimum(k + BLOCK_K, padded - BLOCK_K)
                b_c = _tile(code_ptr, row, 0, HALF, PADDED_D, BLOCK_K, TMA)
                b_begun = tl.dot(b_one, b_c)
                b_score = _best_of_groups(b_score, GROUP)
                best, second = _keep(best, second, b_score, k // (GROUP * PLACES), low)
        else:
            o_s = tl.arange(0, STEP_D)[None, :]
            if BLOCK_D < STEP_D:
                b_high = tl.load(p_half + o_s)
                if AGAIN:
                    b_low = tl.load(p_half + BLOCK_N * PADDED_D + o_s)
            TERMS: tl.constexpr = STAGES > 0 and STEP_D == PADDED_D
            for k in tl.range(0, padded, BLOCK_K, num_stages=STAGES if TERMS else None):
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
        b_index = tl.where(certain, -1 - group, LISTED)
        tl.store(index_ptr + head * N + rows, b_index.to(tl.int64), mask=m_n)
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
