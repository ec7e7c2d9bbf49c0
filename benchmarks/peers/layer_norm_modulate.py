"""Peers of layer_norm_modulate: plain PyTorch, and the memory traffic alone."""

from __future__ import annotations

from benchmarks.peers.gated_residual_modulate import normed, written_plainly

PEERS = written_plainly("layer_norm_modulate", normed)
