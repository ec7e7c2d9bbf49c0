"""Peers of randn: torch's own, with a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.peers import Peer


def _generator(
    seed: Tensor, offset: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Callable[[], Tensor]:
    generator = torch.Generator(seed.device).manual_seed(0)
    return lambda: torch.randn(*shape, generator=generator, dtype=dtype, device=seed.device)


def _generators(
    seed: Tensor, offset: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Callable[[], Tensor]:
    seeds = seed.reshape(-1).tolist()
    own = [torch.Generator(seed.device).manual_seed(n % 2**64) for n in seeds]
    size = (shape[0] // len(own), *shape[1:])

    def run() -> Tensor:
        parts = [torch.randn(size, generator=g, dtype=dtype, device=seed.device) for g in own]
        return torch.cat(parts)

    return run


PEERS = {
    "torch.randn": Peer(
        _generator, random=True, note="one torch.Generator for the batch; other numbers"
    ),
    "torch.randn per sample": Peer(
        _generators,
        random=True,
        note="a generator for each sample, as diffusers does it; other numbers",
    ),
}
