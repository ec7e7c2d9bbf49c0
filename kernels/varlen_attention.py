"""Attention of sequences that lie behind each other, in Triton: the kernels look up where."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.kernels.attention import (
    BEGINS,
    BOTTOM_RIGHT,
    NOT_CAUSAL,
    Limits,
    Tokens,
    offline_variant,
)
from mmfast.kernels.attention_forward import attention_forward
from mmfast.kernels.attention_gradients import each_way, gradients
from mmfast.ops.attention import new_lse


def _tokens(cu_seqlens: Tensor, rows: int, longest: int) -> Tokens:
    return Tokens(cu_seqlens.contiguous(), rows, min(longest, rows), BEGINS.value)


def _heads(cu_seqlens: Tensor, *tensors: Tensor) -> list[Tensor]:
    """(N, H, E) as (B, H, N, E)."""
    batch = len(cu_seqlens) - 1
    return [t.transpose(0, 1).expand(batch, *t.transpose(0, 1).shape) for t in tensors]


def _limits(is_causal: bool) -> Limits:
    return Limits(causal=(BOTTOM_RIGHT if is_causal else NOT_CAUSAL).value)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.varlen_attention`` on checked arguments."""
    tokens, heads, _ = query.shape
    # Zeros for tokens of no sequence.
    out = query.new_zeros(tokens, heads, value.shape[2])
    lse = new_lse(query, (heads, tokens)).fill_(-torch.inf)
    queries = _tokens(cu_seqlens_q, tokens, max_seqlen_q)
    keys = _tokens(cu_seqlens_k, key.shape[0], max_seqlen_k)
    q, k, v, o = _heads(cu_seqlens_q, query, key, value, out)
    attention_forward(q, [(k, v, keys)], o, lse, scale, queries, _limits(is_causal))
    return out, lse


def varlen_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.varlen_attention_bwd`` on checked arguments."""
    grads = [t.new_zeros(t.shape) for t in (query, key, value)]
    queries = _tokens(cu_seqlens_q, query.shape[0], max_seqlen_q)
    keys = _tokens(cu_seqlens_k, key.shape[0], max_seqlen_k)
    lse = lse.contiguous()
    g, q, k, v, o = _heads(cu_seqlens_q, grad_out, query, key, value, out)
    dq, dk, dv = _heads(cu_seqlens_q, *grads)
    limits = _limits(is_causal)
    gradients(q, g, o, k, v, lse, (dq, dk, dv), None, scale, queries, keys, limits)
    return grads[0], grads[1], grads[2]


def offline_variants() -> list[Any]:
    """What ``python -m mmfast.kernels.offline`` compiles."""

    def variant(width: int, backward: bool, causal: bool, quick: bool) -> Any:
        def launch(n: int, k: int) -> None:
            query, key = (torch.ones(m, 2, width, dtype=torch.bfloat16) for m in (n, k))
            cu_seqlens = torch.ones(2, dtype=torch.int32)
            options = cu_seqlens, cu_seqlens, n, k, causal, 0.1
            if backward:
                lse = torch.ones(2, n)
                each_way(lambda: varlen_attention_bwd(query, query, key, key, query, lse, *options))
            else:
                varlen_attention(query, key, key, *options)

        more = ", causal" if causal else ""
        return offline_variant(
            f"varlen_attention: bfloat16, E {width}{more}", launch, backward, quick
        )

    return [
        variant(e, b, c, e == 128 and not (b or c))
        for e in (72, 128)
        for b in (False, True)
        for c in (False, True)
    ]
