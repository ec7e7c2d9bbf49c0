"""Peers of gated_activation: PyTorch's activations, and the memory traffic alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import traffic, written_plainly


def plain(x: Tensor, value: Tensor | None, activation: str, layout: str) -> Tensor:
    """As models write it."""
    gate = x
    if layout != "gate":
        first, last = x.chunk(2, -1)
        gate, value = (first, last) if layout == "gate_value" else (last, first)
    if activation == "silu":
        active = F.silu(gate)
    else:
        active = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return active if value is None else active * value


PEERS = written_plainly(plain) | {"torch.add(out=)": traffic("gated_activation")}
