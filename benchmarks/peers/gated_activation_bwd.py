"""Peers of gated_activation_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, compiled, traffic
from benchmarks.peers.gated_activation import plain


def _of(forward: Callable[..., Tensor]) -> Callable[..., Callable[[], Any]]:
    def make(
        grad: Tensor, x: Tensor, value: Tensor | None, activation: str, layout: str, *_: bool
    ) -> Callable[[], Any]:
        leaf = x.detach().requires_grad_()
        result = forward(leaf, value, activation, layout)
        return lambda: torch.autograd.grad(result, leaf, grad, retain_graph=True)[0]

    return make


def _compiled(*arguments: Any) -> Tensor:
    return compiled(plain)(*arguments)


PEERS = {
    "plain torch": Peer(_of(plain), cut=False),
    "torch.compile": Peer(_of(_compiled), cut=False, note="compiling is not timed"),
    "torch.add(out=)": traffic("gated_activation_bwd"),
}
