"""Peers of a VQ-VAE's training step: the same model with another quantiser."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import vqvae
from benchmarks.modules import DECAY, EPS, Step
from benchmarks.peers import Peer, ema_update, needs, vector_quantize
from benchmarks.peers.code_statistics import index_add
from benchmarks.peers.nearest_code import addmm_argmin
from benchmarks.peers.vector_quantize_step import rotated


class PlainQuantiser(nn.Module):
    """As a user writes it: addmm and argmin, the rotation trick, moving averages by index_add."""

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("embed", codes.clone())
        self.register_buffer("embed_avg", codes.clone())
        self.register_buffer("cluster_size", torch.ones_like(codes[:, 0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vectors = x.flatten(0, 1)
        plain = vector_quantize.plain(vectors, self.embed, addmm_argmin)
        quantized, indices, commitment, _, _ = plain
        turned = rotated(vectors, quantized)
        with torch.no_grad():
            counts, sums = index_add(vectors, indices, len(self.embed))
            self.cluster_size.lerp_(counts, 1 - DECAY)
            self.embed_avg.lerp_(sums, 1 - DECAY)
            sizes = ema_update.smoothed(self.cluster_size, EPS)
            self.embed.copy_(self.embed_avg / sizes[:, None])
        return turned.view_as(x), indices.view(x.shape[:2]), commitment


def _library(*arguments: Any) -> Step:
    made = vqvae.quantiser(importlib.import_module("vector_quantize_pytorch"))
    return vqvae.step(made, *arguments)


PEERS = {
    "plain torch": Peer(
        lambda *arguments: vqvae.step(PlainQuantiser, *arguments),
        cut=False,
        note="addmm+argmin, the rotation trick, index_add",
    ),
    "vector-quantize-pytorch": Peer(
        _library,
        needs("vector_quantize_pytorch"),
        cut=False,
        note="its VectorQuantize in the same model",
    ),
}
