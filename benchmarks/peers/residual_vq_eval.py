"""Peers of ResidualVQ in evaluation. Each returns the quantised vectors and the indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import modules
from benchmarks.peers import Peer, library
from benchmarks.peers.nearest_code import addmm_argmin
from benchmarks.peers.vector_quantize_eval import first_results

__all__ = ["first_results"]


def first_rows(arguments: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same problem for the first ``rows`` vectors."""
    x, codebooks = arguments
    return x[:rows], codebooks


def PLAIN(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """As most codecs write it."""
    residual, total, chosen = x, torch.zeros_like(x), []
    for codebook in codebooks:
        chosen.append(addmm_argmin(residual, codebook))
        codes = codebook[chosen[-1]]
        residual = residual - codes
        total = total + codes
    return total, torch.stack(chosen, -1)


def PLAIN_WORKSPACE(x: Tensor, codebooks: Tensor) -> int:
    """Bytes of the distances of a stage."""
    return 4 * x.shape[0] * codebooks.shape[1]


PEERS = {
    "plain torch": Peer(
        lambda *arguments: lambda: PLAIN(*arguments),
        workspace=PLAIN_WORKSPACE,
        note="addmm+argmin, a stage after the other",
    ),
    "vector-quantize-pytorch": library(
        modules.residual_vq_eval,
        workspace=lambda *arguments: 5 * PLAIN_WORKSPACE(*arguments),
        note="ResidualVQ in eval mode",
    ),
}
