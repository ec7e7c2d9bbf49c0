"""Peers of vector_quantize: the lookup, gather and losses as quantisers write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import Peer
from benchmarks.peers.nearest_code import addmm_argmin, cdist_argmin

Result = tuple[Tensor, ...]


def first_rows(arguments: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same problem for the first ``rows`` vectors."""
    x, codebook, metric, gradient, mask = arguments
    return x[:rows], codebook, metric, gradient, mask


def plain(x: Tensor, codebook: Tensor, nearest: Callable[[Tensor, Tensor], Tensor]) -> Result:
    """The op's outputs, by the lookup ``nearest``."""
    indices = nearest(x, codebook)
    quantized = functional.embedding(indices, codebook)
    counts = torch.bincount(indices, minlength=len(codebook)).to(x.dtype)
    commitment = functional.mse_loss(x, quantized.detach())
    return quantized, indices, commitment, functional.mse_loss(quantized, x.detach()), counts


def _unsupported(
    x: Tensor, codebook: Tensor, metric: str, gradient: str, mask: Tensor | None
) -> list[str]:
    return [] if metric == "euclidean" and mask is None else ["written for distances, unmasked"]


def _peer(nearest: Callable[[Tensor, Tensor], Tensor]) -> Peer:
    def make(x: Tensor, codebook: Tensor, *_: Any) -> Callable[[], Result]:
        return lambda: plain(x, codebook, nearest)

    return Peer(
        make,
        unsupported=_unsupported,
        workspace=lambda x, codebook, *_: 4 * x.shape[0] * codebook.shape[0],
    )


PEERS = {"addmm+argmin": _peer(addmm_argmin), "cdist+argmin": _peer(cdist_argmin)}
