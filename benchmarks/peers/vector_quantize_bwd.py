"""Peers of vector_quantize_bwd: straight-through gradients by autograd and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import Peer

Result = tuple[Tensor, ...]


def PLAIN(
    quantized: Tensor,
    commitment: Tensor,
    codebook_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    counts: Tensor,
    *_: Any,
) -> Result:
    """The gradients written out."""
    difference = (x - codebook[indices]) * (2 / x.numel())
    to_codes = torch.zeros_like(codebook).index_add(0, indices, difference)
    return quantized + commitment * difference, -codebook_loss * to_codes


def _by_autograd(
    quantized: Tensor,
    commitment: Tensor,
    codebook_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *_: Any,
) -> Callable[[], Result]:
    inputs = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    codes = functional.embedding(indices, inputs[1])
    outputs = (
        inputs[0] + (codes - inputs[0]).detach(),
        functional.mse_loss(inputs[0], codes.detach()),
        functional.mse_loss(codes, x),
    )
    gradients = (quantized, commitment, codebook_loss)
    return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


PEERS = {
    "written out": Peer(lambda *arguments: lambda: PLAIN(*arguments)),
    "autograd": Peer(_by_autograd, note="of embedding and mse_loss; the forward is not timed"),
}
