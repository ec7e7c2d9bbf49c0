"""Peers of gated_residual_modulate's gradients: autograd, and the memory traffic alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.gated_residual_modulate import by_autograd, gated, leaves_of, normed


def _forward(
    grad_residual: Tensor, grad_modulated: Tensor, residual: Tensor, *others: Any
) -> tuple[Any, ...]:
    _, _, gate, y, *affine, norm, activation = others[:10]

    def run(
        x: Tensor, gate: Any, y: Any, shift: Any, scale: Any, weight: Any, bias: Any
    ) -> tuple[Tensor, Tensor]:
        if gate is None or y is None:
            total = x + 0
        else:  # the residual's own value, through which gate and y get their gradients
            branch = gated(x.new_zeros(()), gate, y, activation)
            total = x + branch - branch.detach()
        return total, normed(total, shift, scale, weight, bias, 1e-6, norm)

    return run, leaves_of(residual, gate, y, *affine), (grad_residual, grad_modulated)


PEERS = by_autograd("gated_residual_modulate_bwd", _forward)
