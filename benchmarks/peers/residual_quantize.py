"""Peers of residual_quantize: vector-quantize-pytorch's ResidualVQ, and a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, needs
from benchmarks.peers.nearest_code import addmm_argmin

Arguments = tuple[Any, ...]


def first_rows(arguments: Arguments, rows: int) -> Arguments:
    """The same problem for the first ``rows`` vectors."""
    return arguments[0][:rows], *arguments[1:]


def PLAIN(x: Tensor, codes: Tensor, sizes: list[int], *_: Any) -> Tensor:
    """Quantised vectors, stage by stage, as most codecs write it; torch.compile gets it too."""
    residual, total = x, torch.zeros_like(x)
    for codebook in codes.split(sizes):
        chosen = codebook[addmm_argmin(residual, codebook)]
        residual = residual - chosen
        total = total + chosen
    return total


def PLAIN_WORKSPACE(x: Tensor, codes: Tensor, sizes: list[int], *_: Any) -> int:
    """Distances of one stage."""
    return 4 * x.shape[0] * max(sizes)


def residual_vq(arguments: Arguments, **options: Any) -> Callable[[], Tensor]:
    """Quantised vectors by vector-quantize-pytorch."""
    from vector_quantize_pytorch import ResidualVQ

    x, codes, sizes = arguments[:3]
    quantiser = ResidualVQ(
        dim=x.shape[1], num_quantizers=len(sizes), codebook_size=sizes[0], **options
    )
    quantiser = quantiser.eval().to(x.device, x.dtype)
    for layer, codebook in zip(quantiser.layers, codes.split(sizes), strict=True):
        layer.codebook = codebook
    batch = x[None]

    @torch.no_grad()
    def run() -> Tensor:
        return quantiser(batch)[0][0]

    return run


def _plain_only(
    x: Tensor,
    codes: Tensor,
    sizes: list[int],
    shared: bool,
    metric: str,
    gradient: str,
    mask: Tensor | None,
) -> list[str]:
    if shared or metric != "euclidean" or mask is not None or len(set(sizes)) > 1:
        return ["written for codebooks of one size, the Euclidean metric, no mask"]
    return []


PEERS = {
    "addmm+argmin": Peer(
        lambda *arguments: lambda: PLAIN(*arguments),
        unsupported=_plain_only,
        workspace=PLAIN_WORKSPACE,
        note="a stage after the other, without losses and counts",
    ),
    "vector-quantize-pytorch": Peer(
        lambda *arguments: residual_vq(arguments),
        needs("vector_quantize_pytorch"),
        _plain_only,
        # Distances, their negation and an int64 one-hot, all N x K.
        workspace=lambda *arguments: 5 * PLAIN_WORKSPACE(*arguments),
        note="ResidualVQ in eval mode, without gradients",
    ),
}
