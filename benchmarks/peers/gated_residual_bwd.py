"""Peers of gated_residual's gradients: the memory traffic alone."""

from __future__ import annotations

from benchmarks.peers.gated_residual_modulate import traffic

PEERS = {"torch.add(out=)": traffic("gated_residual_bwd")}
