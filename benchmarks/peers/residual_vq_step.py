"""Peers of a training step of ResidualVQ. Each returns the gradient of x and the new codes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks import modules
from benchmarks.peers import Peer, library


def first_rows(arguments: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same problem for the first ``rows`` vectors."""
    x, codebooks, gradient = arguments
    return x[:rows], codebooks, gradient[:rows]


def _workspace(x: Tensor, codebooks: Tensor, *_: Tensor) -> int:
    # A stage's distances, their negation and one-hots, all N x K.
    return 20 * x.shape[0] * codebooks.shape[1]


PEERS: dict[str, Peer] = {
    "vector-quantize-pytorch": library(
        modules.residual_vq_step, workspace=_workspace, note="ResidualVQ in train mode"
    )
}
