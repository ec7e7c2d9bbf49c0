"""Samplers of consistency models, for a handful of steps."""

from __future__ import annotations

import math

from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.euler import check_eta
from mmfast.schedule.samplers.steps import Clip, Steps
from mmfast.schedule.table import SamplerTable, denoised, noise, x


def lcm(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> SamplerTable:
    """Latent consistency models (Luo et al. 2023, arXiv 2310.04378): predict, noise again, repeat.

    The consistency function is c_skip x + c_out x0 with the scalings of Song et al. 2023
    (arXiv 2303.01469) at ``timestep_scaling`` times the timestep.

    Args:
        grid: where it goes: timesteps of :func:`mmfast.schedule.spacings.consistency`.
        prediction: what the model predicts.
        clip: range of the clean sample.
        timestep_scaling: see above.
        sigma_data: of the scalings.

    Raises:
        ValueError: an unknown option.
    """
    steps = Steps(grid, prediction, clip)
    for i in range(len(grid)):
        scaled = timestep_scaling * grid.timestep(i)
        total = scaled**2 + sigma_data**2
        consistent = sigma_data**2 / total * x + scaled / math.sqrt(total) * denoised
        alpha, sigma = grid.point(i + 1)
        steps.step(i, alpha * consistent + sigma * noise)
    return steps.table()


def tcd(
    grid: Grid, *, prediction: str = "epsilon", clip: Clip = None, eta: float = 0.3
) -> SamplerTable:
    """Trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159, algorithm 4).

    A DDIM step to s = (1 - eta) of the next timestep, rounded down, and noise from there to it.

    Args:
        grid: where it goes: timesteps of :func:`mmfast.schedule.spacings.consistency`. The last
            point counts as timestep 0.
        prediction: what the model predicts.
        clip: range of the clean sample.
        eta: gamma of the paper, from 0, without noise, to 1.

    Raises:
        ValueError: an unknown option, or eta out of range.
    """
    check_eta(eta)
    steps = Steps(grid, prediction, clip)
    for i in range(len(grid)):
        alpha, sigma = grid.point(i + 1)
        alpha_s, sigma_s = alpha, sigma
        if i + 1 < len(grid):
            alpha_s, sigma_s = grid.schedule.at(math.floor((1 - eta) * grid.timestep(i + 1)))
        ratio = alpha / alpha_s
        added = math.sqrt(max(sigma**2 - (ratio * sigma_s) ** 2, 0.0)) if eta > 0 else 0.0
        direction = grid.noise(i, prediction)
        steps.step(i, alpha * denoised + ratio * sigma_s * direction + added * noise)
    return steps.table()
