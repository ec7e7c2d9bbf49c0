"""Peers of a forward and backward of FSQ. Each returns the gradient of z and the
indices."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import modules
from benchmarks.peers import Peer, as_many_bytes, library

Result = tuple[Tensor, ...]


def PLAIN(z: Tensor, gradient: Tensor, levels: list[int]) -> Result:
    """The formulas of appendix A.1 of the paper, straight through."""
    leaf = z.detach().requires_grad_()
    size = torch.tensor(levels, device=z.device)
    half = (size - 1) * (1 + 1e-3) / 2
    offset = torch.where(size % 2 == 0, 0.5, 0.0)
    bounded = torch.tanh(leaf + torch.atanh(offset / half)) * half - offset
    rounded = bounded + (bounded.round() - bounded).detach()
    basis = torch.cumprod(torch.cat((size.new_ones(1), size[:-1])), 0)
    indices = ((rounded.detach() + size // 2) * basis).sum(-1).to(torch.int32)
    (rounded / (size // 2)).backward(gradient)
    assert leaf.grad is not None
    return leaf.grad, indices


PEERS = {
    "as many bytes": as_many_bytes(torch.int32),
    "plain torch": Peer(lambda *arguments: lambda: PLAIN(*arguments)),
    "vector-quantize-pytorch": library(modules.fsq_step, note="FSQ in train mode"),
}
