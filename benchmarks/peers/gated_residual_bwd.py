"""Peers of gated_residual's gradients: autograd, and the memory traffic alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.gated_residual_modulate import by_autograd, gated, leaves_of


def _forward(grad: Tensor, gate: Tensor, y: Tensor, activation: str, *_: bool) -> tuple[Any, ...]:
    def run(gate: Tensor, y: Tensor) -> Tensor:
        return gated(grad.new_zeros(grad.shape), gate, y, activation)

    return run, leaves_of(gate, y), grad


PEERS = by_autograd("gated_residual_bwd", _forward)
