"""Peers of finite_scalar_quantize_bwd: autograd's backward, its forward having been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, compiled, needs
from benchmarks.peers.finite_scalar_quantize import only_bound


def _quantized(z: Tensor, levels: list[int]) -> Tensor:
    size = torch.tensor(levels, device=z.device)
    half = (size - 1) * (1 + 1e-3) / 2
    offset = torch.where(size % 2 == 0, 0.5, 0.0)
    shift = torch.atanh(offset / half)
    t = torch.tanh(z + shift) * half - offset
    return (t + (t.round() - t).detach()) / (size // 2)


def _autograd(forward: Callable[..., Tensor], grad: Tensor, z: Tensor, levels: list[int]) -> Any:
    leaf = z.detach().clone().requires_grad_()
    quantized = forward(leaf, levels)
    return lambda: torch.autograd.grad(quantized, leaf, grad, retain_graph=True)[0]


def _eager(grad: Tensor, z: Tensor, levels: list[int], *_: Any) -> Callable[[], Any]:
    made: Callable[[], Any] = _autograd(_quantized, grad, z, levels)
    return made


def _compiled(grad: Tensor, z: Tensor, levels: list[int], *_: Any) -> Callable[[], Any]:
    made: Callable[[], Any] = _autograd(compiled(_quantized), grad, z, levels)
    return made


def _library(grad: Tensor, z: Tensor, levels: list[int], *_: Any) -> Callable[[], Any]:
    from vector_quantize_pytorch import FSQ

    leaf = z.detach().clone().requires_grad_()
    quantized = FSQ(levels).to(z.device)(leaf[None])[0][0]
    return lambda: torch.autograd.grad(quantized, leaf, grad, retain_graph=True)[0]


def _unsupported(grad: Tensor, *arguments: Any) -> list[str]:
    return only_bound(*arguments)


PEERS = {
    "plain torch": Peer(_eager, unsupported=_unsupported),
    "torch.compile": Peer(
        _compiled, unsupported=_unsupported, note="of the same; compiling is not timed"
    ),
    "vector-quantize-pytorch": Peer(
        _library, needs("vector_quantize_pytorch"), unsupported=_unsupported
    ),
}
