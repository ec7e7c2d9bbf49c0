"""Peers of gated_residual: plain PyTorch, and the memory traffic alone."""

from __future__ import annotations

from benchmarks.peers import traffic, written_plainly
from benchmarks.peers.gated_residual_modulate import gated

PEERS = written_plainly(gated) | {"torch.add(out=)": traffic("gated_residual")}
