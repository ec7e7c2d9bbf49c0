"""Schedulers in sigma, after k-diffusion, and those of flow matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mmfast import schedule
from mmfast.integrations.diffusers.tables.program import (
    Options,
    Program,
    clip_of,
    grid_of,
    host,
    prediction_of,
    program_of,
)
from mmfast.schedule import Grid
from mmfast.schedule.samplers.kdpm2 import midpoint
from mmfast.schedule.samplers.multistep import integral
from mmfast.schedule.samplers.steps import Steps, check_order
from mmfast.schedule.table import Linear, TableBuilder, model_output, noise, x


def exploding(timesteps: Sequence[float], sigmas: Sequence[float], begin: int) -> Grid:
    """x0 + sigma n, of which the model gets the variance-preserving form."""
    # Those of interpolation_type="log_linear" have one more, which no step gets to.
    sigmas = sigmas[: len(timesteps) + 1]
    scales = [1 / math.hypot(1.0, s) for s in sigmas]
    return grid_of(timesteps, [(1.0, s) for s in sigmas], begin, scales=scales)


def _paired(s: Any, begin: int) -> tuple[list[float], list[float], int]:
    # Two calls a step: every second entry of what is repeated.
    if begin % 2:
        raise ValueError(
            f"{type(s).__name__} makes its steps of two calls: it can begin at an even index, got "
            f"{begin}"
        )
    timesteps = host(s.timesteps)[::2]
    sigmas = host(s.sigmas)[: 2 * len(timesteps) : 2]
    return timesteps, [*sigmas, host(s.sigmas)[-1]], begin // 2


def churn_options(options: Options) -> dict[str, float]:
    return dict(zip(("churn", "churn_min", "churn_max", "churn_noise"), options, strict=True))


def churn_of(churn: float, steps: int) -> float:
    """By what a step of so many raises sigma first."""
    return min(churn / steps, math.sqrt(2) - 1)


def churned(sigmas: Sequence[float], options: Options) -> tuple[bool, ...]:
    churn, low, high, _ = options
    return tuple(churn > 0 and low <= sigma <= high for sigma in sigmas[:-1])


def euler(s: Any, begin: int, options: Options) -> Program:
    sigmas = host(s.sigmas)
    grid = exploding(host(s.timesteps), sigmas, 0)
    churn, *limits = options
    churn *= len(grid) / (len(sigmas) - 1)
    table = schedule.euler(grid, prediction=prediction_of(s), **churn_options((churn, *limits)))
    return Program(table, churned(sigmas, options)[: len(table)])


def euler_ancestral(s: Any, begin: int, options: Options) -> Program:
    grid = exploding(host(s.timesteps), host(s.sigmas), 0)
    return program_of(schedule.euler_ancestral(grid, prediction=prediction_of(s)), draws=True)


def heun(s: Any, begin: int, options: Options) -> Program:
    return program_of(
        schedule.heun(exploding(*_paired(s, begin)), prediction=prediction_of(s), clip=clip_of(s))
    )


def kdpm2(s: Any, begin: int, options: Options) -> Program:
    grid = exploding(*_paired(s, begin))
    middles, downs = host(s.sigmas_interpol)[begin + 1 :: 2], grid.sigma[1:].tolist()
    ups = [0.0] * len(downs)
    return program_of(midpoint(grid, prediction_of(s), None, middles, downs, ups))


def kdpm2_ancestral(s: Any, begin: int, options: Options) -> Program:
    levels = (s.sigmas_interpol, s.sigmas_down, s.sigmas_up)
    middles, downs, ups = (host(values)[begin::2] for values in levels)
    grid = exploding(*_paired(s, begin))
    table = midpoint(grid, prediction_of(s), None, middles, downs, ups)
    return Program(table, tuple(row % 2 == 1 for row in range(len(table))))


def lms(s: Any, begin: int, options: Options) -> Program:
    """options: the order, and how many values are remembered, at least that many."""
    sigmas = host(s.sigmas)
    grid = exploding(host(s.timesteps), sigmas, 0)
    order, ring = (min(size, max(len(grid), 1)) for size in options)
    check_order(order, 12)
    steps = Steps(grid, prediction_of(s), ring=ring)
    for i in range(begin, len(grid)):
        noises = [steps.noise(i), *(steps.last(k) for k in range(1, steps.pushed + 1))]
        # The library asks the index for the order: what is from before the begin counts as 0.
        nodes = [sigmas[i - k] for k in range(min(order, i + 1))]
        noises += [Linear({})] * (len(nodes) - len(noises))
        following = x + integral(nodes, sigmas[i + 1], noises[: len(nodes)])
        steps.step(i, following, push=noises[0])
    return program_of(steps.table(), ring=ring)


def _flow(timesteps: Sequence[float], sigmas: Sequence[float], begin: int) -> Grid:
    if len(sigmas) == len(timesteps):  # as they are before set_timesteps
        sigmas = [*sigmas, 0.0]
    return grid_of(timesteps, [(1 - s, s) for s in sigmas], begin)


def flow_euler(s: Any, begin: int, options: Options) -> Program:
    stochastic = s.config.stochastic_sampling
    grid = _flow(host(s.timesteps), host(s.sigmas), 0)
    return program_of(schedule.flow_euler(grid, stochastic=stochastic), draws=stochastic)


def flow_heun(s: Any, begin: int, options: Options) -> Program:
    """options: those of the churn."""
    grid = _flow(*_paired(s, begin))
    churn, low, high, factor = options
    if churn <= 0:
        return program_of(schedule.flow_heun(grid))
    # The library draws for both calls of a step, but what it adds for the second one cancels.
    most = churn_of(churn, len(s.sigmas) - 1)
    builder, draws = TableBuilder(keep=["half"]), []
    for i in range(len(grid)):
        sigma, after = grid.point(i)[1], grid.point(i + 1)[1]
        gamma = most if low <= sigma <= high else 0.0
        start = x + factor * sigma * math.sqrt((1 + gamma) ** 2 - 1) * noise
        change = after - sigma * (1 + gamma)
        slope = model_output / (1 + gamma)
        last = i == len(grid) - 1
        half = {} if last else {"half": start + change / 2 * slope}
        builder.row(grid.timestep(i), next=start + change * slope, keep=half)
        if not last:
            following = builder.kept("half") + change / 2 * model_output
            builder.row(grid.timestep(i + 1), next=following)
        draws += [gamma > 0] * (1 if last else 2)
    return Program(builder.build(), tuple(draws))
