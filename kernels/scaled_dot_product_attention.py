"""Attention in Triton with PyTorch's signature: ``kernels/attention_forward.py`` and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.kernels.attention import NOT_CAUSAL, TOP_LEFT, Limits, Tokens, offline_variant
from mmfast.kernels.attention_backward import key_gradient, query_gradient
from mmfast.kernels.attention_forward import attention_forward
from mmfast.ops.attention import new_like, new_lse

HEAD_SIZES = (64, 72, 80, 88, 96, 112, 128)  # of today's models


def _limits(
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Limits:
    causal = TOP_LEFT if is_causal else NOT_CAUSAL
    return Limits(mask, causal.value, dropout_p, seed, offset)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.scaled_dot_product_attention`` on checked arguments."""
    out, lse = new_like(query, value.shape[3]), new_lse(query, query.shape[:3])
    limits = _limits(attn_mask, dropout_p, is_causal, seed, offset)
    keys = [(key, value, Tokens.of(key))]
    attention_forward(query, keys, out, lse, scale, Tokens.of(query), limits)
    return out, lse


def scaled_dot_product_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,
    offset: Tensor | None,
    want_mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.scaled_dot_product_attention_bwd`` on checked arguments."""
    grad_query, grad_key, grad_value = (new_like(t, t.shape[3]) for t in (query, key, value))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    scores = None
    if want_mask_grad:
        scores = lse.new_empty(*lse.shape, key.shape[2])
    limits = _limits(attn_mask, dropout_p, is_causal, seed, offset)
    queries, keys = Tokens.of(query), Tokens.of(key)
    query_gradient(
        query, grad_out, out, [(key, value, keys)], grad_query, lse, delta, scores, scale, queries,
        limits,
    )  # fmt: skip
    key_gradient(
        key, value, [(query, grad_out, lse, delta, queries)], grad_key, grad_value, scale, keys,
        limits,
    )  # fmt: skip
    grad_mask = query.new_empty(0)
    if scores is not None:
        assert attn_mask is not None
        grad_mask = scores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
        grad_mask = grad_mask.contiguous()
    return grad_query, grad_key, grad_value, grad_mask


def offline_variants() -> list[Any]:
    """What ``python -m mmfast.kernels.offline`` compiles."""

    def variant(width: int, dtype: torch.dtype, backward: bool, quick: bool, **more: Any) -> Any:
        def launch(n: int, k: int) -> None:
            q, key, value = (torch.ones(1, 2, m, width, dtype=dtype) for m in (n, k, k))
            mask = None
            if "mask" in more or "dense mask" in more:
                rows = n if "dense mask" in more else 1
                mask = torch.ones(1, 1, rows, k, dtype=torch.bool)
            seed = torch.ones((), dtype=torch.int64) if "dropout_p" in more else None
            others = mask, more.get("dropout_p", 0.0), "causal" in more, 0.1, seed, seed
            if not backward:
                scaled_dot_product_attention(q, key, value, *others)
                return
            lse = torch.ones(q.shape[:3], dtype=torch.float32)
            scaled_dot_product_attention_bwd(q, q, key, value, q, lse, *others, False)

        of = "".join(f", {n}" for n in more)
        return offline_variant(
            f"scaled_dot_product_attention: {dtype}, E {width}{of}", launch, backward, quick
        )

    bfloat16, float32 = torch.bfloat16, torch.float32
    return [
        *(variant(e, bfloat16, b, e == 72) for e in HEAD_SIZES for b in (False, True)),
        *(variant(e, float32, False, False) for e in (64, 72)),
        *(
            variant(e, bfloat16, b, False, **{kind: True})
            for b in (False, True)
            for kind in ("mask", "dense mask")
            for e in (64, 72, 128)
        ),
        *(variant(72, bfloat16, b, False, causal=True) for b in (False, True)),
        variant(72, bfloat16, False, False, dropout_p=0.1),
    ]
