"""The samplers that EDM models are used with: a network with preconditioning, sigma as time."""

from __future__ import annotations

import math

from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.dpm_solver import dpm_solver
from mmfast.schedule.samplers.euler import euler
from mmfast.schedule.samplers.steps import Clip
from mmfast.schedule.table import SamplerTable


def edm_euler(
    grid: Grid,
    *,
    prediction: str = "edm",
    clip: Clip = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> SamplerTable:
    """:func:`euler` on a grid of an :class:`mmfast.schedule.EDMSchedule`, with its options."""
    return euler(
        grid,
        prediction=prediction,
        clip=clip,
        churn=churn,
        churn_min=churn_min,
        churn_max=churn_max,
        churn_noise=churn_noise,
    )


def edm_dpm(
    grid: Grid,
    *,
    prediction: str = "edm",
    clip: Clip = None,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> SamplerTable:
    """DPM-Solver++ (2M) in sigma: :func:`dpm_solver` on x / alpha, with its options."""
    return dpm_solver(
        grid.variance_exploding(),
        prediction=prediction,
        clip=clip,
        order=order,
        algorithm=algorithm,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
    )
