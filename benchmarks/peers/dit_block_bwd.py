"""Peers of dit_block_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import Peer, gated_activation
from benchmarks.peers.dit_block import normed, plain


def _bias(made: Tensor, product: Tensor) -> Tensor:
    """What a layer has added to its products."""
    return (made - product).mean((0, 1))


def _backward(
    grad: Tensor,
    x: Tensor,
    modulation: Tensor,
    qkv: Tensor,
    proj: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    *others: Any,
) -> Callable[[], Any]:
    _, _, packed, attended, _, y, residual, _, _, hidden, fed, *options, wanted = others
    _, _, eps, mlp_eps, activation = options
    shift, factor, _, shift2, factor2, _ = modulation.chunk(6, -1)
    active = gated_activation.plain(hidden, None, activation, "gate")
    biases = (
        _bias(packed, F.linear(normed(x, shift, factor, eps), qkv)),
        _bias(y, F.linear(attended, proj)),
        _bias(hidden, F.linear(normed(residual, shift2, factor2, mlp_eps), fc1)),
        _bias(fed, F.linear(active, fc2)),
    )
    given = [x, modulation]
    for weight, bias in zip((qkv, proj, fc1, fc2), biases, strict=True):
        given += [weight, bias]
    leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(given)]
    result = plain(*leaves, *options)  # type: ignore[arg-type]
    wants = [t for t in leaves if t.requires_grad]
    return lambda: torch.autograd.grad(result, wants, grad, retain_graph=True)


PEERS = {"plain torch": Peer(_backward, cut=False, note="norms and activation are saved")}
