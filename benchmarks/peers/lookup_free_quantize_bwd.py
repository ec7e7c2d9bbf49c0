"""Peers of lookup_free_quantize_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, compiled
from benchmarks.peers.lookup_free_quantize import PLAIN_WORKSPACE, plain, unsupported


def _autograd(
    forward: Callable[..., Any],
    quantized: Tensor,
    commitment: Tensor,
    entropy: Tensor,
    means: Tensor,
    z: Tensor,
    _: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    *__: Any,
) -> Callable[[], Any]:
    leaf = z.detach().clone().requires_grad_()
    first, _indices, *losses = forward(leaf, scale, spherical, inv_temperature)
    outputs, grads = [first, *losses], [quantized, commitment, entropy, means]
    return lambda: torch.autograd.grad(outputs, leaf, grads, retain_graph=True)[0]


def _compiled(*arguments: Any) -> Callable[[], Any]:
    return _autograd(compiled(plain), *arguments)


_options: dict[str, Any] = {
    "unsupported": lambda *arguments: unsupported(*arguments[4:]),
    "workspace": lambda *arguments: PLAIN_WORKSPACE(*arguments[4:]),
}
PEERS = {
    "plain torch": Peer(functools.partial(_autograd, plain), **_options),
    "torch.compile": Peer(_compiled, note="of the same; compiling is not timed", **_options),
}
