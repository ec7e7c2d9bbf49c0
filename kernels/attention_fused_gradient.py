"""Attention backward in Triton for Hopper, in one pass: a block of keys and values meets all
queries of its head, and adds to their gradients too.

Five products of each pair of tiles, where ``attention_query_gradient.py`` and
``attention_key_gradient.py`` together need seven. The gradients of queries are added to float32
sums in global memory by descriptors: in the order of the blocks of keys, which take turns, if
ORDERED, else in any order. A kernel before it makes what it needs of each query, and one behind it
rounds the sums.
"""

from __future__ import annotations

from typing import Any

import torch
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
    head_strides,
    limited,
    load_tile,
    sources_of_tiles,
    span,
    store_tile,
    tiles,
)
from mmfast.kernels.attention_forward import lse_strides
from mmfast.kernels.attention_tiles import FUSED_KEY, TWO_KERNELS, fused_gradient_configs
from mmfast.kernels.common import ceil_div, dot, interpreting, multiple, rounded, scratch
from mmfast.kernels.tuned import Tuned

_INTERPRETING = tl.constexpr(interpreting())
_PADDED = 128  # rows: sequences begin at multiples of it in the workspace, which tiles divide


@triton.jit
def _place(begin, batch, rows, PADDED: tl.constexpr, KIND: tl.constexpr):
    """Where a sample's rows begin in the workspace: no tile holds rows of two samples."""
    if KIND == BEGINS:
        return (begin + batch * PADDED) // PADDED * PADDED
    else:
        return batch * (tl.cdiv(rows, PADDED) * PADDED)


@triton.jit
def _program(num_blocks, H, AGAIN: tl.constexpr):
    """The program's block of keys, head and sample; AGAIN: not as the compiler remembers them."""
    place = tl.program_id(0)
    if AGAIN and not _INTERPRETING:
        place = tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid.x;", "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1
        )
    return (
        place % num_blocks,
        (place // num_blocks % H).to(tl.int64),
        (place // num_blocks // H).to(tl.int64),
    )


@triton.jit
def _take_turn(turns_ptr, place, first):
    """Ends this program's turn at the block of queries before this one, and waits for that at this.

    The number there is that of the program whose turn it is. A turn ends when all that was added is
    there, which the next program then sees. Blocks before the ``first`` have no turns. As assembly,
    since Triton pipelines no loop with a barrier or a loop inside, and since all that a loop needs
    takes registers.
    """
    if not _INTERPRETING:
        # Triton itself waits until the copies are read, not until they are written.
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 thread, turn, own;
            .reg .b64 pointer;
            mad.wide.s32 pointer, $2, 4, $1;
            mov.u32 own, %ctaid.x;
            cp.async.bulk.wait_group 0;
            fence.proxy.async;
            bar.sync 0;
            mov.u32 thread, %tid.x;
            setp.eq.u32 p, thread, 0;
            setp.gt.and.s32 p, $2, $3, p;
            add.s32 turn, own, 1;
            @p st.release.gpu.global.b32 [pointer + -4], turn;
            setp.ge.s32 p, $2, $3;
            @!p bra ready;
            again:
            ld.acquire.gpu.global.b32 turn, [pointer];
            setp.ne.s32 p, turn, own;
            @p bra again;
            ready:
            fence.proxy.async;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r",
            [turns_ptr.to(tl.int64), place, first],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _end_turn(p_turn):
    """At the last block of queries."""
    if not _INTERPRETING:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 thread, turn;
            cp.async.bulk.wait_group 0;
            fence.proxy.async;
            bar.sync 0;
            mov.u32 thread, %tid.x;
            setp.eq.u32 p, thread, 0;
            mov.u32 turn, %ctaid.x;
            add.s32 turn, turn, 1;
            @p st.release.gpu.global.b32 [$1], turn;
            mov.b32 $0, 0;
            }""",
            "=r,l",
            [p_turn.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _add_tile(target, start, FIRST: tl.constexpr, b_x):
    """Adds to what is there; nothing beyond the sequence."""
    if _INTERPRETING:
        target.store([start, FIRST], target.load([start, FIRST]) + b_x)
    else:
        target.atomic_add([start, FIRST], b_x)


@triton.jit
def _add_queries(
    sum_1, sum_2, b_gs, b_k1, b_k2, start, turns_ptr, first_turn, low,
    BLOCK_M: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_E2: tl.constexpr, ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the block of queries at ``start``, of which ``b_gs`` [keys, queries] are the scores'."""
    b_gs = tl.trans(b_gs)
    b_1 = dot(b_gs, b_k1, tl.zeros([BLOCK_M, BLOCK_E1], tl.float32), PRECISION)
    if ORDERED:
        _take_turn(turns_ptr, first_turn + start // BLOCK_M, first_turn + low // BLOCK_M)
    _add_tile(sum_1, start, 0, b_1)
    if BLOCK_E2 > 0:
        b_2 = dot(b_gs, b_k2, tl.zeros([BLOCK_M, BLOCK_E2], tl.float32), PRECISION)
        _add_tile(sum_2, start, BLOCK_E1, b_2)


@triton.jit
def _block(
    dk_1, dk_2, dv_1, dv_2, b_k1, b_k2, b_v1, b_v2, q_1, q_2, g_1, g_2, p_rows, start, columns,
    length_k, length, causal_offset, mask_ptr, stride_ms, factor,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E1: tl.constexpr, BLOCK_E2: tl.constexpr, BLOCK_V1: tl.constexpr, BLOCK_V2: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries. Tiles are [keys, queries]."""
    rows = start + tl.arange(0, BLOCK_M)
    p_rows += 2 * start + tl.arange(0, BLOCK_M)
    b_q1, b_q2 = tiles(q_1, q_2, start, 0, length, BLOCK_M, BLOCK_E1, BLOCK_E2, E, True, True)
    # What is subtracted from the products is what they begin with: it needs no registers later.
    # Keys beyond the last have no probabilities, whatever the sum of a row is.
    b_s = tl.where((columns < length_k)[:, None], -tl.load(p_rows)[None, :], float("-inf"))
    b_s = dot(b_k1, tl.trans(b_q1), b_s, PRECISION)
    if BLOCK_E2 > 0:
        b_s = dot(b_k2, tl.trans(b_q2), b_s, PRECISION)
    b_gp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) - tl.load(p_rows + BLOCK_M)[None, :]
    b_g1, b_g2 = tiles(g_1, g_2, start, 0, length, BLOCK_M, BLOCK_V1, BLOCK_V2, EV, True, True)
    b_gp = dot(b_v1, tl.trans(b_g1), b_gp, PRECISION)
    if BLOCK_V2 > 0:
        b_gp = dot(b_v2, tl.trans(b_g2), b_gp, PRECISION)
    b_s = limited(
        b_s * factor, rows[None, :], columns[:, None], length, length_k, causal_offset, mask_ptr, 0,
        stride_ms, False, CAUSAL, MASK,
    )  # fmt: skip
    if CAUSAL != NOT_CAUSAL:
        b_s = tl.where(columns[:, None] <= rows[None, :] + causal_offset, b_s, float("-inf"))
    b_p = tl.exp2(b_s)
    b_left = rounded(b_p, b_g1.dtype)
    dv_1 = dot(b_left, b_g1, dv_1, PRECISION)
    if BLOCK_V2 > 0:
        dv_2 = dot(b_left, b_g2, dv_2, PRECISION)
    b_gs = rounded(b_p * b_gp, b_q1.dtype)
    dk_1 = dot(b_gs, b_q1, dk_1, PRECISION)
    if BLOCK_E2 > 0:
        dk_2 = dot(b_gs, b_q2, dk_2, PRECISION)
    return dk_1, dk_2, dv_1, dv_2, b_gs


@triton.jit(
    do_not_specialize=[
        "H", "L", "S", "longest_q", "longest_k", "places", "stride_kb", "stride_kh",
        "stride_ks", "stride_vb", "stride_vh", "stride_vs", "stride_qb", "stride_qh", "stride_ql",
        "stride_gb", "stride_gh", "stride_gl", "stride_dkb", "stride_dkh", "stride_dks",
        "stride_dvb", "stride_dvh", "stride_dvs", "stride_mb", "stride_mh", "stride_ml",
        "stride_ms",
    ]
)  # fmt: skip
def attention_fused_gradient_kernel(
    k_ptr,
    v_ptr,
    q_ptr,
    grad_ptr,
    dk_ptr,
    dv_ptr,
    rows_ptr,  # [H, places / BLOCK_M, 2, BLOCK_M], by attention_fused_begin_kernel as the next two
    sums_ptr,  # [H, places, BLOCK_E1 + BLOCK_E2]
    turns_ptr,  # a number for each block of queries of each head, if ORDERED
    k_span_ptr,
    q_span_ptr,
    mask_ptr,
    stride_mb,
    stride_mh,
    stride_ml,
    stride_ms,
    scale: tl.float64,
    H,
    L,
    S,
    longest_q,
    longest_k,
    places,
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
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    FACTOR: tl.constexpr,
    KIND: tl.constexpr,  # DENSE or BEGINS
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E1: tl.constexpr,
    BLOCK_E2: tl.constexpr,
    BLOCK_V1: tl.constexpr,
    BLOCK_V2: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    turn, head, batch = _program(tl.cdiv(longest_k, BLOCK_N), H, False)
    first_key = turn * BLOCK_N
    begin, length_k = span(k_span_ptr, batch, S, longest_k, KIND)
    begin_q, length = span(q_span_ptr, batch, L, longest_q, KIND)
    causal_offset = 0
    low = 0
    if CAUSAL != NOT_CAUSAL:
        if CAUSAL == BOTTOM_RIGHT:
            causal_offset = length_k - length
        low = tl.maximum(first_key - causal_offset, 0) // BLOCK_M * BLOCK_M
    columns = first_key + tl.arange(0, BLOCK_N)
    if first_key < length_k:
        stride_ks = multiple(stride_ks, FACTOR)
        stride_vs = multiple(stride_vs, FACTOR)
        stride_ql = multiple(stride_ql, FACTOR)
        stride_gl = multiple(stride_gl, FACTOR)
        k_ptr += batch * multiple(stride_kb, FACTOR) + head * multiple(stride_kh, FACTOR)
        v_ptr += batch * multiple(stride_vb, FACTOR) + head * multiple(stride_vh, FACTOR)
        k_ptr += begin * stride_ks
        v_ptr += begin * stride_vs
        q_ptr += batch * multiple(stride_qb, FACTOR) + begin_q * stride_ql
        grad_ptr += batch * multiple(stride_gb, FACTOR) + begin_q * stride_gl
        mask_ptr += batch * stride_mb
        dk_1 = tl.zeros([BLOCK_N, BLOCK_E1], tl.float32)
        dk_2 = tl.zeros([BLOCK_N, BLOCK_E2 if BLOCK_E2 > 0 else 1], tl.float32)
        dv_1 = tl.zeros([BLOCK_N, BLOCK_V1], tl.float32)
        dv_2 = tl.zeros([BLOCK_N, BLOCK_V2 if BLOCK_V2 > 0 else 1], tl.float32)
        if low < length:
            b_k1 = load_tile(k_ptr, columns, stride_ks, length_k, 0, BLOCK_E1, E, True)
            b_k2 = b_k1
            if BLOCK_E2 > 0:
                b_k2 = load_tile(k_ptr, columns, stride_ks, length_k, BLOCK_E1, BLOCK_E2, E, True)
            b_v1 = load_tile(v_ptr, columns, stride_vs, length_k, 0, BLOCK_V1, EV, True)
            b_v2 = b_v1
            if BLOCK_V2 > 0:
                b_v2 = load_tile(v_ptr, columns, stride_vs, length_k, BLOCK_V1, BLOCK_V2, EV, True)
            factor = (tl.full([], scale, tl.float64) * LOG2_E).to(tl.float32)
            first_place = _place(begin_q, batch, L, PADDED, KIND)
            # A loop that may be empty would have its sums in other registers than their products.
            tl.assume(length > low)
            last = (length - 1) // BLOCK_M * BLOCK_M
            width: tl.constexpr = BLOCK_E1 + BLOCK_E2
            p_q = q_ptr + head * multiple(stride_qh, FACTOR)
            p_grad = grad_ptr + head * multiple(stride_gh, FACTOR)
            first = head * places + first_place
            first_turn = ((batch * H + head) * tl.cdiv(longest_q, BLOCK_M)).to(tl.int32)
            q_1, q_2 = sources_of_tiles(
                p_q, stride_ql, length, BLOCK_M, BLOCK_E1, BLOCK_E2, E, True
            )
            g_1, g_2 = sources_of_tiles(
                p_grad, stride_gl, length, BLOCK_M, BLOCK_V1, BLOCK_V2, EV, True
            )
            sum_1, sum_2 = sources_of_tiles(
                sums_ptr + first * width, tl.cast(width, tl.int64), length, BLOCK_M, BLOCK_E1,
                BLOCK_E2, width, True,
            )  # fmt: skip
            # The gradients of a block's scores meet the keys when the next block's turn has
            # come: only what a loop carries does Triton multiply from shared memory.
            b_gs = tl.zeros([BLOCK_N, BLOCK_M], b_k1.dtype)
            for start in tl.range(low, length, BLOCK_M):
                # Before the first there is none: those of no row are not added.
                before = tl.where(start > low, start, 0) - BLOCK_M
                _add_queries(
                    sum_1, sum_2, b_gs, b_k1, b_k2, before, turns_ptr, first_turn, low, BLOCK_M,
                    BLOCK_E1, BLOCK_E2, ORDERED, PRECISION,
                )  # fmt: skip
                dk_1, dk_2, dv_1, dv_2, b_gs = _block(
                    dk_1, dk_2, dv_1, dv_2, b_k1, b_k2, b_v1, b_v2, q_1, q_2, g_1, g_2,
                    rows_ptr + 2 * first, start, columns, length_k, length,
                    causal_offset, mask_ptr + head * stride_mh, stride_ms, factor, E, EV,
                    BLOCK_M, BLOCK_N, BLOCK_E1, BLOCK_E2, BLOCK_V1, BLOCK_V2, CAUSAL,
                    MASK, PRECISION,
                )  # fmt: skip
            _add_queries(
                sum_1, sum_2, b_gs, b_k1, b_k2, last, turns_ptr, first_turn, low, BLOCK_M, BLOCK_E1,
                BLOCK_E2, ORDERED, PRECISION,
            )  # fmt: skip
            if ORDERED:
                _end_turn(turns_ptr + first_turn + last // BLOCK_M)
        # All of it anew: none of it is to take registers in the loop.
        turn, head, batch = _program(tl.cdiv(longest_k, BLOCK_N), H, True)
        begin, length_k = span(k_span_ptr, batch, S, longest_k, KIND)
        columns = turn * BLOCK_N + tl.arange(0, BLOCK_N)
        stride_dks = multiple(stride_dks, FACTOR)
        stride_dvs = multiple(stride_dvs, FACTOR)
        dk_ptr += batch * multiple(stride_dkb, FACTOR) + head * multiple(stride_dkh, FACTOR)
        dv_ptr += batch * multiple(stride_dvb, FACTOR) + head * multiple(stride_dvh, FACTOR)
        dk_ptr += begin * stride_dks
        dv_ptr += begin * stride_dvs
        out_dtype: tl.constexpr = dk_ptr.dtype.element_ty
        factor = tl.full([], scale, tl.float64).to(tl.float32)
        b_out = rounded(dk_1 * factor, out_dtype)
        store_tile(dk_ptr, columns, stride_dks, length_k, b_out, 0, BLOCK_E1, E)
        if BLOCK_E2 > 0:
            b_out = rounded(dk_2 * factor, out_dtype)
            store_tile(dk_ptr, columns, stride_dks, length_k, b_out, BLOCK_E1, BLOCK_E2, E)
        b_out = rounded(dv_1, out_dtype)
        store_tile(dv_ptr, columns, stride_dvs, length_k, b_out, 0, BLOCK_V1, EV)
        if BLOCK_V2 > 0:
            b_out = rounded(dv_2, out_dtype)
            store_tile(dv_ptr, columns, stride_dvs, length_k, b_out, BLOCK_V1, BLOCK_V2, EV)


@triton.jit(
    do_not_specialize=[
        "H", "L", "longest_q", "places", "programs", "stride_gb", "stride_gh", "stride_gl",
        "stride_ob", "stride_oh", "stride_ol", "stride_lb", "stride_lh",
    ]
)  # fmt: skip
def attention_fused_begin_kernel(
    grad_ptr,
    out_ptr,
    lse_ptr,
    rows_ptr,
    sums_ptr,
    turns_ptr,
    q_span_ptr,
    scale: tl.float64,
    H,
    L,
    longest_q,
    places,
    programs,  # of a head in the kernel behind this
    stride_gb,
    stride_gh,
    stride_gl,
    stride_ob,
    stride_oh,
    stride_ol,
    stride_lb,
    stride_lh,
    FACTOR: tl.constexpr,
    KIND: tl.constexpr,
    EV: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E1: tl.constexpr,
    BLOCK_E2: tl.constexpr,
    BLOCK_V1: tl.constexpr,
    BLOCK_V2: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """What the products of a block of queries begin with; zeros to add to, the first turn."""
    block, head, batch = _program(tl.cdiv(longest_q, BLOCK_M), H, False)
    begin, length = span(q_span_ptr, batch, L, longest_q, KIND)
    start = block * BLOCK_M
    if start < length:
        rows = start + tl.arange(0, BLOCK_M)
        stride_gl = multiple(stride_gl, FACTOR)
        stride_ol = multiple(stride_ol, FACTOR)
        grad_ptr += batch * multiple(stride_gb, FACTOR) + head * multiple(stride_gh, FACTOR)
        out_ptr += batch * multiple(stride_ob, FACTOR) + head * multiple(stride_oh, FACTOR)
        grad_ptr += begin * stride_gl
        out_ptr += begin * stride_ol
        b_grad = load_tile(grad_ptr, rows, stride_gl, length, 0, BLOCK_V1, EV, True)
        b_out = load_tile(out_ptr, rows, stride_ol, length, 0, BLOCK_V1, EV, True)
        b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
        if BLOCK_V2 > 0:
            b_grad = load_tile(grad_ptr, rows, stride_gl, length, BLOCK_V1, BLOCK_V2, EV, True)
            b_out = load_tile(out_ptr, rows, stride_ol, length, BLOCK_V1, BLOCK_V2, EV, True)
            b_delta += tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
        p_lse = lse_ptr + batch * stride_lb + head * stride_lh + begin + rows
        b_lse = tl.load(p_lse, mask=rows < length, other=float("-inf"))
        # Such that no probability is left of rows that attend to nothing, or are none.
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
        b_lse = b_lse * (1.0 / tl.full([], scale, tl.float64)).to(tl.float32)
        first = head * places + _place(begin, batch, L, PADDED, KIND) + start
        p_rows = rows_ptr + 2 * first + tl.arange(0, BLOCK_M)
        tl.store(p_rows, b_lse)
        tl.store(p_rows + BLOCK_M, b_delta)
        width: tl.constexpr = BLOCK_E1 + BLOCK_E2
        sums_ptr += first * width
        inside = tl.arange(0, BLOCK_M)
        zeros = tl.zeros([BLOCK_M, BLOCK_E1], tl.float32)
        store_tile(sums_ptr, inside, width, BLOCK_M, zeros, 0, BLOCK_E1, width)
        if BLOCK_E2 > 0:
            zeros = tl.zeros([BLOCK_M, BLOCK_E2], tl.float32)
            store_tile(sums_ptr, inside, width, BLOCK_M, zeros, BLOCK_E1, BLOCK_E2, width)
        if ORDERED:
            tl.store(turns_ptr + tl.program_id(0), ((batch * H + head) * programs).to(tl.int32))


@triton.jit(
    do_not_specialize=["H", "L", "longest_q", "places", "stride_db", "stride_dh", "stride_dl"]
)
def attention_fused_end_kernel(
    sums_ptr,
    dq_ptr,
    q_span_ptr,
    scale: tl.float64,
    H,
    L,
    longest_q,
    places,
    stride_db,
    stride_dh,
    stride_dl,
    FACTOR: tl.constexpr,
    KIND: tl.constexpr,
    E: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E1: tl.constexpr,
    BLOCK_E2: tl.constexpr,
):
    """The gradients of a block of queries, of the sums."""
    block, head, batch = _program(tl.cdiv(longest_q, BLOCK_M), H, False)
    begin, length = span(q_span_ptr, batch, L, longest_q, KIND)
    start = block * BLOCK_M
    if start < length:
        rows = start + tl.arange(0, BLOCK_M)
        stride_dl = multiple(stride_dl, FACTOR)
        dq_ptr += batch * multiple(stride_db, FACTOR) + head * multiple(stride_dh, FACTOR)
        dq_ptr += begin * stride_dl
        width: tl.constexpr = BLOCK_E1 + BLOCK_E2
        sums_ptr += (head * places + _place(begin, batch, L, PADDED, KIND)) * width
        factor = tl.full([], scale, tl.float64).to(tl.float32)
        out_dtype: tl.constexpr = dq_ptr.dtype.element_ty
        b_dq = load_tile(sums_ptr, rows, width, length, 0, BLOCK_E1, width, False)
        store_tile(
            dq_ptr, rows, stride_dl, length, rounded(b_dq * factor, out_dtype), 0, BLOCK_E1, E
        )
        if BLOCK_E2 > 0:
            b_dq = load_tile(sums_ptr, rows, width, length, BLOCK_E1, BLOCK_E2, width, False)
            b_dq = rounded(b_dq * factor, out_dtype)
            store_tile(dq_ptr, rows, stride_dl, length, b_dq, BLOCK_E1, BLOCK_E2, E)


def places_of(queries: Tokens, batch: int) -> int:
    """Rows of the workspace for each head."""
    blocks_of_rows = ceil_div(queries.rows, _PADDED)
    packed = queries.kind == BEGINS.value
    return (blocks_of_rows + batch if packed else blocks_of_rows * batch) * _PADDED


fused_kernel = Tuned(
    attention_fused_gradient_kernel, [TWO_KERNELS], FUSED_KEY, fused_gradient_configs
)


def fused_gradient(
    config: triton.Config,
    query: Tensor,  # (B, H, L, E), B expanded where sequences lie one behind the other
    grad_out: Tensor,  # (B, H, L, Ev)
    out: Tensor,  # (B, H, L, Ev)
    key: Tensor,  # (B, H, S, E)
    value: Tensor,  # (B, H, S, Ev)
    lse: Tensor,  # (B, H, L), or (H, L)
    grads: tuple[Tensor, Tensor, Tensor],  # of query, key and value
    scale: float,
    queries: Tokens,
    keys: Tokens,
    limits: Limits,
    constants: dict[str, Any],
) -> None:
    """Fills ``grads``; none of the tensors is empty.

    Args:
        config: of the tiles.
        constants: the compile-time arguments that the gradients' kernels share.
    """
    batch, heads = query.shape[:2]
    grad_query, grad_key, grad_value = grads
    sizes = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    columns = {n: constants[n] for n in ("BLOCK_E1", "BLOCK_E2")}
    places = places_of(queries, batch)
    rows = query.new_empty(heads * places * 2, dtype=torch.float32)
    sums = query.new_empty(heads * places * sum(columns.values()), dtype=torch.float32)
    programs = ceil_div(keys.longest, sizes[1])
    numbers = heads, queries.rows, queries.longest, places
    per_query = (ceil_div(queries.longest, sizes[0]) * heads * batch,)
    turns = query.new_empty(per_query, dtype=torch.int32)
    shared = {
        "FACTOR": constants["FACTOR"], "KIND": queries.kind, "PADDED": _PADDED, **columns,
    }  # fmt: skip
    span_of_queries = queries.pointer(query)
    attention_fused_begin_kernel[per_query](
        grad_out, out, lse, rows, sums, turns, span_of_queries, scale, *numbers, programs,
        *(n for t in (grad_out, out) for n in head_strides(t)), *lse_strides(lse),
        EV=constants["EV"], BLOCK_V1=constants["BLOCK_V1"], BLOCK_V2=constants["BLOCK_V2"],
        BLOCK_M=sizes[0], ORDERED=config.kwargs["ORDERED"], **shared,
    )  # fmt: skip
    given, _ = limits.arguments(query)
    strided = (key, value, query, grad_out, grad_key, grad_value)
    with scratch(query.device):
        fused_kernel.launch(
            config,
            (
                key, value, query, grad_out, grad_key, grad_value, rows, sums, turns,
                keys.pointer(query), span_of_queries, *given[:5], scale, heads, queries.rows,
                keys.rows, queries.longest, keys.longest, places,
                *(n for t in strided for n in head_strides(t)),
            ),
            (programs * heads * batch,),
            {**constants, "PADDED": _PADDED},
        )  # fmt: skip
    attention_fused_end_kernel[per_query](
        sums, grad_query, span_of_queries, scale, *numbers, *head_strides(grad_query),
        E=constants["E"], BLOCK_M=sizes[0], **shared,
    )  # fmt: skip
