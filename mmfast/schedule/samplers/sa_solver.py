"""SA-Solver: stochastic Adams methods, a predictor and a corrector."""

from __future__ import annotations

from collections.abc import Callable

from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.exponential import Interval
from mmfast.schedule.samplers.steps import Clip, Steps, check_order
from mmfast.schedule.table import Linear, SamplerTable, denoised, noise, x


def middle_tau(timestep: float) -> float:
    """1 from timestep 200 to 800, else 0: the authors' choice for 1000 timesteps."""
    return 1.0 if 200 <= timestep <= 800 else 0.0


def sa_solver(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: Callable[[float], float] = middle_tau,
    predict_x0: bool = True,
    lower_order_final: bool = True,
) -> SamplerTable:
    """SA-Solver (Xue et al. 2023, arXiv 2309.05019, algorithm 1): one call of the model a step.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        predictor_order: 1 to 12.
        corrector_order: 1 to 12, or 0 for none.
        tau: how much noise is new, as a function of the timestep: 0 is the ODE, 1 the reverse SDE.
        predict_x0: integrate the clean sample, else the noise. With the sample, the authors weigh
            the slope in order 2 by h / 2, as bh1 of UniPC, not by its integral.
        lower_order_final: no higher order than steps are left.

    Raises:
        ValueError: an unknown option.
    """
    check_order(predictor_order, 12)
    if not 0 <= corrector_order <= 12:
        raise ValueError(f"corrector_order must be from 0 to 12, got {corrector_order}")
    ring = max(predictor_order, corrector_order, 2) - 1
    steps = Steps(grid, prediction, clip, ring=ring, keep=["base"])
    interval: Interval | None = None
    for i in range(len(grid)):
        left = len(grid) - i
        value = denoised if predict_x0 else steps.noise(i)
        past = [(i - k, steps.last(k)) for k in range(1, steps.pushed + 1)]
        sample = x
        if interval is not None and corrector_order:
            highest = min(corrector_order, left + 2) if lower_order_final else corrector_order
            sample = steps.kept("base") + _solve(
                interval, [(i, value), *past][:highest], predict_x0
            )
        following = steps.clean(i)
        keep: dict[str, Linear] = {}
        if following is None:
            highest = min(predictor_order, left) if lower_order_final else predictor_order
            strength = tau(grid.timestep(i))
            interval = Interval(grid, i, i + 1, tau=strength, of_noise=not predict_x0)
            keep["base"] = interval.linear * sample + interval.noise * noise
            following = keep["base"] + _solve(interval, [(i, value), *past][:highest], predict_x0)
        steps.step(i, following, push=value, keep=keep)
    return steps.table()


def _solve(interval: Interval, values: list[tuple[int, Linear]], predict_x0: bool) -> Linear:
    powers = interval.through(values)
    weights = interval.weights(len(powers))
    if predict_x0 and len(powers) == 2:
        weights[1] = interval.gain * interval.k / 2
    return interval.integral(powers, weights)
