"""Attention of image and text in Triton: each kernel meets both streams, which are not joined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.kernels.attention import Limits, Tokens, offline_variant
from mmfast.kernels.attention_forward import attention_forward
from mmfast.kernels.attention_key_gradient import key_gradient
from mmfast.kernels.attention_query_gradient import query_gradient
from mmfast.ops.attention import new_like, new_lse


def joint_attention(
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.joint_attention`` on checked arguments."""
    image, text = Tokens.of(q_image), Tokens.of(q_text, text_lengths)
    keys = [(k_image, v_image, image), (k_text, v_text, text)]
    outputs, sums = [], []
    for query, tokens in ((q_image, image), (q_text, text)):
        out, lse = new_like(query, v_image.shape[3]), new_lse(query, query.shape[:3])
        attention_forward(query, keys, out, lse, scale, tokens, Limits())
        outputs.append(out)
        sums.append(lse)
    return outputs[0], outputs[1], sums[0], sums[1]


def joint_attention_bwd(
    grad_image: Tensor | None,
    grad_text: Tensor | None,
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    out_image: Tensor,
    out_text: Tensor,
    lse_image: Tensor,
    lse_text: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """``torch.ops.mmfast.joint_attention_bwd`` on checked arguments."""
    image, text = Tokens.of(q_image), Tokens.of(q_text, text_lengths)
    keys = [(k_image, v_image, image), (k_text, v_text, text)]
    of_queries, queries = [], []
    for query, grad_out, out, lse, tokens in (
        (q_image, grad_image, out_image, lse_image, image),
        (q_text, grad_text, out_text, lse_text, text),
    ):
        grad = new_like(query, query.shape[3])
        of_queries.append(grad)
        if grad_out is None:
            grad.zero_()
            continue
        lse = lse.contiguous()
        delta = torch.empty_like(lse)
        query_gradient(query, grad_out, out, keys, grad, lse, delta, None, scale, tokens, Limits())
        queries.append((query, grad_out, lse, delta, tokens))
    of_keys = []
    for key, value, tokens in keys:
        grads = new_like(key, key.shape[3]), new_like(value, value.shape[3])
        key_gradient(key, value, queries, *grads, scale, tokens, Limits())
        of_keys.append(grads)
    return of_queries[0], *of_keys[0], of_queries[1], *of_keys[1]


def offline_variants() -> list[Any]:
    """What ``python -m mmfast.kernels.offline`` compiles."""

    def variant(width: int, backward: bool, quick: bool) -> Any:
        def launch(n: int, k: int) -> None:
            streams = [torch.ones(1, 2, m, width, dtype=torch.bfloat16) for m in (n, k)]
            lengths = torch.ones(1, dtype=torch.int64)
            tensors = [t for t in streams for _ in range(3)]
            if not backward:
                joint_attention(*tensors, lengths, 0.1)
                return
            sums = [torch.ones(t.shape[:3]) for t in streams]
            joint_attention_bwd(*streams, *tensors, *streams, *sums, lengths, 0.1)

        return offline_variant(f"joint_attention: bfloat16, E {width}", launch, backward, quick)

    return [variant(e, b, e == 128 and not b) for e in (64, 72, 96, 128) for b in (False, True)]
