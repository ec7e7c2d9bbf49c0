"""Peers of gated_residual_modulate: plain PyTorch, and the memory traffic alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import Peer, compiled, traffic, written_plainly


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
    """autograd's gradients, the forward having been run, as it is and compiled, and the floor.

    Args:
        name: of the op that computes gradients.
        forward: takes its arguments; the plain forward, as a function of the tensors whose
            gradients are wanted, in the op's order, None for those that are not there; these
            tensors; and the gradients of the outputs.
    """

    def made(prepare: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
        def make(*arguments: Any) -> Callable[[], Any]:
            function, leaves, grads = forward(*arguments)
            outputs = prepare(function)(*leaves)
            wanted = [leaf for leaf in leaves if leaf is not None]
            return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)[0]

        return make

    note = "autograd, its forward not timed"
    return {
        "plain torch": Peer(made(lambda function: function), cut=False, note=note),
        "torch.compile": Peer(made(compiled), cut=False, note=f"{note}, nor is compiling"),
        "torch.add(out=)": traffic(name),
    }


def leaves_of(*tensors: Tensor | None) -> list[Any]:
    """Tensors whose gradients are wanted."""
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


PEERS = written_plainly(_plain) | {"torch.add(out=)": traffic("gated_residual_modulate")}
