"""Ancestral sampling of denoising diffusion probabilistic models."""

from __future__ import annotations

import math

from mmfast.checks import check_choice
from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.steps import Clip, Steps
from mmfast.schedule.table import SamplerTable, denoised, noise, x

VARIANCES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)


def posterior(grid: Grid, i: int) -> tuple[float, float, float, float]:
    """Of the step from point i to i + 1: (of x0, of x, variance, variance of the forward step).

    q(x_s | x_t, x0) of Ho et al. 2020 (arXiv 2006.11239), equation 7, for any alpha and sigma.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = grid.point(i), grid.point(i + 1)
    ratio = alpha_t / alpha_s
    forward = grid.forward_variance(i)
    kept = (sigma_s / sigma_t) ** 2
    return alpha_s * forward / sigma_t**2, ratio * kept, forward * kept, forward


def ddpm(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    variance: str = "fixed_small",
    noise_at_end: bool = False,
) -> SamplerTable:
    """DDPM (Ho et al. 2020, arXiv 2006.11239, algorithm 2), on any subset of the timesteps.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        variance: "fixed_small" is the posterior's, "fixed_large" the forward step's (the same with
            "_log"). "learned": the model predicts its logarithm; "learned_range": where between
            the logarithms of the two, from -1 to 1 (Nichol and Dhariwal 2021, arXiv 2102.09672).
        noise_at_end: add noise at the last step too, unless its timestep is 0. The papers don't.

    Raises:
        ValueError: an unknown option.
    """
    check_choice("variance", variance, VARIANCES)
    steps = Steps(grid, prediction, clip)
    for i in range(len(grid)):
        of_clean, of_x, small, large = posterior(grid, i)
        small = max(small, 1e-20)
        scale, log_scale = (
            math.sqrt(large if variance.startswith("fixed_large") else small),
            (0.0, 0.0),
        )
        if variance == "learned":
            scale, log_scale = 1.0, (0.0, 0.5)
        elif variance == "learned_range":
            low, high = math.log(small), math.log(large)
            scale, log_scale = 1.0, ((low + high) / 4, (high - low) / 4)
        last = i == len(grid) - 1
        if last and not (noise_at_end and grid.timestep(i) > 0):
            scale, log_scale = 0.0, (0.0, 0.0)
        steps.step(i, of_clean * denoised + of_x * x + scale * noise, log_scale=log_scale)
    return steps.table()
