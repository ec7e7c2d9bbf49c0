"""Peers of varlen_attention: one sequence after the other, and padded to the longest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import Peer


def one_by_one(tensors: list[Tensor], lengths: list[int], keys: list[int], scale: float) -> Tensor:
    """A call for each sequence of query, key and value."""
    split = (t.split(n) for t, n in zip(tensors, (lengths, keys, keys), strict=True))
    outputs = []
    for part in zip(*split, strict=True):
        query, key, value = (t.transpose(0, 1)[None] for t in part)
        out = functional.scaled_dot_product_attention(
            query, key, value, scale=scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest_q: int,
    longest_k: int,
    is_causal: bool,
    scale: float,
) -> Callable[[], tuple[Tensor]]:
    lengths, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    return lambda: (one_by_one([query, key, value], lengths, keys, scale),)


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest_q: int,
    longest_k: int,
    is_causal: bool,
    scale: float,
) -> Callable[[], tuple[Tensor]]:
    places = []
    for cu_seqlens, longest in ((cu_seqlens_q, longest_q), (cu_seqlens_k, longest_k)):
        place = torch.arange(longest, device=query.device)
        places.append(place < cu_seqlens.diff()[:, None])  # [B, longest]

    def pad(t: Tensor, there: Tensor) -> Tensor:
        made = t.new_zeros(*there.shape, *t.shape[1:])
        made[there] = t
        return made.transpose(1, 2)

    def run() -> tuple[Tensor]:
        out = functional.scaled_dot_product_attention(
            pad(query, places[0]), pad(key, places[1]), pad(value, places[1]),
            places[1][:, None, None], scale=scale, enable_gqa=True,
        )  # fmt: skip
        return (out.transpose(1, 2)[places[0]],)

    return run


def unsupported(*arguments: Any) -> list[str]:
    """Neither knows causality that is aligned at the end."""
    return ["causal"] if arguments[-2] else []


PEERS = {
    "SDPA in a loop": Peer(
        _loop, unsupported=unsupported, cut=False, note="the lengths are known beforehand"
    ),
    "SDPA of padded": Peer(
        _padded, unsupported=unsupported, cut=False, note="padding and its undoing are timed"
    ),
}
