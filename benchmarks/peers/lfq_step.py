"""Peers of a forward and backward of LFQ with its entropies. Each returns the
gradient of z and the indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import modules
from benchmarks.peers import Peer, as_many_bytes, library
from benchmarks.peers.lookup_free_quantize import PLAIN_WORKSPACE, plain
from mmfast.ops.lookup_free_quantize import batch_entropy


def first_rows(arguments: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same problem for the first ``rows`` vectors."""
    z, gradient = arguments
    return z[:rows], gradient[:rows]


def PLAIN(z: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """As a user writes it, with a table of all vectors and codes."""
    leaf = z.detach().requires_grad_()
    quantized, indices, _, entropy, means = plain(leaf, 1.0, False, modules.INV_TEMPERATURE)
    loss = (quantized * gradient).sum() + modules.ENTROPY_WEIGHT * (entropy - batch_entropy(means))
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad, indices[:, 0]


PEERS = {
    "as many bytes": as_many_bytes(torch.int64),
    "plain torch": Peer(
        lambda *arguments: lambda: PLAIN(*arguments),
        # Logits, logarithms, probabilities and the gradients of each.
        workspace=lambda z, _: 2 * PLAIN_WORKSPACE(z),
    ),
    "vector-quantize-pytorch": library(
        modules.lfq_step,
        workspace=lambda z, _: 3 * PLAIN_WORKSPACE(z),
        note="LFQ in train mode; no probability counts as less than 1e-5 in its logarithms",
    ),
}
