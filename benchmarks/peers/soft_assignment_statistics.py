"""Peers of soft_assignment_statistics: the probabilities of all codes for all vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer

_MOST_BYTES = 4 << 30  # of the N x K tensors


def log_probabilities(x: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """As users write it, of squared distances."""
    scores = torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2)  # less |x|^2
    return (scores * (-1 / temperature)).log_softmax(1)


def PLAIN(
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    temperature: float,
    metric: str,
    batch_dims: int,
) -> tuple[Tensor, ...]:
    """What ``torch.compile`` gets: the outputs, with what the op saves for its gradient."""
    centre = codebook.mean(0)
    codes = codebook - centre
    logits = torch.addmm(-codes.square().sum(1), x - centre, codes.T, alpha=2)
    largest = logits.amax(1, keepdim=True)
    shifted = (logits - largest) / temperature
    log_sum = shifted.exp().sum(1, keepdim=True).log()
    log = shifted - log_sum
    p = log.exp()
    return p.mean(0), -(p * log).sum(1).mean(), torch.cat((largest, log_sum), 1)


def PLAIN_WORKSPACE(x: Tensor, codebook: Tensor, *_: Any) -> int:
    """Bytes of its N x K tensors."""
    return 4 * x.element_size() * x.shape[0] * codebook.shape[0]


def unsupported(
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    temperature: float,
    metric: str,
    batch_dims: int,
) -> list[str]:
    """Reasons against arguments that the peers are not written for."""
    if x.dim() != 2 or weights is not None or metric != "euclidean" or batch_dims:
        return ["written for squared distances, without heads, weights and batch dimensions"]
    needed = PLAIN_WORKSPACE(x, codebook)
    return [f"not run where it needs {needed >> 30} GiB"] if needed > _MOST_BYTES else []


def _eager(
    x: Tensor, codebook: Tensor, _: Tensor | None, temperature: float, *__: Any
) -> Callable[[], Any]:
    def run() -> tuple[Tensor, Tensor]:
        log = log_probabilities(x, codebook, temperature)
        p = log.exp()
        return p.mean(0), -(p * log).sum(1).mean()

    return run


PEERS = {"plain torch": Peer(_eager, unsupported=unsupported, workspace=PLAIN_WORKSPACE)}
