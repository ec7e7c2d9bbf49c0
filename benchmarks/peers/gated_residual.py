"""Peers of gated_residual: plain PyTorch, and the memory traffic alone."""

from __future__ import annotations

from torch import Tensor

from benchmarks.peers.gated_residual_modulate import written_plainly


def _plain(x: Tensor, gate: Tensor, y: Tensor, activation: str) -> Tensor:
    return x + (gate.tanh() if activation == "tanh" else gate) * y


PEERS = written_plainly("gated_residual", _plain)
