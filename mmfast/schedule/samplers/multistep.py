"""Linear multistep methods: Adams-Bashforth on the noise in sigma, and with fixed coefficients."""

from __future__ import annotations

from collections.abc import Sequence

from mmfast.schedule.grid import Grid
from mmfast.schedule.layout import M, X
from mmfast.schedule.samplers.exponential import polynomial
from mmfast.schedule.samplers.steps import Clip, Steps, check_order
from mmfast.schedule.table import Linear, SamplerTable, denoised, model_output, x

# Adams-Bashforth for equal steps, newest first.
ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def lms(
    grid: Grid, *, prediction: str = "epsilon", clip: Clip = None, order: int = 4
) -> SamplerTable:
    """Adams-Bashforth in sigma: the last noises' polynomial is integrated over the step.

    Crowson's k-diffusion; the method is Adams'.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        order: 1 to 12.

    Raises:
        ValueError: an unknown option.
    """
    check_order(order, 12)
    grid = grid.variance_exploding()
    steps = Steps(grid, prediction, clip, ring=order - 1)
    for i in range(len(grid)):
        noises = [steps.noise(i), *(steps.last(k) for k in range(1, steps.pushed + 1))]
        sigmas = [grid.point(i - k)[1] for k in range(len(noises))]
        following = x + integral(sigmas, grid.point(i + 1)[1], noises)
        steps.step(i, following, push=noises[0] if order > 1 else None)
    return steps.table()


def integral(sigmas: Sequence[float], after: float, noises: Sequence[Linear]) -> Linear:
    """From sigmas[0] to ``after``, of the polynomial through the noises at these sigmas."""
    change = after - sigmas[0]
    if not change:
        return Linear({})
    powers = polynomial([(sigma - sigmas[0]) / change for sigma in sigmas], noises)
    return change * sum((c / (j + 1) for j, c in enumerate(powers)), Linear({}))


def ipndm(
    grid: Grid, *, prediction: str = "epsilon", clip: Clip = None, order: int = 4
) -> SamplerTable:
    """Fixed Adams-Bashforth coefficients on the noise, then DDIM's transfer, from order 1 up.

    Zhang and Chen 2023 (arXiv 2204.13902, DEIS), appendix on iPNDM.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        order: 1 to 4.

    Raises:
        ValueError: an unknown option.
    """
    check_order(order, 4)
    steps = Steps(grid, prediction, clip, ring=order - 1)
    for i in range(len(grid)):
        noises = [steps.noise(i), *(steps.last(k) for k in range(1, steps.pushed + 1))]
        alpha, sigma = grid.point(i + 1)
        if len(noises) == 1:
            following = alpha * denoised + sigma * noises[0]
        else:
            following = transfer(grid, i, i + 1, x, adams(noises))
        steps.step(i, following, push=noises[0] if order > 1 else None)
    return steps.table()


def pndm(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    clip: Clip = None,
    runge_kutta: bool = False,
    mix_outputs: bool = False,
) -> SamplerTable:
    """Pseudo numerical methods for diffusion models (Liu et al. 2022, arXiv 2202.09778).

    Algorithm 2 (PLMS): fixed Adams-Bashforth coefficients of order 4 on the noise, then DDIM's
    transfer. It starts with a trapezoidal step of two calls (S + 1 rows), or as in the paper with
    three Runge-Kutta steps of four calls each (S + 9 rows), whose midpoints are whole timesteps.

    Args:
        grid: where it goes.
        prediction: what the model predicts.
        clip: range of the clean sample.
        runge_kutta: start with three Runge-Kutta steps.
        mix_outputs: weigh the model's outputs themselves, as diffusers does, not the noises in
            them: for other predictions than epsilon this differs.

    Raises:
        ValueError: an unknown option, or too few steps to start with.
    """
    count = len(grid)
    if runge_kutta and count < 4:
        raise ValueError(f"runge_kutta needs at least 4 steps, got {count}")
    if mix_outputs and clip is not None:
        raise ValueError("not possible: mix_outputs with clip")
    starts = 3 if runge_kutta else 0
    halves = [_halfway(grid, i) for i in range(starts)]
    fine = grid.refined(halves, [grid.schedule.at(t) for t in halves])
    steps = Steps(fine, prediction, clip, ring=3, keep=["x", "sum"] if runge_kutta else ["x"])

    def output(i: int) -> Linear:
        return model_output if mix_outputs else steps.noise(i)

    def move(i: int, j: int, sample: Linear, mixed: Linear) -> Linear:
        if mix_outputs:
            mixed = _as_noise(fine, i, prediction, sample, mixed)
        return transfer(fine, i, j, sample, mixed)

    for k in range(0, 2 * starts, 2):
        half, end = k + 1, k + 2
        base, total = steps.kept("x"), steps.kept("sum")
        e = [output(k), output(half), output(half), output(end)]
        steps.step(k, move(k, half, x, e[0]), push=e[0], keep={"x": x, "sum": e[0] / 6})
        steps.step(half, move(k, half, base, e[1]), to=half, keep={"sum": total + e[1] / 3})
        steps.step(half, move(k, end, base, e[2]), to=end, keep={"sum": total + e[2] / 3})
        steps.step(end, move(k, end, base, total + e[3] / 6), to=end)
    for i in range(2 * starts, len(fine)):
        e0 = output(i)
        if i == 0:
            steps.step(0, move(0, 1, x, e0), push=e0, keep={"x": x})
            continue
        if i == 1 and not runge_kutta:
            average = (e0 + steps.last(1)) / 2
            steps.step(1, move(0, 1, steps.kept("x"), average), to=1)
        noises = [e0, *(steps.last(k) for k in range(1, steps.pushed + 1))]
        steps.step(i, move(i, i + 1, x, adams(noises)), push=e0)
    return steps.table()


def adams(noises: Sequence[Linear]) -> Linear:
    """The mean slope of the next step, from the last slopes, newest first."""
    return sum((w * e for w, e in zip(ADAMS[len(noises) - 1], noises, strict=True)), Linear({}))


def transfer(grid: Grid, i: int, j: int, sample: Linear, noise: Linear) -> Linear:
    """DDIM's step from point i to j, with this noise.

    Raises:
        ValueError: alpha is 0 at i.
    """
    (alpha, sigma), (alpha_to, sigma_to) = grid.point(i), grid.point(j)
    if alpha == 0:
        raise ValueError("this step divides by alpha, which is 0: use a schedule with a floor")
    ratio = alpha_to / alpha
    return ratio * sample + (sigma_to - ratio * sigma) * noise


def _halfway(grid: Grid, i: int) -> float:
    t, after = grid.timestep(i), grid.timestep(i + 1)
    return t - (t - after) // 2


def _as_noise(grid: Grid, i: int, prediction: str, sample: Linear, output: Linear) -> Linear:
    weights = grid.noise(i, prediction).weights
    return weights.get(X, 0.0) * sample + weights[M] * output
