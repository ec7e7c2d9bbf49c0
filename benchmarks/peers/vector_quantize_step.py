"""Peers of a training step: vector-quantize-pytorch, plain PyTorch. Each returns the gradient of x
and the new codebook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mmfast
from benchmarks import modules
from benchmarks.modules import DECAY, EPS
from benchmarks.peers import Peer, ema_update, library, vector_quantize
from benchmarks.peers.code_statistics import index_add
from benchmarks.peers.nearest_code import addmm_argmin

Result = tuple[Tensor, Tensor]


def first_rows(arguments: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same problem for the first ``rows`` vectors."""
    x, codebook, gradient = arguments
    return x[:rows], codebook, gradient[:rows]


def rotated(x: Tensor, codes: Tensor) -> Tensor:
    """``codes``, with the gradient of the rotation trick."""
    length_x, length_c = x.detach().norm(dim=1, keepdim=True), codes.norm(dim=1, keepdim=True)
    e, q = x.detach() / length_x.clamp(min=1e-6), codes / length_c.clamp(min=1e-6)
    w = torch.nn.functional.normalize(e + q, dim=1)
    turned = x - 2 * (x * w).sum(1, keepdim=True) * w + 2 * (x * e).sum(1, keepdim=True) * q
    return turned * (length_c / length_x.clamp(min=1e-6))


def PLAIN(x: Tensor, codebook: Tensor, gradient: Tensor) -> Result:
    """The step as a user writes it."""
    size = torch.ones_like(codebook[:, 0])
    vectors = x.detach().requires_grad_()
    quantized, indices, commitment, _, _ = vector_quantize.plain(vectors, codebook, addmm_argmin)
    turned = rotated(vectors, quantized)
    torch.autograd.backward((turned, commitment), (gradient, torch.ones_like(commitment)))
    assert vectors.grad is not None
    counts, sums = index_add(x, indices, len(codebook))
    size = torch.lerp(counts, size, DECAY)
    return vectors.grad, torch.lerp(sums, codebook, DECAY) / ema_update.smoothed(size, EPS)[:, None]


def _products(x: Tensor, codebook: Tensor, gradient: Tensor) -> int:
    return 4 * x.shape[0] * codebook.shape[0]


PLAIN_WORKSPACE = _products

PEERS = {
    "lookup alone": Peer(
        lambda x, codebook, _: lambda: mmfast.nearest_code(x, codebook),
        cut=False,
        floor=True,
        note="mmfast.nearest_code, which a step contains",
    ),
    "plain torch": Peer(
        lambda *arguments: lambda: PLAIN(*arguments),
        workspace=_products,
        note="addmm+argmin, autograd, index_add",
    ),
    "vector-quantize-pytorch": library(
        modules.vector_quantize_step,
        # Distances, their negation and one-hots, all N x K.
        workspace=lambda *arguments: 5 * _products(*arguments),
        note="VectorQuantize in train mode",
    ),
}
