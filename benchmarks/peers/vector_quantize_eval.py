"""Peers of VectorQuantize in evaluation. Each returns the quantised vectors and the indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mmfast
from benchmarks import modules
from benchmarks.peers import Peer, library
from benchmarks.peers.nearest_code import addmm_argmin


def first_rows(arguments: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same problem for the first ``rows`` vectors."""
    x, codebook = arguments
    return x[:rows], codebook


def first_results(results: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """The results of the first ``rows`` vectors."""
    return tuple(t[:rows] for t in results)


def PLAIN(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """As a user writes it."""
    indices = addmm_argmin(x, codebook)
    return torch.nn.functional.embedding(indices, codebook), indices


def PLAIN_WORKSPACE(x: Tensor, codebook: Tensor) -> int:
    """Bytes of the distances."""
    return 4 * x.shape[0] * codebook.shape[0]


PEERS = {
    "lookup alone": Peer(
        lambda x, codebook: lambda: mmfast.nearest_code(x, codebook),
        cut=False,
        floor=True,
        aside=True,
        note="mmfast.nearest_code, which it contains",
    ),
    "plain torch": Peer(
        lambda *arguments: lambda: PLAIN(*arguments),
        workspace=PLAIN_WORKSPACE,
        note="addmm+argmin, embedding",
    ),
    "vector-quantize-pytorch": library(
        modules.vector_quantize_eval,
        # Distances, their negation and one-hots, all N x K.
        workspace=lambda *arguments: 5 * PLAIN_WORKSPACE(*arguments),
        note="VectorQuantize in eval mode",
    ),
}
