"""Attention forward in Triton: a block of queries meets block after block of keys.

The softmax is made as they come (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). Keys may be in two streams. Blocks of keys of which all take part need no mask, and
come first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.attention import (
    BEGINS,
    BOTH,
    BOTTOM_RIGHT,
    LN_2,
    LOG2_E,
    NO_MASK,
    NOT_CAUSAL,
    Limits,
    Tokens,
    blocks,
    check_widths,
    factor_of,
    head_strides,
    heads_of,
    kept,
    limited,
    product,
    sources_of_tiles,
    span,
    store_tile,
    tile,
    tiles,
)
from mmfast.kernels.attention_tiles import KEY, facts, forward_configs, precision
from mmfast.kernels.common import dot, multiple, rounded, scratch
from mmfast.kernels.tuned import Tuned


@triton.jit
def _values(
    acc_1, acc_2, b_p, shrink, v_1, v_2, start, stride_vs, length, EV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V1: tl.constexpr, BLOCK_V2: tl.constexpr, BOUNDED: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums times ``shrink``, and the values of a block in the proportions b_p."""
    b_v = tile(v_1, start, stride_vs, length, BLOCK_N, 0, BLOCK_V1, EV, BOUNDED, TMA)
    acc_1 = dot(b_p, b_v, acc_1 * shrink[:, None], PRECISION)
    if BLOCK_V2 > 0:
        b_v = tile(v_2, start, stride_vs, length, BLOCK_N, BLOCK_V1, BLOCK_V2, EV, BOUNDED, TMA)
        acc_2 = dot(b_p, b_v, acc_2 * shrink[:, None], PRECISION)
    return acc_1, acc_2


@triton.jit
def _block(
    acc_1, acc_2, top, total, waiting, shrink, b_q1, b_q2, k_1, k_2, v_1, v_2, stride_ks, stride_vs,
    start, before, rows, num_rows, num_columns, causal_offset, mask_ptr, stride_ml, stride_ms, seed,
    offset, first, dropout_p, factor,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E1: tl.constexpr,
    BLOCK_E2: tl.constexpr, BLOCK_V1: tl.constexpr, BLOCK_V2: tl.constexpr, BOUNDED: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    AHEAD: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of keys into the sums.

    If AHEAD, its probabilities are left in ``waiting``, and meet their values while the next
    block's are made. ALONE: there are none from a block ``before``.
    """
    columns = start + tl.arange(0, BLOCK_N)
    b_k1, b_k2 = tiles(
        k_1, k_2, start, stride_ks, num_columns, BLOCK_N, BLOCK_E1, BLOCK_E2, E, BOUNDED, TMA
    )
    b_s = product(b_q1, b_q2, b_k1, b_k2, total.dtype, BLOCK_E2 > 0, PRECISION)
    if AHEAD and not ALONE:
        acc_1, acc_2 = _values(
            acc_1, acc_2, waiting.to(b_q1.dtype, bitcast=True), shrink, v_1, v_2, before, stride_vs,
            num_columns, EV, BLOCK_N, BLOCK_V1, BLOCK_V2, BOTH, TMA, PRECISION,
        )  # fmt: skip
    # A positive scale changes no order: it can wait, and becomes part of the exponents.
    LATER: tl.constexpr = AHEAD and (MASK == NO_MASK or MASK % 2 == 1)
    if not LATER:
        b_s = b_s * factor
    b_s = limited(
        b_s, rows[:, None], columns[None, :], num_rows, num_columns, causal_offset,
        mask_ptr, stride_ml, stride_ms, BOUNDED, CAUSAL, MASK,
    )  # fmt: skip
    highest = tl.max(b_s, 1)
    if LATER:
        highest = highest * factor
        b_s = b_s * factor
    new = tl.maximum(top, highest)
    # Nothing so far: differences of infinities would be NaN.
    base = new
    if BOUNDED or MASK != NO_MASK:
        base = tl.where(new == float("-inf"), 0.0, new)
    b_p = tl.exp2(b_s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(b_p, 1)
    if DROPOUT:
        b_p = kept(
            b_p, seed, offset, first, rows[:, None], columns[None, :], num_columns, dropout_p
        )
    b_p = rounded(b_p, b_q1.dtype)
    if AHEAD:
        # As integers, or else they would go through shared memory.
        waiting = b_p.to(tl.int16, bitcast=True)
    else:
        acc_1, acc_2 = _values(
            acc_1, acc_2, b_p, shrink, v_1, v_2, start, stride_vs, num_columns, EV, BLOCK_N,
            BLOCK_V1, BLOCK_V2, BOUNDED, TMA, PRECISION,
        )  # fmt: skip
    return acc_1, acc_2, new, total, waiting, shrink


@triton.jit
def _stream(
    acc_1, acc_2, top, total, b_q1, b_q2, k_ptr, v_ptr, span_ptr, batch, head, first_row, rows,
    queries, num_keys, longest, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    mask_ptr, stride_ml, stride_ms, seed, offset, first, dropout_p, factor,
    FACTOR: tl.constexpr, KIND: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_E2: tl.constexpr,
    BLOCK_V1: tl.constexpr, BLOCK_V2: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr, SPECIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys of a stream. ``queries``: how many the sequence has."""
    stride_ks = multiple(stride_ks, FACTOR)
    stride_vs = multiple(stride_vs, FACTOR)
    begin, length = span(span_ptr, batch, num_keys, longest, KIND)
    k_ptr += batch * multiple(stride_kb, FACTOR) + head * multiple(stride_kh, FACTOR)
    v_ptr += batch * multiple(stride_vb, FACTOR) + head * multiple(stride_vh, FACTOR)
    k_ptr += begin * stride_ks
    v_ptr += begin * stride_vs
    causal_offset = 0
    full = length // BLOCK_N * BLOCK_N
    high = length
    if CAUSAL != NOT_CAUSAL:
        if CAUSAL == BOTTOM_RIGHT:
            causal_offset = length - queries
        full = tl.maximum(tl.minimum(length, first_row + causal_offset + 1), 0) // BLOCK_N * BLOCK_N
        high = tl.maximum(tl.minimum(length, first_row + BLOCK_M + causal_offset), 0)
    # Beyond the queries nothing is asked.
    full = tl.where(first_row < queries, full, 0)
    high = tl.where(first_row < queries, high, 0)
    k_1, k_2 = sources_of_tiles(k_ptr, stride_ks, length, BLOCK_N, BLOCK_E1, BLOCK_E2, E, TMA)
    v_1, v_2 = sources_of_tiles(v_ptr, stride_vs, length, BLOCK_N, BLOCK_V1, BLOCK_V2, EV, TMA)
    shrink = tl.full([BLOCK_M], 1.0, total.dtype)
    waiting = tl.zeros([BLOCK_M, BLOCK_N if AHEAD else 1], tl.int16)
    last = (high + BLOCK_N - 1) // BLOCK_N * BLOCK_N - BLOCK_N
    if SPECIAL:
        # Only one loop can be specialised: the last block, of which alone not all keys need take
        # part, comes first, by itself.
        tl.static_assert(TMA and AHEAD and MASK == NO_MASK)
        tl.static_assert(CAUSAL != BOTTOM_RIGHT)
        tl.static_assert(CAUSAL == NOT_CAUSAL or BLOCK_N % BLOCK_M == 0)
        acc_1, acc_2, top, total, waiting, shrink = _block(
            acc_1, acc_2, top, total, waiting, shrink, b_q1, b_q2, k_1, k_2, v_1, v_2, stride_ks,
            stride_vs, last, last, rows, queries, length, causal_offset, mask_ptr, stride_ml,
            stride_ms, seed, offset, first, dropout_p, factor, E, EV, BLOCK_N, BLOCK_E1, BLOCK_E2,
            BLOCK_V1, BLOCK_V2, True, CAUSAL, MASK, DROPOUT, TMA, AHEAD, True, PRECISION,
        )  # fmt: skip
        before = last
        for start in tl.range(0, last, BLOCK_N, warp_specialize=True):
            acc_1, acc_2, top, total, waiting, shrink = _block(
                acc_1, acc_2, top, total, waiting, shrink, b_q1, b_q2, k_1, k_2, v_1, v_2,
                stride_ks, stride_vs, start, before, rows, queries, length, causal_offset, mask_ptr,
                stride_ml, stride_ms, seed, offset, first, dropout_p, factor, E, EV, BLOCK_N,
                BLOCK_E1, BLOCK_E2, BLOCK_V1, BLOCK_V2, False, CAUSAL, MASK, DROPOUT, TMA, AHEAD,
                False, PRECISION,
            )  # fmt: skip
            before = start
        last = before
    else:
        for bounded in tl.static_range(2):
            for start in tl.range(full if bounded else 0, high if bounded else full, BLOCK_N):
                acc_1, acc_2, top, total, waiting, shrink = _block(
                    acc_1, acc_2, top, total, waiting, shrink, b_q1, b_q2, k_1, k_2, v_1, v_2,
                    stride_ks, stride_vs, start, start - BLOCK_N, rows, queries, length,
                    causal_offset, mask_ptr, stride_ml, stride_ms, seed, offset, first, dropout_p,
                    factor, E, EV, BLOCK_N, BLOCK_E1, BLOCK_E2, BLOCK_V1, BLOCK_V2, bounded == 1,
                    CAUSAL, MASK, DROPOUT, TMA, AHEAD, False, PRECISION,
                )  # fmt: skip
    if AHEAD:
        acc_1, acc_2 = _values(
            acc_1, acc_2, waiting.to(b_q1.dtype, bitcast=True), shrink, v_1, v_2, last, stride_vs,
            length, EV, BLOCK_N, BLOCK_V1, BLOCK_V2, BOTH, TMA, PRECISION,
        )  # fmt: skip
    return acc_1, acc_2, top, total


@triton.jit(
    do_not_specialize=[
        "H", "GROUP", "L", "S", "T", "longest_q", "longest_k", "stride_qb", "stride_qh",
        "stride_ql", "stride_kb", "stride_kh", "stride_ks", "stride_vb", "stride_vh", "stride_vs",
        "stride_k2b", "stride_k2h", "stride_k2s", "stride_v2b", "stride_v2h", "stride_v2s",
        "stride_ob", "stride_oh", "stride_ol", "stride_lb", "stride_lh", "stride_mb", "stride_mh",
        "stride_ml", "stride_ms",
    ]
)  # fmt: skip
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k2_ptr,  # of the second stream of keys, if TWO
    v2_ptr,
    out_ptr,
    lse_ptr,
    q_span_ptr,
    k_span_ptr,
    k2_span_ptr,
    mask_ptr,
    stride_mb,
    stride_mh,
    stride_ml,
    stride_ms,
    seed_ptr,
    offset_ptr,
    dropout_p: tl.float32,
    growth: tl.float64,
    scale: tl.float64,
    H,
    GROUP,  # heads of queries for one of keys
    L,
    S,
    T,  # of the second stream
    longest_q,
    longest_k,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_k2b,
    stride_k2h,
    stride_k2s,
    stride_v2b,
    stride_v2h,
    stride_v2s,
    stride_ob,
    stride_oh,
    stride_ol,
    stride_lb,
    stride_lh,
    FACTOR: tl.constexpr,  # all strides of numbers are multiples of it
    Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr,
    K2_KIND: tl.constexpr,
    TWO: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E1: tl.constexpr,
    BLOCK_E2: tl.constexpr,
    BLOCK_V1: tl.constexpr,
    BLOCK_V2: tl.constexpr,
    TMA: tl.constexpr,  # tiles come by descriptors
    AHEAD: tl.constexpr,
    SPECIAL: tl.constexpr,  # one group of warps fetches what two others multiply
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    place = tl.program_id(0)
    num_blocks = tl.cdiv(longest_q, BLOCK_M)
    # Those with most keys first, where causality makes a difference.
    first_row = (num_blocks - 1 - place % num_blocks) * BLOCK_M
    head = (place // num_blocks % H).to(tl.int64)
    batch = (place // num_blocks // H).to(tl.int64)
    begin, length = span(q_span_ptr, batch, L, longest_q, Q_KIND)
    rows = first_row + tl.arange(0, BLOCK_M)
    # What is stored: of a sequence among others nothing beyond it.
    stored = length if Q_KIND == BEGINS else tl.cast(L, tl.int32)
    # Without a condition where warps have tasks of their own.
    present = True if SPECIAL else first_row < stored
    if present:
        stride_ql = multiple(stride_ql, FACTOR)
        q_ptr += batch * multiple(stride_qb, FACTOR) + head * multiple(stride_qh, FACTOR)
        q_ptr += begin * stride_ql
        q_1, q_2 = sources_of_tiles(q_ptr, stride_ql, length, BLOCK_M, BLOCK_E1, BLOCK_E2, E, TMA)
        b_q1, b_q2 = tiles(
            q_1, q_2, first_row, stride_ql, length, BLOCK_M, BLOCK_E1, BLOCK_E2, E, True, TMA
        )
        mask_ptr += batch * stride_mb + head * stride_mh
        factor = (tl.full([], scale, tl.float64) * LOG2_E).to(dtype)
        seed = 0
        offset = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
            offset = tl.load(offset_ptr)
        first = (batch * H + head) * L * S
        acc_1 = tl.zeros([BLOCK_M, BLOCK_V1], dtype)
        acc_2 = tl.zeros([BLOCK_M, BLOCK_V2 if BLOCK_V2 > 0 else 1], dtype)
        top = tl.full([BLOCK_M], float("-inf"), dtype)
        total = tl.zeros([BLOCK_M], dtype)
        kv_head = head // GROUP
        acc_1, acc_2, top, total = _stream(
            acc_1, acc_2, top, total, b_q1, b_q2, k_ptr, v_ptr, k_span_ptr, batch, kv_head,
            first_row, rows, length, S, longest_k, stride_kb, stride_kh, stride_ks, stride_vb,
            stride_vh, stride_vs, mask_ptr, stride_ml, stride_ms, seed, offset, first, dropout_p,
            factor, FACTOR, K_KIND, E, EV, BLOCK_M, BLOCK_N, BLOCK_E1, BLOCK_E2, BLOCK_V1, BLOCK_V2,
            CAUSAL, MASK, DROPOUT, TMA, AHEAD, SPECIAL, PRECISION,
        )  # fmt: skip
        if TWO:
            acc_1, acc_2, top, total = _stream(
                acc_1, acc_2, top, total, b_q1, b_q2, k2_ptr, v2_ptr, k2_span_ptr, batch, kv_head,
                first_row, rows, length, T, T, stride_k2b, stride_k2h, stride_k2s, stride_v2b,
                stride_v2h, stride_v2s, mask_ptr, stride_ml, stride_ms, seed, offset, first,
                dropout_p, factor, FACTOR, K2_KIND, E, EV, BLOCK_M, BLOCK_N, BLOCK_E1, BLOCK_E2,
                BLOCK_V1, BLOCK_V2, CAUSAL, MASK, DROPOUT, TMA, AHEAD, SPECIAL, PRECISION,
            )  # fmt: skip
        empty = (total == 0) | (rows >= length)
        b_lse = tl.where(empty, float("-inf"), top * LN_2 + tl.log(total))
        lse_ptr += batch * stride_lb + head * stride_lh + begin
        tl.store(lse_ptr + rows, b_lse, mask=rows < stored)
        share = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
        if DROPOUT:
            share = share * tl.full([], growth, tl.float64).to(dtype)
        stride_ol = multiple(stride_ol, FACTOR)
        out_ptr += batch * multiple(stride_ob, FACTOR) + head * multiple(stride_oh, FACTOR)
        out_ptr += begin * stride_ol
        out_dtype: tl.constexpr = out_ptr.dtype.element_ty
        b_out = rounded(acc_1 * share[:, None], out_dtype)
        store_tile(out_ptr, rows, stride_ol, stored, b_out, 0, BLOCK_V1, EV)
        if BLOCK_V2 > 0:
            b_out = rounded(acc_2 * share[:, None], out_dtype)
            store_tile(out_ptr, rows, stride_ol, stored, b_out, BLOCK_V1, BLOCK_V2, EV)


forward = Tuned(
    attention_forward_kernel,
    [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "TMA": False, "AHEAD": False, "SPECIAL": False})],
    KEY,
    forward_configs,
)


def lse_strides(lse: Tensor) -> tuple[int, int]:
    """Of samples and heads, of (B, H, L), or of (H, L) for all samples."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def attention_forward(
    query: Tensor,  # (B, H, L, E), B expanded where sequences lie one behind the other
    keys: list[tuple[Tensor, Tensor, Tokens]],  # (B, Hkv, S, E) and (B, Hkv, S, Ev), one or two
    out: Tensor,  # (B, H, L, Ev)
    lse: Tensor,  # (B, H, L), or (H, L)
    scale: float,
    tokens: Tokens,  # of the queries
    limits: Limits,
) -> None:
    """Fills ``out`` and ``lse``."""
    (batch, heads, _, width), value_width = query.shape, out.shape[3]
    check_widths(width, value_width)
    if batch * heads * tokens.longest == 0:
        return
    query = heads_of(query)
    streams = [(heads_of(k), heads_of(v), t) for k, v, t in keys]
    (k, v, of_keys), (k2, v2, of_keys2) = streams[0], streams[-1]
    sizes = blocks(width, value_width)
    given, constants = limits.arguments(query)
    strided = (query, k, v, k2, v2, out)
    with scratch(query.device):
        forward[lambda meta: (triton.cdiv(tokens.longest, meta["BLOCK_M"]) * heads * batch,)](
            query, k, v, k2, v2, out, lse, tokens.pointer(query), of_keys.pointer(query),
            of_keys2.pointer(query), *given, limits.growth, scale, heads,
            heads // max(k.shape[1], 1), tokens.rows, of_keys.rows, of_keys2.rows, tokens.longest,
            of_keys.longest, *(n for t in strided for n in head_strides(t)), *lse_strides(lse),
            FACTOR=factor_of(*strided), Q_KIND=tokens.kind, K_KIND=of_keys.kind,
            K2_KIND=of_keys2.kind, TWO=len(keys) > 1, PRECISION=precision(query.dtype), **sizes,
            **constants,
            facts=facts(query.dtype, scale, tokens.longest, of_keys.longest, of_keys2.rows),
        )  # fmt: skip
