"""Peers of a forward and backward of LFQ with its entropies. Each returns the
gradient of z and the indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks import modules
from benchmarks.peers import Peer, library
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


def _halves(z: Tensor, _: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The products that the batch's entropy takes at least, with the distributions of a code's
    upper and lower bits: one for its mean over the vectors, and one for the gradient of each."""
    bits = z.shape[1]
    upper = z.new_full((z.shape[0], 1 << bits // 2), 0.5)
    lower = z.new_full((z.shape[0], 1 << bits - bits // 2), 0.5)
    table = z.new_full((upper.shape[1], lower.shape[1]), 0.5)
    return lambda: (upper.T @ lower, lower @ table.T, upper @ table)


PEERS = {
    "torch.mm of the halves": Peer(_halves, cut=False, floor=True, note="forward and backward"),
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
