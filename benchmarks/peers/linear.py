"""Peers of linear: PyTorch's layer behind its activation, alone and compiled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import gated_activation, written_plainly


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: str) -> Tensor:
    """As models write it."""
    to = getattr(torch, dtype)
    active = x if activation == "none" else gated_activation.plain(x, None, activation, "gate")
    return F.linear(active.to(to), weight.to(to), None if bias is None else bias.to(to))


PEERS = written_plainly(plain)
