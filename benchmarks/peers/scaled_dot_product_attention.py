"""Peers of scaled_dot_product_attention: PyTorch's own, and the products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import Peer
from mmfast.ops import scaled_dot_product_attention as op


def PLAIN(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: None,
    offset: None,
) -> Tensor:
    """The matrix of scores, softmax, values."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * scale
    if is_causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    *_: Any,
) -> Callable[[], Tensor]:
    return lambda: functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _other(*arguments: Any) -> list[str]:
    return ["drops other weights"] if arguments[4] else []


def _products(*arguments: Any) -> Callable[[], Any]:
    """One square product of as many operations."""
    query = arguments[0]
    size = round((op.OP.cost(*arguments).flops / 2) ** (1 / 3))
    a, b, out = (query.new_ones(size, size) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


PEERS = {
    "plain torch": Peer(
        lambda *arguments: lambda: PLAIN(*arguments), unsupported=_other, cut=False
    ),
    "SDPA": Peer(_sdpa, unsupported=_other, cut=False),
    "torch.mm": Peer(
        _products, cut=False, floor=True, note="one square product of as many operations"
    ),
}
