"""Peers of layer_norm_modulate: plain PyTorch, and the memory traffic alone."""

from __future__ import annotations

from benchmarks.peers import traffic, written_plainly
from benchmarks.peers.gated_residual_modulate import normed

PEERS = written_plainly(normed) | {"torch.add(out=)": traffic("layer_norm_modulate")}
