"""Peers of varlen_attention_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer
from benchmarks.peers.varlen_attention import one_by_one, unsupported


def _by_autograd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> Callable[[], tuple[Tensor, ...]]:
    _, _, cu_seqlens_q, cu_seqlens_k, _, _, _, scale = others
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    lengths, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    out = one_by_one(leaves, lengths, keys, scale)
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


PEERS = {
    "SDPA in a loop": Peer(
        _by_autograd, unsupported=unsupported, cut=False, note="the forward is not timed"
    ),
}
