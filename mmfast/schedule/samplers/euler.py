"""Euler's method in sigma, with the variants that add noise."""

from __future__ import annotations

import math

from mmfast.schedule.grid import Grid
from mmfast.schedule.predictions import denoised_from
from mmfast.schedule.samplers.steps import Clip, Steps
from mmfast.schedule.table import Linear, SamplerTable, denoised, model_output, noise, x


def euler(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> SamplerTable:
    """Euler steps of dx/dsigma = n on x / alpha (Karras et al. 2022, arXiv 2206.00364).

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        churn: S_churn of algorithm 2: noise that is added and removed again, over all steps. As
            in diffusers it is added after the call of the model; the algorithm adds it before.
        churn_min: S_tmin, the least sigma with churn.
        churn_max: S_tmax, the largest.
        churn_noise: S_noise, the scale of what is added.

    Raises:
        ValueError: an unknown option.
    """
    grid = grid.variance_exploding()
    steps = Steps(grid, prediction, clip)
    for i in range(len(grid)):
        sigma, after = grid.point(i)[1], grid.point(i + 1)[1]
        churned = churn_min <= sigma <= churn_max
        gamma = min(churn / grid.total_steps, math.sqrt(2) - 1) if churned else 0.0
        if gamma <= 0:
            steps.step(i, denoised + after * steps.noise(i))
            continue
        raised = sigma * (1 + gamma)
        sample = x + churn_noise * sigma * math.sqrt(gamma * (2 + gamma)) * noise
        clean = _at(grid, i, prediction, sample, raised)
        steps.step(i, denoised + after / raised * (sample - denoised), clean=clean)
    return steps.table()


def _at(grid: Grid, i: int, prediction: str, sample: Linear, raised: float) -> Linear:
    # The clean sample at a raised sigma; for v and flows with the coefficients of the point, as
    # diffusers has it.
    sigma, scale = grid.point(i)[1], grid.scale(i)
    if prediction in ("epsilon", "edm", "edm_v"):
        sigma, scale = raised, grid.schedule.input_scale(raised)
    a, b = denoised_from(prediction, scale, sigma * scale, grid.sigma_data)
    return a * scale * sample + b * model_output


def euler_ancestral(
    grid: Grid, *, prediction: str = "epsilon", clip: Clip = None, eta: float = 1.0
) -> SamplerTable:
    """Euler to a lower sigma, then noise back up to the next.

    Song et al. 2021 (arXiv 2011.13456) in the form of Crowson's k-diffusion: sigma_up^2 is
    sigma'^2 (sigma^2 - sigma'^2) / sigma^2, as in DDPM.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        eta: scale of sigma_up, from 0, which is Euler, to 1.

    Raises:
        ValueError: an unknown option, or eta out of range.
    """
    check_eta(eta)
    grid = grid.variance_exploding()
    steps = Steps(grid, prediction, clip)
    for i in range(len(grid)):
        up, down = ancestral(grid.point(i)[1], grid.point(i + 1)[1], eta)
        steps.step(i, denoised + down * steps.noise(i) + up * noise)
    return steps.table()


def check_eta(eta: float) -> None:
    """``eta`` is from 0 to 1, else ValueError."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")


def ancestral(sigma: float, after: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_up, sigma_down) of a step: their squares add up to that of ``after``."""
    up = eta * after * math.sqrt(max(1 - (after / sigma) ** 2, 0.0))
    return up, math.sqrt(max(after**2 - up**2, 0.0))
