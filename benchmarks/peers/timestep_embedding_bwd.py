"""Peers of the gradient of timestep_embedding: autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer
from benchmarks.peers.timestep_embedding import plain


def _autograd(grad: Tensor, timesteps: Tensor, *options: Any) -> Callable[[], Tensor]:
    leaf = timesteps.detach().requires_grad_()
    period, flip, shift, scale = options
    made = plain(leaf, grad.shape[1], period, flip, shift, scale, grad.dtype)
    return lambda: torch.autograd.grad(made, leaf, grad, retain_graph=True)[0]


PEERS = {"plain torch": Peer(_autograd, cut=False, note="its forward not timed")}
