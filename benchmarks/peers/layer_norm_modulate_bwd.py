"""Peers of layer_norm_modulate's gradients: autograd, and the memory traffic alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.gated_residual_modulate import by_autograd, leaves_of, normed


def _forward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *others: Any) -> tuple[Any, ...]:
    *affine, norm, _, _, _, _, _ = others

    def run(x: Tensor, shift: Any, scale: Any, weight: Any, bias: Any) -> Tensor:
        return normed(x, shift, scale, weight, bias, 1e-6, norm)

    return run, leaves_of(x, *affine), grad


PEERS = by_autograd("layer_norm_modulate_bwd", _forward)
