"""Peers of gated_residual_modulate: plain PyTorch, and the memory traffic alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import Peer, traffic, written_plainly


def normed(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> Tensor:
    """As models write it."""
    sizes = x.shape[-1:]
    if norm == "layer":
        result = F.layer_norm(x, sizes, weight, bias, eps)
    else:
        result = F.rms_norm(x, sizes, weight, eps)
    result = result if scale is None else result * (1 + scale)
    return result if shift is None else result + shift


def gated(x: Tensor, gate: Tensor, y: Tensor, activation: str) -> Tensor:
    """Likewise."""
    return x + (gate.tanh() if activation == "tanh" else gate) * y


def _plain(x: Tensor, gate: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *norm, activation = others
    residual = gated(x, gate, y, activation)
    return residual, normed(residual, *norm)


def by_autograd(name: str, forward: Callable[..., tuple[Any, Any, Any]]) -> dict[str, Peer]:
    """autograd's gradients, the forward having been run, and the floor.

    Args:
        name: of the op that computes gradients.
        forward: takes its arguments; what the plain forward gives, what its gradients are wanted
            for, as the op returns them, and the gradients of the outputs.
    """

    def make(*arguments: Any) -> Callable[[], Any]:
        outputs, leaves, grads = forward(*arguments)
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)[0]

    note = "autograd, its forward not timed"
    return {"plain torch": Peer(make, cut=False, note=note), "torch.add(out=)": traffic(name)}


def leaves_of(*tensors: Tensor | None) -> list[Any]:
    """Tensors whose gradients are wanted."""
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


PEERS = written_plainly(_plain) | {"torch.add(out=)": traffic("gated_residual_modulate")}
