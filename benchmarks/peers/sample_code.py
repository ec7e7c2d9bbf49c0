"""Peers of sample_code: plain PyTorch, vector-quantize-pytorch. They draw from another stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, needs


def _plain(
    x: Tensor, codebook: Tensor, temperature: float, metric: str, seed: Tensor, offset: Tensor
) -> Callable[[], Tensor]:
    generator = torch.Generator(x.device).manual_seed(0)

    def run() -> Tensor:
        scores = _logits(x, codebook, metric) / temperature
        noise = torch.empty_like(scores).exponential_(generator=generator)
        return (scores - noise.log()).argmax(-1)

    return run


def _logits(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return -torch.cdist(x, codebook)
    if metric == "cosine":
        normalize = torch.nn.functional.normalize
        x, codebook = normalize(x, dim=-1), normalize(codebook, dim=-1)
    return x @ codebook.mT


def _vector_quantize(
    x: Tensor, codebook: Tensor, temperature: float, metric: str, seed: Tensor, offset: Tensor
) -> Callable[[], Tensor]:
    from vector_quantize_pytorch.vector_quantize_pytorch import cdist, gumbel_sample

    def run() -> Tensor:
        distances = -cdist(x[None], codebook[None])
        return gumbel_sample(distances, temperature=temperature, stochastic=True)[0][0]

    return run


def _euclidean(x: Tensor, codebook: Tensor, temperature: float, metric: str, *_: Any) -> list[str]:
    return [] if metric == "euclidean" else [f"only timed with distances, not {metric}"]


def _matrices(x: Tensor, codebook: Tensor, *_: Any) -> int:
    return 12 * x.shape[:-1].numel() * codebook.shape[-2]


PEERS = {
    "cdist+exponential+argmax": Peer(_plain, workspace=_matrices, random=True, cut=False),
    "vector-quantize-pytorch": Peer(
        _vector_quantize,
        needs("vector_quantize_pytorch"),
        _euclidean,
        # Distances, noise, scores, and an int64 one-hot, all N x K.
        workspace=lambda *arguments: 3 * _matrices(*arguments),
        random=True,
        cut=False,
        note="cdist and gumbel_sample; other random numbers",
    ),
}
