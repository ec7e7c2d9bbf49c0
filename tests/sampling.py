"""A small model, and a table run with it, step by step: for the tests of samplers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mmfast
from mmfast.schedule import SamplerTable

_generator = torch.Generator().manual_seed(0)
WEIGHTS = 0.4 * torch.randn(6, 6, dtype=torch.float64, generator=_generator)
START = torch.randn(2, 6, dtype=torch.float64, generator=_generator)
NOISES = torch.randn(40, 2, 6, dtype=torch.float64, generator=_generator)


def network(x: Tensor, timestep: float) -> Tensor:
    """A smooth function that no sampler has reason to expect."""
    return 0.9 * torch.tanh(x @ WEIGHTS) + 0.05 * x


def run(
    table: SamplerTable,
    model: Callable[[Tensor, float], Tensor] = network,
    x: Tensor = START,
    noises: Tensor | None = NOISES,
    variances: Tensor | None = None,
) -> list[Tensor]:
    """The samples after each row, in float64."""
    history = x.new_full((table.slots, *x.shape), torch.nan)
    model_input = x * table.first_input_scale
    samples = []
    for i, timestep in enumerate(table.timesteps.tolist()):
        x = mmfast.sampler_step(
            x,
            model(model_input, timestep),
            table,
            i,
            history=history,
            noise=None if noises is None else noises[i],
            variance=None if variances is None else variances[i],
            model_input=model_input,
        )
        samples.append(x)
    return samples
