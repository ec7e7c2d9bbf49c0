"""DPM-Solver-2 as the midpoint method in sigma, with and without noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.euler import ancestral, check_eta
from mmfast.schedule.samplers.steps import Clip, Steps
from mmfast.schedule.table import SamplerTable, denoised, noise, x


def kdpm2(grid: Grid, *, prediction: str = "epsilon", clip: Clip = None) -> SamplerTable:
    """Midpoint steps: the middle is the geometric mean of the two sigmas.

    Karras et al. 2022 (arXiv 2206.00364), algorithm 3 and Lu et al. 2022 (arXiv 2206.00927,
    DPM-Solver-2). Two calls of the model a step, one for the last to sigma 0: 2 S - 1 rows.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.

    Raises:
        ValueError: an unknown option.
    """
    return _midpoint(grid, prediction, clip, eta=0.0)


def kdpm2_ancestral(
    grid: Grid, *, prediction: str = "epsilon", clip: Clip = None, eta: float = 1.0
) -> SamplerTable:
    """The same to a lower sigma, then noise back up: see :func:`euler_ancestral`.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        eta: scale of the noise, from 0 to 1.

    Raises:
        ValueError: an unknown option, or eta out of range.
    """
    check_eta(eta)
    return _midpoint(grid, prediction, clip, eta)


def _midpoint(grid: Grid, prediction: str, clip: Clip, eta: float) -> SamplerTable:
    grid = grid.variance_exploding()
    sigmas = grid.sigma.tolist()
    ups, downs = zip(*(ancestral(s, t, eta) for s, t in itertools.pairwise(sigmas)), strict=True)
    middles = [math.sqrt(s * down) for s, down in zip(sigmas, downs, strict=False)]
    return midpoint(grid, prediction, clip, middles, downs, ups)


def midpoint(
    grid: Grid,
    prediction: str,
    clip: Clip,
    middles: Sequence[float],
    downs: Sequence[float],
    ups: Sequence[float],
) -> SamplerTable:
    """Steps of two calls, from each sigma by its middle down, and by noise up again.

    Args:
        grid: S steps, variance exploding.
        prediction: what the model predicts.
        clip: range of the clean sample.
        middles: S sigmas of the second calls; from the first 0 on there are none.
        downs: S sigmas before the noise.
        ups: S scales of the noise.
    """
    between = list(itertools.takewhile(lambda middle: middle > 0, middles[: len(grid)]))
    fine = grid.refined(
        [grid.schedule.timestep_of(middle) for middle in between], [(1.0, m) for m in between]
    )
    steps = Steps(fine, prediction, clip, keep=["x"])
    for i, middle in enumerate(between):
        first, second = 2 * i, 2 * i + 1
        steps.step(first, denoised + middle * steps.noise(first), keep={"x": x})
        slope = (downs[i] - fine.point(first)[1]) * steps.noise(second)
        steps.step(second, steps.kept("x") + slope + ups[i] * noise)
    if len(between) < len(grid):
        steps.step(2 * len(between), denoised)
    return steps.table()
