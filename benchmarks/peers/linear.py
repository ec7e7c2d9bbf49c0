"""Peers of linear: PyTorch's layer behind its activation, alone and compiled."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import Peer


def activated(x: Tensor, activation: str) -> Tensor:
    """As models write it."""
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: str) -> Tensor:
    """Likewise."""
    to = getattr(torch, dtype)
    return F.linear(
        activated(x, activation).to(to), weight.to(to), None if bias is None else bias.to(to)
    )


PEERS = {
    "plain torch": Peer(lambda *arguments: lambda: plain(*arguments), cut=False),
    "torch.compile": Peer(
        lambda *arguments: functools.partial(torch.compile(plain, dynamic=True), *arguments),
        cut=False,
        note="of the plain formulation; compiling is not timed",
    ),
}
