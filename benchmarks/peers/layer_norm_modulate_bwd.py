"""Peers of layer_norm_modulate's gradients: autograd, and the memory traffic alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.gated_residual_modulate import by_autograd, leaves_of, normed


def _forward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *others: Any) -> tuple[Any, ...]:
    *affine, norm, _, _, _, _, _ = others
    leaves = leaves_of(x, *affine)
    wanted = [leaf for leaf in leaves if leaf is not None]
    of_x, shift, scale, weight, bias = leaves
    return normed(of_x, shift, scale, weight, bias, 1e-6, norm), wanted, grad


PEERS = by_autograd("layer_norm_modulate_bwd", _forward)
