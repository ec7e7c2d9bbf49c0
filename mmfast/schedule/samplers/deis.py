"""Diffusion exponential integrator sampler."""

from __future__ import annotations

from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.dpm_solver import FEW_STEPS
from mmfast.schedule.samplers.exponential import Interval
from mmfast.schedule.samplers.steps import Clip, Steps, check_order
from mmfast.schedule.table import SamplerTable, x


def deis(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    order: int = 2,
    lower_order_final: bool = True,
) -> SamplerTable:
    """DEIS (Zhang and Chen 2023, arXiv 2204.13902), tAB with polynomials in log rho.

    rho = sigma / alpha = e^-lambda, so that it integrates the noise's polynomial in lambda.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        order: 1 to 4; the paper counts from 0.
        lower_order_final: orders 2 and 1 for the last two steps if there are fewer than 15.

    Raises:
        ValueError: an unknown option.
    """
    check_order(order, 4)
    steps = Steps(grid, prediction, clip, ring=order - 1)
    for i in range(len(grid)):
        value = steps.noise(i)
        following = steps.clean(i)
        if following is None:
            left = len(grid) - i
            few = lower_order_final and grid.total_steps < FEW_STEPS
            known = min(order - 1, steps.pushed, left - 1 if few and left <= 2 else order)
            interval = Interval(grid, i, i + 1, of_noise=True)
            values = [(i, value), *((i - k, steps.last(k)) for k in range(1, known + 1))]
            following = interval.linear * x + interval.integral(interval.through(values))
        steps.step(i, following, push=value if order > 1 else None)
    return steps.table()
