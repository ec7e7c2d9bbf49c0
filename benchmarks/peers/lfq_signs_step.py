"""Peers of a forward and backward of LFQ without its entropies. Each returns the gradient of z and
the indices."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import modules
from benchmarks.peers import Peer, as_many_bytes, library
from benchmarks.peers.lfq_step import first_rows as first_rows
from benchmarks.peers.lookup_free_quantize import PLAIN_WORKSPACE as _TABLES


def PLAIN(z: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """As a user writes it, straight through."""
    leaf = z.detach().requires_grad_()
    place = torch.arange(z.shape[1] - 1, -1, -1, device=z.device)
    ones = leaf > 0
    indices = (ones.long() << place).sum(1)
    codes = torch.where(ones, 1.0, -1.0)
    (leaf + (codes - leaf).detach()).backward(gradient)
    assert leaf.grad is not None
    return leaf.grad, indices


PEERS = {
    "as many bytes": as_many_bytes(torch.int64),
    "plain torch": Peer(lambda *arguments: lambda: PLAIN(*arguments)),
    "vector-quantize-pytorch": library(
        modules.lfq_signs_step,
        workspace=lambda z, _: 3 * _TABLES(z),
        rarely=True,
        note="LFQ in train mode, which computes its entropies whatever their weight",
    ),
}
