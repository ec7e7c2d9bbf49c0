"""Heun's method in sigma."""

from __future__ import annotations

from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.steps import Clip, Steps
from mmfast.schedule.table import SamplerTable, denoised, x


def heun(grid: Grid, *, prediction: str = "epsilon", clip: Clip = None) -> SamplerTable:
    """The trapezoidal rule with an Euler step to its end (Karras et al. 2022, algorithm 1).

    arXiv 2206.00364. Two calls of the model a step, one for the last to sigma 0: 2 S - 1 rows.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.

    Raises:
        ValueError: an unknown option.
    """
    grid = grid.variance_exploding()
    steps = Steps(grid, prediction, clip, keep=["half"])
    for i in range(len(grid)):
        sigma, after = grid.point(i)[1], grid.point(i + 1)[1]
        half = (after - sigma) / 2
        first = x + half * steps.noise(i)
        if after == 0 or i == len(grid) - 1:
            steps.step(i, denoised + after * steps.noise(i))
            continue
        steps.step(i, denoised + after * steps.noise(i), keep={"half": first})
        steps.step(i + 1, steps.kept("half") + half * steps.noise(i + 1), to=i + 1)
    return steps.table()
