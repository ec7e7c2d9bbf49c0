"""Adaptive layer norms between the branches of a diffusion transformer."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.nn.layers import is_plain, linear
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.gated_residual_modulate import gated_residual_modulate
from mmfast.ops.layer_norm_modulate import layer_norm_modulate

# A branch's gate and output, which have not yet been added to the residual. Under autocast the
# output may be of another dtype than the residual.
Pending = tuple[Tensor | None, Tensor]


def modulation(dim: int, parts: int) -> nn.Sequential:
    """SiLU and a linear layer, from the condition to shifts, scales and gates."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


def conditioned(layers: nn.Module, c: Tensor) -> Tensor:
    """``layers(c)``, those of :func:`modulation` or what somebody has put in their place."""
    if is_plain(layers, nn.Sequential):
        assert isinstance(layers, nn.Sequential)
        act, *others = layers
        if len(others) == 1 and is_plain(act, nn.SiLU) and not act.inplace:
            return linear(others[0], c, "silu")
    return layers(c)


def zero(*layers: nn.Module) -> None:
    """Fill linear layers, or the last ones of sequences, with zeros."""
    for layer in layers:
        last = layer[-1] if isinstance(layer, nn.Sequential) else layer
        for parameter in last.parameters():
            nn.init.zeros_(parameter)


def next_branch(
    x: Tensor,
    pending: Pending | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float,
    norm: nn.LayerNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual, with what is pending added to it, and the next branch's input.

    Args:
        x: the residual, ``(B, L, C)``.
        pending: of the branch before.
        shift, scale: of the next branch.
        eps: of its norm.
        norm: whose weight and bias it has, if any.
    """
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    if pending is None:
        return x, layer_norm_modulate(x, shift, scale, eps=eps, weight=weight, bias=bias)
    gate, y = pending
    residual, branch = gated_residual_modulate(
        x, gate, y.to(x.dtype), shift, scale, eps=eps, weight=weight, bias=bias
    )
    return residual, branch


def settled(x: Tensor, pending: Pending) -> Tensor:
    """The residual, with what is pending added to it."""
    gate, y = pending
    return x + y if gate is None else gated_residual(x, gate, y.to(x.dtype))
