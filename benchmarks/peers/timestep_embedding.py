"""Peers of timestep_embedding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, needs


def _diffusers(
    timesteps: Tensor, dim: int, period: float, flip: bool, shift: float, scale: float,
    dtype: torch.dtype,
) -> Callable[[], Tensor]:  # fmt: skip
    from diffusers.models.embeddings import get_timestep_embedding

    make: Any = get_timestep_embedding
    return lambda: make(timesteps, dim, flip, shift, scale, period).to(dtype)


def _compiled(*arguments: Any) -> Callable[[], Tensor]:
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps, dim, period, flip, shift, scale, _ = arguments
    made: Any = torch.compile(get_timestep_embedding)
    return functools.partial(made, timesteps, dim, flip, shift, scale, period)


PEERS = {
    # Its angles are float32: near, but not what compare() asks for.
    "diffusers": Peer(_diffusers, needs("diffusers"), cut=False, floor=True, note="float32 angles"),
    "torch.compile": Peer(
        _compiled, needs("diffusers"), cut=False, floor=True, note="of diffusers' formulation"
    ),
}
