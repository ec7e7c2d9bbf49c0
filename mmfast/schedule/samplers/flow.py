"""Samplers of flow matching: the velocity n - x0 along straight lines."""

from __future__ import annotations

from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.steps import Clip, Steps
from mmfast.schedule.table import Linear, SamplerTable, denoised, noise, x


def flow_euler(
    grid: Grid, *, prediction: str = "flow_prediction", clip: Clip = None, stochastic: bool = False
) -> SamplerTable:
    """Euler steps of dx/dt = n - x0 (Lipman et al. 2023, arXiv 2210.02747).

    Args:
        grid: where it goes, of a :class:`mmfast.schedule.FlowSchedule`.
        prediction: what the model predicts.
        clip: range of the clean sample.
        stochastic: take new noise in each step, as consistency models do.

    Raises:
        ValueError: an unknown option, or a grid that isn't of straight lines.
    """
    _check(grid)
    steps = Steps(grid, prediction, clip)
    for i in range(len(grid)):
        alpha, after = grid.point(i + 1)
        if stochastic:
            steps.step(i, alpha * denoised + after * noise)
        else:
            change = after - grid.point(i)[1]
            steps.step(i, steps.clean(i) or x + change * _velocity(steps, i))
    return steps.table()


def flow_heun(
    grid: Grid, *, prediction: str = "flow_prediction", clip: Clip = None
) -> SamplerTable:
    """Heun's trapezoidal rule on the same: two calls a step, one for the last (2 S - 1 rows).

    Args:
        grid: where it goes, of a :class:`mmfast.schedule.FlowSchedule`.
        prediction: what the model predicts.
        clip: range of the clean sample.

    Raises:
        ValueError: an unknown option, or a grid that isn't of straight lines.
    """
    _check(grid)
    steps = Steps(grid, prediction, clip, keep=["half"])
    for i in range(len(grid)):
        change = grid.point(i + 1)[1] - grid.point(i)[1]
        velocity = _velocity(steps, i)
        if i == len(grid) - 1:
            steps.step(i, steps.clean(i) or x + change * velocity)
            continue
        steps.step(i, x + change * velocity, keep={"half": x + change / 2 * velocity})
        steps.step(i + 1, steps.kept("half") + change / 2 * _velocity(steps, i + 1), to=i + 1)
    return steps.table()


def _velocity(steps: Steps, i: int) -> Linear:
    if steps.clip is not None:
        return steps.noise(i) - denoised
    return steps.noise(i) - steps.grid.denoised(i, steps.prediction)


def _check(grid: Grid) -> None:
    if float((grid.alpha + grid.sigma - 1).abs().max()) > 1e-9:
        raise ValueError("flow samplers need alpha + sigma = 1: a grid of a FlowSchedule")
