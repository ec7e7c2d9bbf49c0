"""Peers of ema_update: the same in plain PyTorch, in the dtype of the averages."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers import Peer


def smoothed(cluster_size: Tensor, eps: float) -> Tensor:
    """Sizes by which the sums are divided."""
    total = cluster_size.sum(-1, keepdim=True)
    return (cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total


def PLAIN(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> None:
    """As codebooks with moving averages are written."""
    cluster_size.lerp_(counts, 1 - decay)
    embed_sum.lerp_(sums, 1 - decay)
    smooth = smoothed(cluster_size, eps)[..., None]
    if normalize:
        codebook.copy_(torch.nn.functional.normalize(embed_sum / smooth, dim=-1))
    else:
        torch.div(embed_sum, smooth, out=codebook)


PEERS = {"plain torch": Peer(lambda *arguments: lambda: PLAIN(*arguments))}
