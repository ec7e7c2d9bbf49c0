"""Peers of linear_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer
from benchmarks.peers.linear import plain


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, activation: str, *wanted: bool
) -> Callable[[], Any]:
    bias = weight.new_zeros(len(weight))
    leaves = [t.detach().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
    name = str(grad.dtype).removeprefix("torch.")
    result = plain(leaves[0], leaves[1], leaves[2], activation, name)
    wants = [t for t in leaves if t.requires_grad]
    return lambda: torch.autograd.grad(result, wants, grad, retain_graph=True)


PEERS = {"plain torch": Peer(_backward, cut=False, note="the activation is saved, not made again")}
