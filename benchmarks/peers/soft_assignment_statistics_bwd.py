"""Peers of soft_assignment_statistics_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import Peer
from benchmarks.peers.soft_assignment_statistics import (
    PLAIN_WORKSPACE,
    log_probabilities,
    unsupported,
)


def _forward(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The forward's arguments, of the backward's."""
    return *arguments[2:5], *arguments[6:9]


def _eager(*arguments: Any) -> Callable[[], Any]:
    means, entropy = arguments[:2]
    given_x, given_codebook, _, temperature, *_ = _forward(arguments)
    leaves = [t.detach().clone().requires_grad_() for t in (given_x, given_codebook)]
    x, codebook = leaves
    log = log_probabilities(x, codebook, temperature)
    p = log.exp()
    outputs = [p.mean(0), -(p * log).sum(1).mean()]
    return lambda: torch.autograd.grad(outputs, leaves, [means, entropy], retain_graph=True)


def _workspace(*arguments: Any) -> int:
    return 2 * PLAIN_WORKSPACE(*_forward(arguments)[:2])


PEERS = {
    "plain torch": Peer(
        _eager,
        unsupported=lambda *arguments: unsupported(*_forward(arguments)),
        workspace=_workspace,
    ),
}
