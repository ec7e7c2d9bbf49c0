"""Peers of joint_attention_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer
from benchmarks.peers.joint_attention import PLAIN as FORWARD


def _by_autograd(
    grad_image: Tensor, grad_text: Tensor, *arguments: Any
) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [t.detach().requires_grad_() for t in arguments[:6]]
    outputs = FORWARD(*leaves, *arguments[-2:])
    grads = [grad_image, grad_text]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


PEERS = {
    "concatenated SDPA": Peer(_by_autograd, cut=False, note="the forward is not timed"),
}
