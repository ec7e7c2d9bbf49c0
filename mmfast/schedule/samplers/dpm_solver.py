"""DPM-Solver and DPM-Solver++, multistep and singlestep, and their SDE forms."""

from __future__ import annotations

from collections.abc import Sequence

from mmfast.checks import check_choice
from mmfast.schedule.grid import Grid
from mmfast.schedule.samplers.exponential import Interval
from mmfast.schedule.samplers.steps import Clip, Steps, check_order
from mmfast.schedule.table import Linear, SamplerTable, denoised, noise, x

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
SOLVER_TYPES = ("midpoint", "heun", "adams")
FEW_STEPS = 15  # below this many, lower_order_final lowers the orders of the last two


def dpm_solver(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> SamplerTable:
    """Multistep DPM-Solver (Lu et al. 2022, arXiv 2206.00927) and ++ (arXiv 2211.01095, algo. 2).

    One call of the model a step; the steps before give the slopes.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        order: 1 to 3.
        algorithm: "dpmsolver" integrates the noise, "dpmsolver++" the clean sample; with "sde-" the
            reverse SDE instead of the ODE.
        solver_type: what the slope adds in order 2: half a first-order term ("midpoint"), or its
            integral ("heun"). In order 3 both have the authors' coefficients, which count the
            second derivative half and so converge with order 2; "adams" integrates the polynomial
            through the last values, and converges with order 3.
        lower_order_final: orders 2 and 1 for the last two steps if there are fewer than 15.
        euler_at_final: order 1 for the last step.

    Raises:
        ValueError: an unknown option.
    """
    of_noise, tau = _check(order, algorithm, solver_type)
    steps = Steps(grid, prediction, clip, ring=order - 1)
    count = len(grid)
    for i in range(count):
        value = steps.noise(i) if of_noise else denoised
        push = value if order > 1 else None
        following = steps.clean(i)
        if following is None:
            highest = order
            few = lower_order_final and grid.total_steps < FEW_STEPS
            if i == count - 1 and (euler_at_final or few):
                highest = 1
            elif i == count - 2 and few:
                highest = 2
            known = min(highest - 1, steps.pushed)
            values = [(i, value), *((i - k, steps.last(k)) for k in range(1, known + 1))]
            following = _solve(
                Interval(grid, i, i + 1, tau=tau, of_noise=of_noise), x, values, solver_type
            )
        steps.step(i, following, push=push)
    return steps.table()


def dpm_solver_singlestep(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> SamplerTable:
    """Singlestep DPM-Solver (arXiv 2206.00927, algorithms 1 and 2) and ++ (arXiv 2211.01095).

    Groups of ``order`` grid steps: the points within a group are its intermediate ones, and each
    step of a group starts from the group's first sample.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        order: 1 to 3.
        algorithm: as of :func:`dpm_solver`.
        solver_type: as there in order 2. In order 3, "midpoint" has a straight line through the
            first and last value of the group, "heun" and "adams" the parabola through all three.
        lower_order_final: end with a step of order 1.

    Raises:
        ValueError: an unknown option.
    """
    of_noise, tau = _check(order, algorithm, solver_type)
    steps = Steps(grid, prediction, clip, ring=order - 1, keep=["x"])
    orders = [i % order + 1 for i in range(grid.total_steps)]
    if lower_order_final and len(orders) % order == 0:
        orders[-1] = 1
    for i, highest in enumerate(orders[grid.skipped :]):
        value = steps.noise(i) if of_noise else denoised
        push = value if order > 1 else None
        now = min(highest, steps.pushed + 1)
        following = steps.clean(i)
        if following is None:
            start = i - now + 1
            interval = Interval(grid, start, i + 1, tau=tau, of_noise=of_noise)
            values = [*((i - k, steps.last(k)) for k in range(now - 1, 0, -1)), (i, value)]
            if now == 3 and solver_type == "midpoint":
                values.pop(1)
                kind = "heun"
            else:
                kind = "adams" if now == 3 else solver_type
            following = _solve(interval, x if now == 1 else steps.kept("x"), values, kind)
        steps.step(i, following, push=push, keep={"x": x} if now == 1 else None)
    return steps.table()


def _check(order: int, algorithm: str, solver_type: str) -> tuple[bool, float]:
    check_order(order, 3)
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    return not algorithm.endswith("++"), float(algorithm.startswith("sde-"))


def _solve(
    interval: Interval, start: Linear, values: Sequence[tuple[int, Linear]], solver_type: str
) -> Linear:
    powers = interval.through(values)
    weights = interval.weights(len(powers))
    if len(powers) == 2 and solver_type == "midpoint":
        weights[1] = weights[0] / 2
    if len(powers) == 3 and solver_type != "adams":
        weights[2] /= 2
    return interval.linear * start + interval.integral(powers, weights) + interval.noise * noise
