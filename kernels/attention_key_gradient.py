"""Attention backward in Triton, keys and values: a block of them meets the queries of all heads of
its group, after ``attention_query_gradient.py``. No two programs add to one number.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.attention import (
    BEGINS,
    BOTTOM_RIGHT,
    LENGTHS,
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
    key_gradient_configs,
    precision,
)
from mmfast.kernels.common import dot, multiple, rounded, scratch
from mmfast.kernels.tuned import Tuned


@triton.jit
def _key_block(
    dk_1, dk_2, dv_1, dv_2, b_k1, b_k2, b_v1, b_v2, q_1, q_2, g_1, g_2, p_lse, p_delta, stride_ql,
    stride_gl, start, columns, num_keys, length_k, length, causal_offset, mask_ptr, stride_ml,
    stride_ms, seed, offset, first, dropout_p, growth, factor,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E1: tl.constexpr,
    BLOCK_E2: tl.constexpr, BLOCK_V1: tl.constexpr, BLOCK_V2: tl.constexpr, BOUNDED: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries. Tiles are [keys, queries]."""
    rows = start + tl.arange(0, BLOCK_M)
    b_q1, b_q2 = tiles(
        q_1, q_2, start, stride_ql, length, BLOCK_M, BLOCK_E1, BLOCK_E2, E, True, TMA
    )
    b_lse = tl.load(p_lse + rows, mask=rows < length, other=float("-inf"))
    b_delta = tl.load(p_delta + rows, mask=rows < length, other=0.0)
    b_s = product(b_k1, b_k2, b_q1, b_q2, b_lse.dtype, BLOCK_E2 > 0, PRECISION)
    if not AHEAD:
        b_s = limited(
            b_s * factor, rows[None, :], columns[:, None], length, length_k, causal_offset,
            mask_ptr, stride_ml, stride_ms, BOUNDED, CAUSAL, MASK,
        )  # fmt: skip
        b_p = tl.exp2(b_s - logarithm(b_lse)[None, :])
    b_g1, b_g2 = tiles(
        g_1, g_2, start, stride_gl, length, BLOCK_M, BLOCK_V1, BLOCK_V2, EV, True, TMA
    )
    b_gp = product(b_v1, b_v2, b_g1, b_g2, b_lse.dtype, BLOCK_V2 > 0, PRECISION)
    if AHEAD:
        # Here, so that the exponentials can be made while that product is.
        b_s = limited(
            b_s * factor, rows[None, :], columns[:, None], length, length_k, causal_offset,
            mask_ptr, stride_ml, stride_ms, BOUNDED, CAUSAL, MASK,
        )  # fmt: skip
        b_p = tl.exp2(b_s - logarithm(b_lse)[None, :])
    b_left = b_p
    if DROPOUT:
        b_one = growth * kept(
            b_p * 0 + 1, seed, offset, first, rows[None, :], columns[:, None], num_keys, dropout_p
        )
        b_left = b_p * b_one
        b_gp = b_gp * b_one
    b_left = rounded(b_left, b_g1.dtype)
    dv_1 = dot(b_left, b_g1, dv_1, PRECISION)
    if BLOCK_V2 > 0:
        dv_2 = dot(b_left, b_g2, dv_2, PRECISION)
    b_gs = rounded(b_p * (b_gp - b_delta[None, :]), b_q1.dtype)
    dk_1 = dot(b_gs, b_q1, dk_1, PRECISION)
    if BLOCK_E2 > 0:
        dk_2 = dot(b_gs, b_q2, dk_2, PRECISION)
    return dk_1, dk_2, dv_1, dv_2


@triton.jit
def _key_gradient(
    dk_1, dk_2, dv_1, dv_2, b_k1, b_k2, b_v1, b_v2, q_ptr, grad_ptr, lse_ptr, delta_ptr, span_ptr,
    batch, kv_head, first_key, columns, num_keys, length_k, num_queries, longest, H, GROUP,
    stride_qb, stride_qh, stride_ql, stride_gb, stride_gh, stride_gl, stride_lb, stride_lh,
    mask_ptr, stride_mh, stride_ml, stride_ms, seed, offset, dropout_p, growth, factor,
    FACTOR: tl.constexpr, KIND: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_E2: tl.constexpr,
    BLOCK_V1: tl.constexpr, BLOCK_V2: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All queries of a stream, of all heads of the group."""
    stride_ql = multiple(stride_ql, FACTOR)
    stride_gl = multiple(stride_gl, FACTOR)
    begin, length = span(span_ptr, batch, num_queries, longest, KIND)
    causal_offset = 0
    low = 0
    if CAUSAL != NOT_CAUSAL:
        if CAUSAL == BOTTOM_RIGHT:
            causal_offset = length_k - length
        low = tl.maximum(first_key - causal_offset, 0) // BLOCK_M * BLOCK_M
    q_ptr += batch * multiple(stride_qb, FACTOR) + begin * stride_ql
    grad_ptr += batch * multiple(stride_gb, FACTOR) + begin * stride_gl
    place_l = batch * stride_lb + begin
    high = tl.where(first_key < length_k, length, 0)
    # If AHEAD, only blocks that causality cuts have a mask. What keys beyond the last leave is not
    # used, and queries beyond it have no probabilities.
    full = low
    if CAUSAL != NOT_CAUSAL:
        full = tl.maximum(first_key + BLOCK_N - 1 - causal_offset + BLOCK_M - 1, 0)
        full = tl.maximum(tl.minimum(full // BLOCK_M * BLOCK_M, high), low)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        p_q = q_ptr + head * multiple(stride_qh, FACTOR)
        p_grad = grad_ptr + head * multiple(stride_gh, FACTOR)
        p_lse = lse_ptr + place_l + head * stride_lh
        p_delta = delta_ptr + place_l + head * stride_lh
        first = (batch * H + head) * num_queries * num_keys
        q_1, q_2 = sources_of_tiles(p_q, stride_ql, length, BLOCK_M, BLOCK_E1, BLOCK_E2, E, TMA)
        g_1, g_2 = sources_of_tiles(p_grad, stride_gl, length, BLOCK_M, BLOCK_V1, BLOCK_V2, EV, TMA)
        cut: tl.constexpr = CAUSAL != NOT_CAUSAL
        for whole in tl.static_range(0 if cut or not AHEAD else 1, 2 if AHEAD else 1):
            for start in tl.range(
                full if whole else low, high if whole or not AHEAD else full, BLOCK_M
            ):
                dk_1, dk_2, dv_1, dv_2 = _key_block(
                    dk_1, dk_2, dv_1, dv_2, b_k1, b_k2, b_v1, b_v2, q_1, q_2, g_1, g_2, p_lse,
                    p_delta, stride_ql, stride_gl, start, columns, num_keys, length_k, length,
                    causal_offset, mask_ptr + head * stride_mh, stride_ml, stride_ms, seed, offset,
                    first, dropout_p, growth, factor, E, EV, BLOCK_M, BLOCK_E1, BLOCK_E2, BLOCK_V1,
                    BLOCK_V2, whole == 0, CAUSAL, MASK, DROPOUT, TMA, AHEAD, PRECISION,
                )  # fmt: skip
    return dk_1, dk_2, dv_1, dv_2


@triton.jit(
    do_not_specialize=[
        "H", "GROUP", "L", "S", "T", "longest_q", "longest_k", "stride_kb", "stride_kh",
        "stride_ks", "stride_vb", "stride_vh", "stride_vs", "stride_qb", "stride_qh", "stride_ql",
        "stride_gb", "stride_gh", "stride_gl", "stride_q2b", "stride_q2h", "stride_q2l",
        "stride_g2b", "stride_g2h", "stride_g2l", "stride_dkb", "stride_dkh", "stride_dks",
        "stride_dvb", "stride_dvh", "stride_dvs", "stride_lb", "stride_lh", "stride_l2b",
        "stride_l2h", "stride_mb", "stride_mh", "stride_ml", "stride_ms",
    ]
)  # fmt: skip
def attention_key_gradient_kernel(
    k_ptr,
    v_ptr,
    q_ptr,
    grad_ptr,
    q2_ptr,  # of the second stream of queries, if TWO
    grad2_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    delta2_ptr,
    k_span_ptr,
    q_span_ptr,
    q2_span_ptr,
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
    T,  # of the second stream
    longest_q,
    longest_k,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_gb,
    stride_gh,
    stride_gl,
    stride_q2b,
    stride_q2h,
    stride_q2l,
    stride_g2b,
    stride_g2h,
    stride_g2l,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    stride_lb,
    stride_lh,
    stride_l2b,
    stride_l2h,
    FACTOR: tl.constexpr,
    K_KIND: tl.constexpr,
    Q_KIND: tl.constexpr,
    Q2_KIND: tl.constexpr,
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
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    place = tl.program_id(0)
    num_blocks = tl.cdiv(longest_k, BLOCK_N)
    first_key = place % num_blocks * BLOCK_N
    kv_heads = H // GROUP
    kv_head = (place // num_blocks % kv_heads).to(tl.int64)
    batch = (place // num_blocks // kv_heads).to(tl.int64)
    begin, length = span(k_span_ptr, batch, S, longest_k, K_KIND)
    columns = first_key + tl.arange(0, BLOCK_N)
    stored = length if K_KIND == BEGINS else tl.cast(S, tl.int32)
    if first_key < stored:
        stride_ks = multiple(stride_ks, FACTOR)
        stride_vs = multiple(stride_vs, FACTOR)
        k_ptr += batch * multiple(stride_kb, FACTOR) + kv_head * multiple(stride_kh, FACTOR)
        v_ptr += batch * multiple(stride_vb, FACTOR) + kv_head * multiple(stride_vh, FACTOR)
        k_ptr += begin * stride_ks
        v_ptr += begin * stride_vs
        b_k1 = load_tile(k_ptr, columns, stride_ks, length, 0, BLOCK_E1, E, True)
        b_k2 = b_k1
        if BLOCK_E2 > 0:
            b_k2 = load_tile(k_ptr, columns, stride_ks, length, BLOCK_E1, BLOCK_E2, E, True)
        b_v1 = load_tile(v_ptr, columns, stride_vs, length, 0, BLOCK_V1, EV, True)
        b_v2 = b_v1
        if BLOCK_V2 > 0:
            b_v2 = load_tile(v_ptr, columns, stride_vs, length, BLOCK_V1, BLOCK_V2, EV, True)
        mask_ptr += batch * stride_mb
        factor = (tl.full([], scale, tl.float64) * LOG2_E).to(dtype)
        grown = tl.full([], growth, tl.float64).to(dtype)
        seed = 0
        offset = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
            offset = tl.load(offset_ptr)
        dk_1 = tl.zeros([BLOCK_N, BLOCK_E1], dtype)
        dk_2 = tl.zeros([BLOCK_N, BLOCK_E2 if BLOCK_E2 > 0 else 1], dtype)
        dv_1 = tl.zeros([BLOCK_N, BLOCK_V1], dtype)
        dv_2 = tl.zeros([BLOCK_N, BLOCK_V2 if BLOCK_V2 > 0 else 1], dtype)
        dk_1, dk_2, dv_1, dv_2 = _key_gradient(
            dk_1, dk_2, dv_1, dv_2, b_k1, b_k2, b_v1, b_v2, q_ptr, grad_ptr, lse_ptr, delta_ptr,
            q_span_ptr, batch, kv_head, first_key, columns, S, length, L, longest_q, H, GROUP,
            stride_qb, stride_qh, stride_ql, stride_gb, stride_gh, stride_gl, stride_lb, stride_lh,
            mask_ptr, stride_mh, stride_ml, stride_ms, seed, offset, dropout_p, grown, factor,
            FACTOR, Q_KIND, E, EV, BLOCK_M, BLOCK_N, BLOCK_E1, BLOCK_E2, BLOCK_V1, BLOCK_V2, CAUSAL,
            MASK, DROPOUT, TMA, AHEAD, PRECISION,
        )  # fmt: skip
        if TWO:
            dk_1, dk_2, dv_1, dv_2 = _key_gradient(
                dk_1, dk_2, dv_1, dv_2, b_k1, b_k2, b_v1, b_v2, q2_ptr, grad2_ptr, lse2_ptr,
                delta2_ptr, q2_span_ptr, batch, kv_head, first_key, columns, S, length, T, T, H,
                GROUP, stride_q2b, stride_q2h, stride_q2l, stride_g2b, stride_g2h, stride_g2l,
                stride_l2b, stride_l2h, mask_ptr, stride_mh, stride_ml, stride_ms, seed, offset,
                dropout_p, grown, factor, FACTOR, Q2_KIND, E, EV, BLOCK_M, BLOCK_N, BLOCK_E1,
                BLOCK_E2, BLOCK_V1, BLOCK_V2, CAUSAL, MASK, DROPOUT, TMA, AHEAD, PRECISION,
            )  # fmt: skip
        if AHEAD and K_KIND == LENGTHS:
            used = (columns < length)[:, None]
            dk_1 = tl.where(used, dk_1, 0.0)
            dk_2 = tl.where(used, dk_2, 0.0)
            dv_1 = tl.where(used, dv_1, 0.0)
            dv_2 = tl.where(used, dv_2, 0.0)
        stride_dks = multiple(stride_dks, FACTOR)
        stride_dvs = multiple(stride_dvs, FACTOR)
        dk_ptr += batch * multiple(stride_dkb, FACTOR) + kv_head * multiple(stride_dkh, FACTOR)
        dv_ptr += batch * multiple(stride_dvb, FACTOR) + kv_head * multiple(stride_dvh, FACTOR)
        dk_ptr += begin * stride_dks
        dv_ptr += begin * stride_dvs
        out_dtype: tl.constexpr = dk_ptr.dtype.element_ty
        last = tl.full([], scale, tl.float64).to(dtype)
        b_out = rounded(dk_1 * last, out_dtype)
        store_tile(dk_ptr, columns, stride_dks, stored, b_out, 0, BLOCK_E1, E)
        if BLOCK_E2 > 0:
            b_out = rounded(dk_2 * last, out_dtype)
            store_tile(dk_ptr, columns, stride_dks, stored, b_out, BLOCK_E1, BLOCK_E2, E)
        b_out = rounded(dv_1, out_dtype)
        store_tile(dv_ptr, columns, stride_dvs, stored, b_out, 0, BLOCK_V1, EV)
        if BLOCK_V2 > 0:
            b_out = rounded(dv_2, out_dtype)
            store_tile(dv_ptr, columns, stride_dvs, stored, b_out, BLOCK_V1, BLOCK_V2, EV)


key_kernel = Tuned(
    attention_key_gradient_kernel,
    [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "TMA": False, "AHEAD": False})],
    KEY,
    key_gradient_configs,
)


def key_gradient(
    key: Tensor,  # (B, Hkv, S, E)
    value: Tensor,  # (B, Hkv, S, Ev)
    # (B, H, L, E), (B, H, L, Ev), (B, H, L) or (H, L) twice; one or two
    queries: list[tuple[Tensor, Tensor, Tensor, Tensor, Tokens]],
    grad_key: Tensor,  # (B, Hkv, S, E)
    grad_value: Tensor,  # (B, Hkv, S, Ev)
    scale: float,
    tokens: Tokens,  # of the keys
    limits: Limits,
) -> None:
    """Fills ``grad_key`` and ``grad_value``; queries come with grad_out, lse and delta."""
    (batch, kv_heads, _, width), value_width = key.shape, value.shape[3]
    heads = queries[0][0].shape[1]
    check_widths(width, value_width)
    if batch * kv_heads * tokens.longest == 0:
        return
    key, value = heads_of(key), heads_of(value)
    streams = [(heads_of(q), heads_of(g), *others) for q, g, *others in queries]
    (q, g, lse, delta, of_queries), (q2, g2, lse2, delta2, of_queries2) = streams[0], streams[-1]
    sizes = blocks(width, value_width)
    given, constants = limits.arguments(key)
    strided = (key, value, q, g, q2, g2, grad_key, grad_value)
    with scratch(key.device):
        key_kernel[lambda meta: (triton.cdiv(tokens.longest, meta["BLOCK_N"]) * kv_heads * batch,)](
            key, value, q, g, q2, g2, grad_key, grad_value, lse, delta, lse2, delta2,
            tokens.pointer(key), of_queries.pointer(key), of_queries2.pointer(key), *given,
            limits.growth, scale, heads, heads // kv_heads, of_queries.rows, tokens.rows,
            of_queries2.rows, of_queries.longest, tokens.longest,
            *(n for t in strided for n in head_strides(t)), *lse_strides(lse), *lse_strides(lse2),
            FACTOR=factor_of(*strided), K_KIND=tokens.kind, Q_KIND=of_queries.kind,
            Q2_KIND=of_queries2.kind, TWO=len(queries) > 1, PRECISION=precision(key.dtype), **sizes,
            **constants,
            facts=facts(
                key.dtype, scale, of_queries.longest, of_queries2.rows, tokens.longest
            ),
        )  # fmt: skip
