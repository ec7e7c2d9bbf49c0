"""Attention backward in Triton, queries: a block of them meets the keys.

Probabilities are made again from the logarithms of their sums. The sums over grad_out * out are
left behind, which ``attention_key_gradient.py`` reads. Where the gradient of a mask is wanted, that
of the scores is stored too, a matrix of L x S for each head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.attention import (
    BEGINS,
    BOTTOM_RIGHT,
    LOG2_E,
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
    load_tile,
    logarithm,
    product,
    sources_of_tiles,
    span,
    store_tile,
    tiles,
)
from mmfast.kernels.attention_forward import lse_strides
from mmfast.kernels.attention_tiles import (
    KEY,
    facts,
    precision,
    query_gradient_configs,
)
from mmfast.kernels.common import dot, multiple, rounded, scratch
from mmfast.kernels.tuned import Tuned


@triton.jit
def _query_block(
    acc_1, acc_2, b_q1, b_q2, b_g1, b_g2, b_lse, b_delta, k_1, k_2, v_1, v_2, scores_ptr, stride_ks,
    stride_vs, start, rows, queries, length, causal_offset, mask_ptr, stride_ml, stride_ms, seed,
    offset, first, dropout_p, growth, factor,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E1: tl.constexpr,
    BLOCK_E2: tl.constexpr, BLOCK_V1: tl.constexpr, BLOCK_V2: tl.constexpr, BOUNDED: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, STORE: tl.constexpr,
    TMA: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of keys."""
    columns = start + tl.arange(0, BLOCK_N)
    b_k1, b_k2 = tiles(
        k_1, k_2, start, stride_ks, length, BLOCK_N, BLOCK_E1, BLOCK_E2, E, BOUNDED, TMA
    )
    b_v1, b_v2 = tiles(
        v_1, v_2, start, stride_vs, length, BLOCK_N, BLOCK_V1, BLOCK_V2, EV, BOUNDED, TMA
    )
    b_s = product(b_q1, b_q2, b_k1, b_k2, b_lse.dtype, BLOCK_E2 > 0, PRECISION)
    if AHEAD:
        # So that the exponentials can be made meanwhile.
        b_gp = product(b_g1, b_g2, b_v1, b_v2, b_lse.dtype, BLOCK_V2 > 0, PRECISION)
    b_s = limited(
        b_s * factor, rows[:, None], columns[None, :], queries, length, causal_offset,
        mask_ptr, stride_ml, stride_ms, BOUNDED, CAUSAL, MASK,
    )  # fmt: skip
    b_p = tl.exp2(b_s - b_lse[:, None])
    if not AHEAD:
        b_gp = product(b_g1, b_g2, b_v1, b_v2, b_lse.dtype, BLOCK_V2 > 0, PRECISION)
    if DROPOUT:
        b_gp = growth * kept(
            b_gp, seed, offset, first, rows[:, None], columns[None, :], length, dropout_p
        )
    b_gs = b_p * (b_gp - b_delta[:, None])
    if STORE:
        p_scores = scores_ptr + (rows.to(tl.int64)[:, None] * length + columns[None, :])
        inside = (rows < queries)[:, None] & (columns < length)[None, :]
        tl.store(p_scores, b_gs, mask=inside)
    b_gs = rounded(b_gs, b_k1.dtype)
    acc_1 = dot(b_gs, b_k1, acc_1, PRECISION)
    if BLOCK_E2 > 0:
        acc_2 = dot(b_gs, b_k2, acc_2, PRECISION)
    return acc_1, acc_2


@triton.jit
def _query_gradient(
    acc_1, acc_2, b_q1, b_q2, b_g1, b_g2, b_lse, b_delta, k_ptr, v_ptr, scores_ptr, span_ptr, batch,
    head, first_row, rows, queries, num_keys, longest, stride_kb, stride_kh, stride_ks, stride_vb,
    stride_vh, stride_vs, mask_ptr, stride_ml, stride_ms, seed, offset, first, dropout_p, growth,
    factor,
    FACTOR: tl.constexpr, KIND: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_E2: tl.constexpr,
    BLOCK_V1: tl.constexpr, BLOCK_V2: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, STORE: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys of a stream."""
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
    full = tl.where(first_row < queries, full, 0)
    high = tl.where(first_row < queries, high, 0)
    k_1, k_2 = sources_of_tiles(k_ptr, stride_ks, length, BLOCK_N, BLOCK_E1, BLOCK_E2, E, TMA)
    v_1, v_2 = sources_of_tiles(v_ptr, stride_vs, length, BLOCK_N, BLOCK_V1, BLOCK_V2, EV, TMA)
    # If AHEAD, blocks of keys of which all take part are without a mask.
    for bounded in tl.static_range(0 if AHEAD else 1, 2):
        for start in tl.range(full if AHEAD and bounded else 0, high if bounded else full, BLOCK_N):
            acc_1, acc_2 = _query_block(
                acc_1, acc_2, b_q1, b_q2, b_g1, b_g2, b_lse, b_delta, k_1, k_2, v_1, v_2,
                scores_ptr, stride_ks, stride_vs, start, rows, queries, length, causal_offset,
                mask_ptr, stride_ml, stride_ms, seed, offset, first, dropout_p, growth, factor, E,
                EV, BLOCK_N, BLOCK_E1, BLOCK_E2, BLOCK_V1, BLOCK_V2, bounded == 1, CAUSAL, MASK,
                DROPOUT, STORE, TMA, AHEAD, PRECISION,
            )  # fmt: skip
    return acc_1, acc_2


@triton.jit(
    do_not_specialize=[
        "H", "GROUP", "L", "S", "T", "longest_q", "longest_k", "stride_qb", "stride_qh",
        "stride_ql", "stride_gb", "stride_gh", "stride_gl", "stride_ob", "stride_oh", "stride_ol",
        "stride_kb", "stride_kh", "stride_ks", "stride_vb", "stride_vh", "stride_vs",
        "stride_k2b", "stride_k2h", "stride_k2s", "stride_v2b", "stride_v2h", "stride_v2s",
        "stride_db", "stride_dh", "stride_dl", "stride_lb", "stride_lh", "stride_mb", "stride_mh",
        "stride_ml", "stride_ms",
    ]
)  # fmt: skip
def attention_query_gradient_kernel(
    q_ptr,
    grad_ptr,
    out_ptr,
    k_ptr,
    v_ptr,
    k2_ptr,  # of the second stream of keys, if TWO
    v2_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    scores_ptr,  # [B, H, L, S], if STORE
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
    GROUP,
    L,
    S,
    T,
    longest_q,
    longest_k,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_gb,
    stride_gh,
    stride_gl,
    stride_ob,
    stride_oh,
    stride_ol,
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
    stride_db,
    stride_dh,
    stride_dl,
    stride_lb,
    stride_lh,
    FACTOR: tl.constexpr,
    Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr,
    K2_KIND: tl.constexpr,
    TWO: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORE: tl.constexpr,
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
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    place = tl.program_id(0)
    num_blocks = tl.cdiv(longest_q, BLOCK_M)
    first_row = (num_blocks - 1 - place % num_blocks) * BLOCK_M
    head = (place // num_blocks % H).to(tl.int64)
    batch = (place // num_blocks // H).to(tl.int64)
    begin, length = span(q_span_ptr, batch, L, longest_q, Q_KIND)
    rows = first_row + tl.arange(0, BLOCK_M)
    stored = length if Q_KIND == BEGINS else tl.cast(L, tl.int32)
    if first_row < stored:
        stride_ql = multiple(stride_ql, FACTOR)
        stride_gl = multiple(stride_gl, FACTOR)
        stride_ol = multiple(stride_ol, FACTOR)
        q_ptr += batch * multiple(stride_qb, FACTOR) + head * multiple(stride_qh, FACTOR)
        grad_ptr += batch * multiple(stride_gb, FACTOR) + head * multiple(stride_gh, FACTOR)
        out_ptr += batch * multiple(stride_ob, FACTOR) + head * multiple(stride_oh, FACTOR)
        q_ptr += begin * stride_ql
        grad_ptr += begin * stride_gl
        out_ptr += begin * stride_ol
        b_g1 = load_tile(grad_ptr, rows, stride_gl, length, 0, BLOCK_V1, EV, True)
        b_out = load_tile(out_ptr, rows, stride_ol, length, 0, BLOCK_V1, EV, True)
        b_delta = tl.sum(b_g1.to(dtype) * b_out.to(dtype), 1)
        b_g2 = b_g1
        if BLOCK_V2 > 0:
            b_g2 = load_tile(grad_ptr, rows, stride_gl, length, BLOCK_V1, BLOCK_V2, EV, True)
            b_out = load_tile(out_ptr, rows, stride_ol, length, BLOCK_V1, BLOCK_V2, EV, True)
            b_delta += tl.sum(b_g2.to(dtype) * b_out.to(dtype), 1)
        place_l = batch * stride_lb + head * stride_lh + begin
        tl.store(delta_ptr + place_l + rows, b_delta, mask=rows < stored)
        b_lse = tl.load(lse_ptr + place_l + rows, mask=rows < length, other=float("-inf"))
        b_lse = logarithm(b_lse)
        b_q1 = load_tile(q_ptr, rows, stride_ql, length, 0, BLOCK_E1, E, True)
        b_q2 = b_q1
        if BLOCK_E2 > 0:
            b_q2 = load_tile(q_ptr, rows, stride_ql, length, BLOCK_E1, BLOCK_E2, E, True)
        mask_ptr += batch * stride_mb + head * stride_mh
        factor = (tl.full([], scale, tl.float64) * LOG2_E).to(dtype)
        grown = tl.full([], growth, tl.float64).to(dtype)
        seed = 0
        offset = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
            offset = tl.load(offset_ptr)
        first = (batch * H + head) * L * S
        scores_ptr += first
        acc_1 = tl.zeros([BLOCK_M, BLOCK_E1], dtype)
        acc_2 = tl.zeros([BLOCK_M, BLOCK_E2 if BLOCK_E2 > 0 else 1], dtype)
        kv_head = head // GROUP
        acc_1, acc_2 = _query_gradient(
            acc_1, acc_2, b_q1, b_q2, b_g1, b_g2, b_lse, b_delta, k_ptr, v_ptr, scores_ptr,
            k_span_ptr, batch, kv_head, first_row, rows, length, S, longest_k, stride_kb, stride_kh,
            stride_ks, stride_vb, stride_vh, stride_vs, mask_ptr, stride_ml, stride_ms, seed,
            offset, first, dropout_p, grown, factor, FACTOR, K_KIND, E, EV, BLOCK_M, BLOCK_N,
            BLOCK_E1, BLOCK_E2, BLOCK_V1, BLOCK_V2, CAUSAL, MASK, DROPOUT, STORE, TMA, AHEAD,
            PRECISION,
        )  # fmt: skip
        if TWO:
            acc_1, acc_2 = _query_gradient(
                acc_1, acc_2, b_q1, b_q2, b_g1, b_g2, b_lse, b_delta, k2_ptr, v2_ptr, scores_ptr,
                k2_span_ptr, batch, kv_head, first_row, rows, length, T, T, stride_k2b, stride_k2h,
                stride_k2s, stride_v2b, stride_v2h, stride_v2s, mask_ptr, stride_ml, stride_ms,
                seed, offset, first, dropout_p, grown, factor, FACTOR, K2_KIND, E, EV, BLOCK_M,
                BLOCK_N, BLOCK_E1, BLOCK_E2, BLOCK_V1, BLOCK_V2, CAUSAL, MASK, DROPOUT, False, TMA,
                AHEAD, PRECISION,
            )  # fmt: skip
        stride_dl = multiple(stride_dl, FACTOR)
        dq_ptr += batch * multiple(stride_db, FACTOR) + head * multiple(stride_dh, FACTOR)
        dq_ptr += begin * stride_dl
        out_dtype: tl.constexpr = dq_ptr.dtype.element_ty
        last = tl.full([], scale, tl.float64).to(dtype)
        b_dq = rounded(acc_1 * last, out_dtype)
        store_tile(dq_ptr, rows, stride_dl, stored, b_dq, 0, BLOCK_E1, E)
        if BLOCK_E2 > 0:
            b_dq = rounded(acc_2 * last, out_dtype)
            store_tile(dq_ptr, rows, stride_dl, stored, b_dq, BLOCK_E1, BLOCK_E2, E)


query_kernel = Tuned(
    attention_query_gradient_kernel,
    [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "TMA": False, "AHEAD": False})],
    KEY,
    query_gradient_configs,
)


def query_gradient(
    query: Tensor,  # (B, H, L, E), B expanded where sequences lie one behind the other
    grad_out: Tensor,  # (B, H, L, Ev)
    out: Tensor,  # (B, H, L, Ev)
    keys: list[tuple[Tensor, Tensor, Tokens]],  # (B, Hkv, S, E) and (B, Hkv, S, Ev), one or two
    grad_query: Tensor,  # (B, H, L, E)
    lse: Tensor,  # (B, H, L), or (H, L); contiguous, as the next
    delta: Tensor,
    grad_scores: Tensor | None,  # (B, H, L, S)
    scale: float,
    tokens: Tokens,  # of the queries
    limits: Limits,
) -> None:
    """Fills ``grad_query``, ``delta`` and, if there is one, ``grad_scores``."""
    (batch, heads, _, width), value_width = query.shape, out.shape[3]
    check_widths(width, value_width)
    if batch * heads * tokens.longest == 0:
        return
    query, grad_out, out = heads_of(query), heads_of(grad_out), heads_of(out)
    streams = [(heads_of(k), heads_of(v), t) for k, v, t in keys]
    (k, v, of_keys), (k2, v2, of_keys2) = streams[0], streams[-1]
    sizes = blocks(width, value_width)
    given, constants = limits.arguments(query)
    strided = (query, grad_out, out, k, v, k2, v2, grad_query)
    with scratch(query.device):
        query_kernel[lambda meta: (triton.cdiv(tokens.longest, meta["BLOCK_M"]) * heads * batch,)](
            query, grad_out, out, k, v, k2, v2, grad_query, lse, delta,
            delta if grad_scores is None else grad_scores, tokens.pointer(query),
            of_keys.pointer(query), of_keys2.pointer(query), *given, limits.growth, scale, heads,
            heads // max(k.shape[1], 1), tokens.rows, of_keys.rows, of_keys2.rows, tokens.longest,
            of_keys.longest, *(n for t in strided for n in head_strides(t)), *lse_strides(lse),
            FACTOR=factor_of(*strided), Q_KIND=tokens.kind, K_KIND=of_keys.kind,
            K2_KIND=of_keys2.kind, TWO=len(keys) > 1, STORE=grad_scores is not None,
            PRECISION=precision(query.dtype), **sizes, **constants,
            facts=facts(query.dtype, scale, tokens.longest, of_keys.longest, of_keys2.rows),
        )  # fmt: skip
