"""Peers of residual_quantize_bwd: straight-through gradients by hand and by autograd."""

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
    codebook_losses: Tensor,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    sizes: list[int],
    *_: Any,
) -> Result:
    """The gradients written out, for codebooks of a stage each."""
    residual, to_x, to_codes = x, quantized, []
    for q, codebook in enumerate(codes.split(sizes)):
        residual = residual - codebook[indices[:, q]]
        difference = residual * (2 / x.numel())
        to_x = to_x + commitment[q] * difference
        sums = torch.zeros_like(codebook).index_add(0, indices[:, q], difference)
        to_codes.append(-codebook_losses[q] * sums)
    return to_x, torch.cat(to_codes)


def _by_autograd(
    quantized: Tensor,
    commitment: Tensor,
    codebook_losses: Tensor,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    sizes: list[int],
    *_: Any,
) -> Callable[[], Result]:
    inputs = x.detach().requires_grad_(), codes.detach().requires_grad_()
    residual, total, to_x, to_codes = inputs[0], torch.zeros_like(x), [], []
    for q, codebook in enumerate(inputs[1].split(sizes)):
        chosen = functional.embedding(indices[:, q], codebook)
        to_x.append(functional.mse_loss(residual, chosen.detach()))
        to_codes.append(functional.mse_loss(chosen, residual.detach()))
        residual = residual - chosen.detach()
        total = total + chosen
    passed = inputs[0] + (total - inputs[0]).detach()
    outputs = passed, torch.stack(to_x), torch.stack(to_codes)
    gradients = quantized, commitment, codebook_losses
    return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


PEERS = {
    "written out": Peer(lambda *arguments: lambda: PLAIN(*arguments)),
    "autograd": Peer(_by_autograd, note="of embedding and mse_loss; the forward is not timed"),
}
