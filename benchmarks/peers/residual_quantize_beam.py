"""Peer of residual_quantize_beam: vector-quantize-pytorch's ResidualVQ with a beam."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import Peer, needs
from benchmarks.peers.residual_quantize import first_rows, residual_vq

__all__ = ["PEERS", "first_rows"]


def _workspace(*arguments: Any) -> int:
    """Of each member of the beam distances, their negation and an int64 one-hot."""
    x, _, sizes = arguments[:3]
    return 20 * x.shape[0] * max(sizes) * int(arguments[-1])


def _plain_only(*arguments: Any) -> list[str]:
    _, _, sizes, shared, _, mask, _ = arguments
    if shared or mask is not None or len(set(sizes)) > 1:
        return ["written for codebooks of one size and no mask"]
    return []


def _beam(*arguments: Any) -> Any:
    return residual_vq(arguments, beam_size=arguments[-1])


PEERS = {
    "vector-quantize-pytorch": Peer(
        _beam,
        needs("vector_quantize_pytorch"),
        _plain_only,
        workspace=_workspace,
        note="ResidualVQ with beam_size in eval mode, without gradients",
    ),
}
