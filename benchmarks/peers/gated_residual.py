"""Peers of gated_residual: plain PyTorch, and the memory traffic alone."""

from __future__ import annotations

from benchmarks.peers.gated_residual_modulate import gated, written_plainly

PEERS = written_plainly("gated_residual", gated)
