"""Peers of finite_scalar_quantize: the formulas of the paper, and the library that has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, needs


def plain(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    """Quantised values and indices of the variant "bound", as appendix A.1 writes them."""
    size = torch.tensor(levels, device=z.device)
    half = (size - 1) * (1 + 1e-3) / 2
    offset = torch.where(size % 2 == 0, 0.5, 0.0)
    shift = torch.atanh(offset / half)
    rounded = (torch.tanh(z + shift) * half - offset).round()
    basis = torch.cumprod(torch.cat((size.new_ones(1), size[:-1])), 0)
    indices = ((rounded + size // 2) * basis).sum(-1).to(torch.int32)
    return rounded / (size // 2), indices


def PLAIN(
    z: Tensor, levels: list[int], variant: str, hard_clamp: bool, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What ``torch.compile`` gets."""
    return plain(z, levels)


def only_bound(
    z: Tensor, levels: list[int], variant: str, hard_clamp: bool, noise: Tensor | None
) -> list[str]:
    """Reasons against arguments that the peers are not written for."""
    return [] if variant == "bound" and not hard_clamp else ["written for the variant bound"]


def _eager(z: Tensor, levels: list[int], *_: Any) -> Callable[[], Any]:
    return lambda: plain(z, levels)


def _library(z: Tensor, levels: list[int], *_: Any) -> Callable[[], Any]:
    from vector_quantize_pytorch import FSQ

    quantiser = FSQ(levels).to(z.device).eval()

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor]:
        quantized, indices = quantiser(z[None])
        return quantized[0], indices[0]

    return run


PEERS = {
    "plain torch": Peer(_eager, unsupported=only_bound),
    "vector-quantize-pytorch": Peer(
        _library, needs("vector_quantize_pytorch"), unsupported=only_bound
    ),
}
