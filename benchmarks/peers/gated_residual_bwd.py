"""Peers of gated_residual's gradients: autograd, and the memory traffic alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.gated_residual_modulate import by_autograd, gated, leaves_of


def _forward(grad: Tensor, gate: Tensor, y: Tensor, activation: str, *_: bool) -> tuple[Any, ...]:
    of_gate, of_y = leaves_of(gate, y)
    return gated(grad.new_zeros(grad.shape), of_gate, of_y, activation), (of_gate, of_y), grad


PEERS = by_autograd("gated_residual_bwd", _forward)
