"""Peers of guidance_factors: the papers' reductions in plain PyTorch, in the outputs' dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer


def _plain(
    c: Tensor,
    u: Tensor,
    w: float,
    rescale: float,
    eta: float,
    threshold: float,
    momentum: float,
    project: bool,
    average: Tensor | None,
    factors: Tensor,
) -> Callable[[], Any]:
    dims = tuple(range(1, c.dim()))

    def rescaled() -> Tensor:
        f = rescale * c.std(dims) / (u + w * (c - u)).std(dims) + 1 - rescale
        return torch.stack([f * w, f * (1 - w)], 1)

    def projected() -> Tensor:
        d = c - u
        if average is not None:
            d = average.mul_(momentum).add_(d)
        k = (w - 1) * (threshold / torch.linalg.vector_norm(d, dim=dims)).clamp(max=1)
        along = k * (1 - eta) * (d * c).sum(dims) / c.square().sum(dims)
        return torch.stack([1 + k - along, -k] if average is None else [1 - along, k], 1)

    return lambda: factors.copy_(projected() if project else rescaled())


def _traffic(c: Tensor, u: Tensor, *_: Any) -> Callable[[], Any]:
    return lambda: torch.dot(c.flatten(), u.flatten())


PEERS = {
    "plain torch": Peer(
        _plain, cut=False, note="in float32: its factors are those of float32 sums"
    ),
    "torch.dot": Peer(_traffic, cut=False, floor=True, note="both halves read once"),
}
