"""Multistep and singlestep solvers: DEIS, DPM-Solver, UniPC and SA-Solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmfast import schedule
from mmfast.integrations.diffusers.tables.program import (
    Options,
    Program,
    grid_of,
    host,
    prediction_of,
    program_of,
    unclipped,
)
from mmfast.schedule import Grid, SamplerTable
from mmfast.schedule.samplers.exponential import Interval
from mmfast.schedule.table import Linear, denoised, model_output, x


@dataclass(frozen=True)
class Converted(Grid):
    """A grid whose samples and noises are converted as the library's solvers do.

    Where its rules fit the sigmas (velocities of flows with flow sigmas, and all others without),
    they are what a prediction means. They are kept where they do not: the model may want them.

    Attributes:
        by_sample: noises are found from the sample that is predicted.
    """

    by_sample: bool = False

    def denoised(self, i: int, prediction: str) -> Linear:
        """The clean sample at point i."""
        alpha, sigma = self.point(i)
        if prediction == "v_prediction":
            return alpha * x - sigma * model_output
        if prediction == "flow_prediction":
            return x - self._ratio(i) * model_output
        return super().denoised(i, prediction)

    def noise(self, i: int, prediction: str, clip: object = None) -> Linear:
        """The noise at point i."""
        alpha, sigma = self.point(i)
        if clip is None and prediction == "v_prediction" and not self.by_sample:
            return alpha * model_output + sigma * x
        if prediction in ("v_prediction", "flow_prediction"):
            clean = self.denoised(i, prediction) if clip is None else denoised
            odd = self.by_sample and prediction == "flow_prediction"
            return (x - alpha * clean) / (self._ratio(i) if odd else sigma)
        return super().noise(i, prediction, clip)

    def _ratio(self, i: int) -> float:
        """The library's own sigma at point i."""
        alpha, sigma = self.point(i)
        return sigma if abs(alpha + sigma - 1) < 1e-9 else sigma / alpha


_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def preserving(s: Any, begin: int, by_sample: bool = False) -> Grid:
    """alpha x0 + sigma n for the sigmas of a solver: ratios, or those of straight lines."""
    flow = getattr(s.config, "use_flow_sigmas", False)
    ratios = host(s.sigmas)
    if flow and max(ratios) > 1:
        chosen = [f"{key}=True" for key in _SPACINGS if s.config.get(key)]
        raise ValueError(
            f"{type(s).__name__}: use_flow_sigmas=True takes sigmas of 0 to 1, got up to "
            f"{max(ratios):.4g}{' from ' if chosen else ''}{', '.join(chosen)}: set "
            f"use_flow_sigmas without {', '.join(_SPACINGS)}, or one of these without it"
        )
    points = []
    for ratio in ratios:
        alpha = 1 / math.hypot(1.0, ratio)
        points.append((1 - ratio, ratio) if flow else (alpha, ratio * alpha))
    return grid_of(host(s.timesteps), points, begin, kind=Converted, by_sample=by_sample)


def deis(s: Any, begin: int, options: Options) -> Program:
    order = min(s.config.solver_order, 3)
    table = schedule.deis(
        preserving(s, begin, by_sample=True),
        prediction=prediction_of(s),
        clip=unclipped(s),
        order=order,
        lower_order_final=s.config.lower_order_final,
    )
    return program_of(table, ring=order - 1)


def dpm_multistep(s: Any, begin: int, options: Options) -> Program:
    return multistep(s, schedule.dpm_solver, preserving(s, begin), prediction_of(s))


def multistep(s: Any, solver: Callable[..., SamplerTable], grid: Grid, prediction: str) -> Program:
    order = min(s.config.solver_order, 3)
    table = solver(
        grid,
        prediction=prediction,
        clip=unclipped(s),
        order=order,
        algorithm=s.config.algorithm_type,
        solver_type=s.config.solver_type,
        lower_order_final=s.config.lower_order_final,
        euler_at_final=s.config.euler_at_final,
    )
    return program_of(table, draws=s.config.algorithm_type.startswith("sde"), ring=order - 1)


def dpm_singlestep(s: Any, begin: int, options: Options) -> Program:
    order = s.config.solver_order
    table = schedule.dpm_solver_singlestep(
        preserving(s, begin),
        prediction=prediction_of(s),
        clip=unclipped(s),
        order=order,
        algorithm=s.config.algorithm_type,
        solver_type=s.config.solver_type,
        lower_order_final=s.config.lower_order_final,
    )
    return program_of(table, draws=s.config.algorithm_type.startswith("sde"), ring=order - 1)


def unipc(s: Any, begin: int, options: Options) -> Program:
    grid = preserving(s, begin)
    table = schedule.unipc(
        grid,
        prediction=prediction_of(s),
        clip=unclipped(s) if s.predict_x0 else None,
        order=s.config.solver_order,
        predictor=not s.solver_p,
        variant=s.config.solver_type,
        predict_x0=s.predict_x0,
        without_corrector=s.disable_corrector,
        lower_order_final=s.config.lower_order_final,
    )
    factors, noises = _of_base(s, grid)
    return program_of(table, ring=s.config.solver_order, factors=factors, noises=noises)


def sa_solver(s: Any, begin: int, options: Options) -> Program:
    predictor, corrector = s.config.predictor_order, s.config.corrector_order
    grid = preserving(s, begin)

    def tau(timestep: float) -> float:
        return float(s.tau_func(timestep))

    table = schedule.sa_solver(
        grid,
        prediction=prediction_of(s),
        clip=unclipped(s),
        predictor_order=predictor,
        corrector_order=corrector,
        tau=tau,
        predict_x0=s.predict_x0,
        lower_order_final=s.config.lower_order_final,
    )
    factors, noises = _of_base(s, grid, tau)
    ring = max(predictor, corrector, 2) - 1
    return program_of(table, draws=True, ring=ring, factors=factors, noises=noises)


def _of_base(
    s: Any, grid: Grid, tau: Callable[[float], float] = lambda t: 0.0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By what each row multiplies its sample and noise in the slot that a corrector begins with."""
    made = [
        Interval(grid, i, i + 1, tau=tau(grid.timestep(i)), of_noise=not s.predict_x0)
        if grid.point(i + 1)[1]
        else None
        for i in range(len(grid))
    ]
    factors = tuple(0.0 if step is None else step.linear for step in made)
    return factors, tuple(0.0 if step is None else step.noise for step in made)
