"""DPM-Solver-2 as the midpoint method in sigma, with and without noise."""

from __future__ import annotations

import itertools
import math

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
    pairs = [(s, down) for s, down in zip(sigmas, downs, strict=False) if down > 0]
    middles = [math.sqrt(s * down) for s, down in pairs]
    fine = grid.refined(
        [grid.schedule.timestep_of(middle) for middle in middles], [(1.0, m) for m in middles]
    )
    steps = Steps(fine, prediction, clip, keep=["x"])
    for i in range(len(middles)):
        at, middle = 2 * i, 2 * i + 1
        steps.step(at, denoised + middles[i] * steps.noise(at), keep={"x": x})
        slope = (downs[i] - sigmas[i]) * steps.noise(middle)
        steps.step(middle, steps.kept("x") + slope + ups[i] * noise)
    if len(middles) < len(grid):
        steps.step(2 * len(middles), denoised)
    return steps.table()
