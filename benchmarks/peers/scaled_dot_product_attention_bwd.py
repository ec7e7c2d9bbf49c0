"""Peers of scaled_dot_product_attention_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import Peer, compiled
from mmfast.ops import scaled_dot_product_attention as attention


def _pytorch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    options: Any = {"is_causal": is_causal, "scale": scale, "enable_gqa": grouped}
    return functional.scaled_dot_product_attention(query, key, value, mask, **options)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """As models write it that do not call PyTorch's."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    scores = query @ key.mT * scale  # [B, H, L, S]
    if is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(value.dtype) @ value


def _made(forward: Callable[..., Tensor]) -> Callable[..., Callable[[], Tensor]]:
    """Queries' gradients first; those of keys and values are computed too."""

    def make(grad_out: Tensor, *arguments: Any) -> Callable[[], Tensor]:
        *given, _, _, mask, _, is_causal, scale, _, _, _ = arguments
        leaves = [t.detach().clone().requires_grad_() for t in given]
        out = forward(*leaves, mask, is_causal, scale)
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)[0]

    return make


def _unsupported(*arguments: Any) -> list[str]:
    reasons = ["draws other random numbers"] if arguments[7] > 0 else []
    return reasons + (["makes no gradient of the mask here"] if arguments[-1] else [])


def _workspace(grad_out: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    return 4 * query.shape[:3].numel() * key.shape[2] * query.element_size()


def _products(grad_out: Tensor, query: Tensor, *arguments: Any) -> Callable[[], Any]:
    """One product of as many operations as the five."""
    side = 1024
    operations = attention.cost_bwd(grad_out, query, *arguments).flops
    rows = max(1, operations // (2 * side * side))
    a, b, out = (query.new_ones(n, side) for n in (rows, side, rows))
    return lambda: torch.mm(a, b, out=out)


PEERS = {
    "PyTorch": Peer(_made(_pytorch), unsupported=_unsupported, cut=False),
    "plain torch": Peer(_made(_plain), unsupported=_unsupported, workspace=_workspace, cut=False),
    "torch.compile": Peer(
        _made(compiled(_plain)),
        unsupported=_unsupported,
        workspace=_workspace,
        cut=False,
        note="of the plain formulation; compiling is not timed",
    ),
    "torch.mm": Peer(_products, cut=False, floor=True, note="one product of as many operations"),
}
