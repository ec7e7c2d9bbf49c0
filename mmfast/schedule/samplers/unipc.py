"""UniPC: a predictor and a corrector of the same exponential integrator."""

from __future__ import annotations

import math
from collections.abc import Collection

from mmfast.checks import check_choice
from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.exponential import Interval
from mmfast.schedule.samplers.steps import Clip, Steps, check_order
from mmfast.schedule.table import Linear, SamplerTable, denoised, x


def unipc(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    order: int = 2,
    variant: str = "bh2",
    predict_x0: bool = True,
    predictor: bool = True,
    corrector: bool = True,
    without_corrector: Collection[int] = (),
    lower_order_final: bool = True,
) -> SamplerTable:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8): one call of the model a step.

    The model's output corrects the sample that it was evaluated at, without another call. Solving
    the paper's equation 9 gives the integral of the polynomial through all values, whatever B(h);
    only where the paper sets one coefficient to 1/2 does B(h) matter.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        order: 1 to 12; the corrector raises it by 1. The paper goes to 3.
        variant: "bh1": B(h) = h, "bh2": B(h) = e^h - 1.
        predict_x0: integrate the clean sample, else the noise.
        predictor: whether to go on; else a step gives its own sample corrected, for another solver
            to go on from.
        corrector: whether to correct.
        without_corrector: steps after which not to.
        lower_order_final: no higher order than steps are left.

    Raises:
        ValueError: an unknown option.
    """
    check_order(order, 12)
    check_choice("variant", variant, ("bh1", "bh2"))
    steps = Steps(grid, prediction, clip, ring=order, keep=["base"])
    used = 0  # order of the last predictor
    interval: Interval | None = None
    for i in range(len(grid)):
        value = denoised if predict_x0 else steps.noise(i)
        sample = x
        skipped = not corrector or i + grid.skipped - 1 in without_corrector
        if interval is not None and not skipped and math.isfinite(interval.h):
            values = [*((i - k, steps.last(k)) for k in range(1, used + 1)), (i, value)]
            sample = steps.kept("base") + _solve(interval, values, variant if used == 1 else "")
        used = min(order, steps.pushed + 1)
        if lower_order_final:
            used = min(used, len(grid) - i)
        following = steps.clean(i)
        keep: dict[str, Linear] = {}
        if following is None:
            interval = Interval(grid, i, i + 1, of_noise=not predict_x0)
            keep["base"] = interval.linear * sample
            values = [(i, value), *((i - k, steps.last(k)) for k in range(1, used))]
            following = keep["base"] + _solve(interval, values, variant if used == 2 else "")
        steps.step(i, following if predictor else sample, push=value, keep=keep)
    return steps.table()


def _solve(interval: Interval, values: list[tuple[int, Linear]], half: str) -> Linear:
    powers = interval.through(values)
    weights = interval.weights(len(powers))
    if half and len(powers) == 2:
        weights[1] = interval.gain * interval.k / 2 if half == "bh1" else weights[0] / 2
    return interval.integral(powers, weights)
