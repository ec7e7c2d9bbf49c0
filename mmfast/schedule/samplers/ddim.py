"""Denoising diffusion implicit models."""

from __future__ import annotations

import math

from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.ddpm import posterior
from mmfast.schedule.samplers.steps import Clip, Steps
from mmfast.schedule.table import SamplerTable, denoised, noise


def ddim(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    clip_noise: bool = False,
    eta: float = 0.0,
) -> SamplerTable:
    """DDIM (Song et al. 2021, arXiv 2010.02502, equation 12).

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        clip_noise: the noise follows from the clamped sample, not from the model's output
            (Dhariwal and Nichol 2021, arXiv 2105.05233).
        eta: 0 adds no noise, 1 as much as DDPM.

    Raises:
        ValueError: an unknown option, or eta below 0.
    """
    if eta < 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
    steps = Steps(grid, prediction, clip)
    for i in range(len(grid)):
        alpha, sigma = grid.point(i + 1)
        _, _, variance, _ = posterior(grid, i)
        std = eta * math.sqrt(max(variance, 0.0))
        direction = grid.noise(i, prediction, clip if clip_noise else None)
        kept = math.sqrt(max(sigma**2 - std**2, 0.0))
        steps.step(i, alpha * denoised + kept * direction + std * noise)
    return steps.table()
