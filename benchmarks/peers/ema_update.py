"""Peers of ema_update: the same in plain PyTorch, in the dtype of the averages."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers import Peer

Result = tuple[Tensor, Tensor, Tensor]


def PLAIN(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> Result:
    """As codebooks with moving averages are written."""
    size = torch.lerp(counts, cluster_size, decay)
    total_sum = torch.lerp(sums, embed_sum, decay)
    total = size.sum(-1, keepdim=True)
    smooth = (size + eps) / (total + size.shape[-1] * eps) * total
    codes = total_sum / smooth[..., None]
    return torch.nn.functional.normalize(codes, dim=-1) if normalize else codes, size, total_sum


PEERS = {"plain torch": Peer(lambda *arguments: lambda: PLAIN(*arguments))}
