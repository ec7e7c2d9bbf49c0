"""Peers of gated_activation: PyTorch's activations, and the memory traffic alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import Peer
from mmfast.ops import gated_activation


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


def _traffic(*arguments: Any) -> Callable[[], Any]:
    """torch.add of tensors that are together as large as what has to be moved."""
    x = arguments[0]
    numbers = gated_activation.OP.cost(*arguments).bytes // x.element_size() // 3
    a, b, out = (torch.ones(numbers, dtype=x.dtype, device=x.device) for _ in range(3))
    return lambda: torch.add(a, b, out=out)


PEERS = {
    "plain torch": Peer(lambda *arguments: lambda: plain(*arguments), cut=False),
    "torch.compile": Peer(
        lambda *arguments: functools.partial(torch.compile(plain, dynamic=True), *arguments),
        cut=False,
        note="of the plain formulation; compiling is not timed",
    ),
    "torch.add(out=)": Peer(
        _traffic, cut=False, floor=True, note="the same bytes, read twice and written once"
    ),
}
