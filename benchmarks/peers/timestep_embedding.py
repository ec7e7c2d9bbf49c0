"""Peers of timestep_embedding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Peer, needs


def plain(
    timesteps: Tensor, dim: int, period: float, flip: bool, shift: float, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """With angles in float64."""
    half = dim // 2
    places = torch.arange(half, dtype=torch.float64, device=timesteps.device)
    frequencies = torch.exp(-math.log(period) * places / (half - shift))
    angles = scale * timesteps[:, None].double() * frequencies
    parts = [angles.cos(), angles.sin()] if flip else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, -1), (0, dim % 2)).to(dtype)


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
    "plain torch": Peer(lambda *arguments: lambda: plain(*arguments), cut=False),
    # Its angles are float32: near, but not what compare() asks for.
    "diffusers": Peer(_diffusers, needs("diffusers"), cut=False, floor=True, note="float32 angles"),
    "torch.compile": Peer(
        _compiled, needs("diffusers"), cut=False, floor=True, note="of diffusers' formulation"
    ),
}
