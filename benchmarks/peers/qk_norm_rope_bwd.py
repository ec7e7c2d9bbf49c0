"""Peers of qk_norm_rope_bwd: what autograd does for the plain formulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch

from benchmarks.peers import Peer, compiled
from benchmarks.peers.qk_norm_rope import as_models_have_them, plain, traffic
from mmfast.ops import qk_norm_rope


def _autograd(forward: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    grads, (*given, _) = arguments[:2], arguments[2:]
    given = list(as_models_have_them(tuple(given)))
    leaves = [0, 1, 2, 4]
    for i in leaves:
        given[i] = given[i].detach().requires_grad_()
    outputs = forward(*given)
    inputs = [given[i] for i in leaves]
    none = torch.empty(0)

    def run() -> tuple[Any, ...]:
        q, k, weight_q, weight_k = torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
        return q, k, weight_q, none, weight_k, none

    return run


def _eager(*arguments: Any) -> Callable[[], Any]:
    return _autograd(plain, *arguments)


def _compiled(*arguments: Any) -> Callable[[], Any]:
    # Buffers of a graph that is kept may not be reused.
    with functorch.patch(donated_buffer=False):
        return _autograd(compiled(plain, None), *arguments)


def _traffic(*arguments: Any) -> Callable[[], Any]:
    moved = qk_norm_rope.BACKWARD.cost(*arguments).bytes
    return traffic(moved, arguments[2].dtype, arguments[2].device)


PEERS = {
    "plain torch": Peer(_eager, cut=False, note="the backward alone, of a graph that is kept"),
    "torch.compile": Peer(_compiled, cut=False, note="likewise"),
    "torch.add(out=)": Peer(
        _traffic, cut=False, floor=True, note="the same bytes, read twice and written once"
    ),
}
