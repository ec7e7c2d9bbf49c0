"""diffusers' schedulers as tables: what each one's configuration, sigmas and timesteps mean.

One function per scheduler: it takes the scheduler, the index that its steps begin at, and the
options of the call, and gives a :class:`Program`. The tables are filled in float64 from the numbers
that the scheduler itself has set, so that what differs from it is only its rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmfast import schedule
from mmfast.ops.add_noise import ALPHA, SIGMA, WEIGHT
from mmfast.schedule import Grid, SamplerTable
from mmfast.schedule.layout import Layout, slots_of
from mmfast.schedule.samplers.ddpm import VARIANCES
from mmfast.schedule.samplers.multistep import adams, integral, transfer
from mmfast.schedule.samplers.steps import Clip, Steps, check_order
from mmfast.schedule.table import Linear, TableBuilder, denoised, model_output, noise, x

Options = tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """A scheduler's steps from some index to the last.

    Attributes:
        table: a row per call of ``step``.
        draws: which of these calls draw noise, whether it has a weight or not, as the library does.
        ring: how many of the slots hold what the last steps pushed.
        output: the slot that is an output of the step, not a memory of it; None for none.
        final: whether the last row's second output is its first.
        refused: why there is no step from a row, whose coefficients are NaN.
        threshold: quantile and maximum of dynamic thresholding; None for none.
    """

    table: SamplerTable
    draws: tuple[bool, ...]
    ring: int = 0
    output: int | None = None
    final: bool = False
    refused: Mapping[int, str] = field(default_factory=dict)
    threshold: tuple[float, float] | None = None


class Points:
    """The schedule behind a grid: where to ask for what lies between its points."""

    def __init__(self, sigma_data: float | None = None) -> None:
        self.sigma_data = sigma_data

    def at(self, timestep: float) -> tuple[float, float]:
        """Not known: there are only the scheduler's points."""
        raise ValueError(
            f"alpha and sigma are known at the scheduler's timesteps, not at {timestep}"
        )

    def timestep_of(self, ratio: float) -> float:
        """Not needed: the scheduler has its timesteps."""
        return 0.0

    def input_scale(self, ratio: float) -> float:
        """Of x / alpha, when the model gets it."""
        return 1 / math.hypot(1.0 if self.sigma_data is None else self.sigma_data, ratio)


@dataclass(frozen=True)
class Cumulative(Grid):
    """One step between two of alphas_cumprod.

    Attributes:
        forward: 1 less their quotient, in the library's precision: at small timesteps it is mostly
            rounding.
    """

    forward: float = 0.0

    def forward_variance(self, i: int) -> float:
        """Of the noise that the way back from point i + 1 to i adds."""
        return self.forward


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


def point(alpha_cumprod: float) -> tuple[float, float]:
    """alpha and sigma; NaN where betas above 1 leave none."""
    if not 0 <= alpha_cumprod <= 1:
        return math.nan, math.nan
    return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)


def _grid(
    timesteps: Sequence[float],
    points: Sequence[tuple[float, float]],
    begin: int,
    *,
    points_of: Points | None = None,
    scales: Sequence[float] | None = None,
    sigma_data: float | None = None,
    **more: Any,
) -> Grid:
    if begin >= len(timesteps):
        raise IndexError(
            f"the schedule has {len(timesteps)} steps, got a begin at {begin}: call set_timesteps"
        )
    alpha, sigma = torch.tensor(points, dtype=torch.float64).unbind(1)
    grid = (Converted if more else Grid)(
        torch.tensor(timesteps, dtype=torch.float64),
        alpha,
        sigma,
        torch.ones_like(alpha) if scales is None else torch.tensor(scales, dtype=torch.float64),
        Points() if points_of is None else points_of,
        sigma_data=sigma_data,
        **more,
    )
    return grid.skip(begin) if begin else grid


def host(values: Tensor) -> list[float]:
    """Numbers of a tensor. They are read back: not for use within a step."""
    return values.detach().double().cpu().tolist()


def exploding(timesteps: Sequence[float], sigmas: Sequence[float], begin: int) -> Grid:
    """x0 + sigma n, of which the model gets the variance-preserving form."""
    # Those of interpolation_type="log_linear" have one more, which no step gets to.
    sigmas = sigmas[: len(timesteps) + 1]
    scales = [1 / math.hypot(1.0, s) for s in sigmas]
    return _grid(timesteps, [(1.0, s) for s in sigmas], begin, scales=scales)


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
    return _grid(host(s.timesteps), points, begin, by_sample=by_sample)


def _flow(timesteps: Sequence[float], sigmas: Sequence[float], begin: int) -> Grid:
    if len(sigmas) == len(timesteps):  # as they are before set_timesteps
        sigmas = [*sigmas, 0.0]
    return _grid(timesteps, [(1 - s, s) for s in sigmas], begin)


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


def _prediction(s: Any) -> str:
    name = s.config.prediction_type
    return "sample" if name == "original_sample" else name


def _clip(s: Any) -> Clip:
    if getattr(s.config, "thresholding", False):
        return math.inf
    return s.config.clip_sample_range if s.config.clip_sample else None


def _unclipped(s: Any) -> Clip:
    return math.inf if s.config.thresholding else None


def _program(table: SamplerTable, draws: bool = False, **more: Any) -> Program:
    return Program(table, (draws,) * len(table), **more)


def _apart(
    s: Any,
    visited: Sequence[int],
    ends: Sequence[int],
    final: Tensor,
    clip: Clip,
    make: Callable[[Grid], SamplerTable],
) -> tuple[SamplerTable, dict[int, str]]:
    """Steps that know of nothing but the timesteps they are between, each made by ``make``.

    ``ends`` below 0 are after the last timestep, where alphas_cumprod is ``final``. A step that can
    not be made is left out, with the reason: a run need not get there.
    """
    alphas = s.alphas_cumprod.detach().cpu()
    here = alphas[list(visited)]
    known = torch.tensor(ends)
    after = torch.where(known >= 0, alphas[known.clamp(min=0)], final.detach().cpu().to(alphas))
    rows: list[Tensor | None] = []
    refused = {}
    unseen = _prediction(s) == "epsilon" and clip not in (None, math.inf)
    pairs = zip(visited, host(here), host(after), host(1 - here / after), strict=True)
    for i, (t, a, b, forward) in enumerate(pairs):
        begin, end = point(a), point(b)
        if a == 0 and unseen:
            # Divided by 0 and clipped, what is left of the difference is its sign.
            begin = _LEAST_ALPHA, 1.0
        try:
            if math.isnan(begin[0] + end[0]):
                raise ValueError(f"alphas_cumprod must be from 0 to 1, got {a:.4g} and {b:.4g}")
            alpha, sigma = torch.tensor([begin, end], dtype=torch.float64).unbind(1)
            grid = Cumulative(
                torch.tensor([t], dtype=torch.float64),
                alpha,
                sigma,
                torch.ones_like(alpha),
                Points(),
                forward=forward,
            )
            rows.append(make(grid).coefficients)
        except ZeroDivisionError:
            refused[i] = f"alphas_cumprod goes from {a:.4g} to {b:.4g}"
        except ValueError as error:
            refused[i] = str(error)
        if i in refused:
            rows.append(None)
    made = next((row for row in rows if row is not None), None)
    if made is None:
        raise ValueError(refused[0])
    unknown = torch.full_like(made, math.nan)
    coefficients = torch.cat([unknown if row is None else row for row in rows])
    times = torch.tensor(visited, dtype=torch.float64)
    return SamplerTable(coefficients, slots_of(made.shape[1]), times), refused


_LEAST_ALPHA = 1e-12


def ddpm(s: Any, begin: int, options: Options) -> Program:
    visited = [int(t) for t in host(s.timesteps)]
    clip = _clip(s)
    # The library takes what it does not know for this one.
    variance = s.variance_type if s.variance_type in VARIANCES else "fixed_small"

    def make(grid: Grid) -> SamplerTable:
        return schedule.ddpm(
            grid, prediction=_prediction(s), clip=clip, variance=variance, noise_at_end=True
        )

    table, refused = _apart(s, visited, [*visited[1:], -1], torch.ones(()), clip, make)
    return Program(table, tuple(t > 0 for t in visited), refused=refused)


def ddim(s: Any, begin: int, options: Options) -> Program:
    """options: eta, use_clipped_model_output, and the timesteps if not the scheduler's."""
    eta, clip_noise, *given = options
    stride = s.config.num_train_timesteps // s.num_inference_steps
    visited = given or [int(t) for t in host(s.timesteps)]
    clip = _clip(s)

    def make(grid: Grid) -> SamplerTable:
        return schedule.ddim(
            grid, prediction=_prediction(s), clip=clip, clip_noise=clip_noise, eta=eta
        )

    # Each step goes to the timestep a stride below its own, which need not be the next one.
    ends = [t - stride for t in visited]
    table, refused = _apart(s, visited, ends, s.final_alpha_cumprod, clip, make)
    return _program(table, draws=eta > 0, refused=refused)


def _churn(options: Options) -> dict[str, float]:
    return dict(zip(("churn", "churn_min", "churn_max", "churn_noise"), options, strict=True))


def _churned(sigmas: Sequence[float], options: Options) -> tuple[bool, ...]:
    churn, low, high, _ = options
    return tuple(churn > 0 and low <= sigma <= high for sigma in sigmas[:-1])


def euler(s: Any, begin: int, options: Options) -> Program:
    sigmas = host(s.sigmas)
    grid = exploding(host(s.timesteps), sigmas, 0)
    churn, *limits = options
    churn *= len(grid) / (len(sigmas) - 1)
    table = schedule.euler(grid, prediction=_prediction(s), **_churn((churn, *limits)))
    return Program(table, _churned(sigmas, options)[: len(table)])


def euler_ancestral(s: Any, begin: int, options: Options) -> Program:
    grid = exploding(host(s.timesteps), host(s.sigmas), 0)
    return _program(schedule.euler_ancestral(grid, prediction=_prediction(s)), draws=True)


def heun(s: Any, begin: int, options: Options) -> Program:
    return _program(
        schedule.heun(exploding(*_paired(s, begin)), prediction=_prediction(s), clip=_clip(s))
    )


def kdpm2(s: Any, begin: int, options: Options) -> Program:
    return _program(schedule.kdpm2(exploding(*_paired(s, begin)), prediction=_prediction(s)))


def kdpm2_ancestral(s: Any, begin: int, options: Options) -> Program:
    table = schedule.kdpm2_ancestral(exploding(*_paired(s, begin)), prediction=_prediction(s))
    return Program(table, tuple(row % 2 == 1 for row in range(len(table))))


def lms(s: Any, begin: int, options: Options) -> Program:
    """options: the order."""
    (order,) = options
    if not isinstance(order, int):
        raise TypeError(f"order must be an int, got {order!r}")
    sigmas = host(s.sigmas)
    grid = exploding(host(s.timesteps), sigmas, 0)
    order = min(order, max(len(grid), 1))
    check_order(order, 12)
    steps = Steps(grid, _prediction(s), ring=order - 1)
    for i in range(begin, len(grid)):
        noises = [steps.noise(i), *(steps.last(k) for k in range(1, steps.pushed + 1))]
        # The library asks the index for the order: what is from before the begin counts as 0.
        nodes = [sigmas[i - k] for k in range(min(order, i + 1))]
        noises += [Linear({})] * (len(nodes) - len(noises))
        following = x + integral(nodes, sigmas[i + 1], noises)
        steps.step(i, following, push=noises[0] if order > 1 else None)
    return _program(steps.table(), ring=order - 1)


def pndm(s: Any, begin: int, options: Options) -> Program:
    # Each call goes from one timestep to another by a rule of the library's that does not ask what
    # the next timestep is, so that a fine grid has both ends of each.
    values, final = host(s.alphas_cumprod), float(s.final_alpha_cumprod)
    stride = s.config.num_train_timesteps // s.num_inference_steps
    starts = 0 if s.config.skip_prk_steps else len(s.prk_timesteps)
    if begin and starts:
        raise ValueError(
            "PNDMScheduler with Runge-Kutta steps begins at the first timestep: use "
            "skip_prk_steps=True to start from an image"
        )
    told = [int(t) for t in host(s.timesteps)][begin:]
    ends = []
    for call, t in enumerate(told):
        if call < starts:
            ends.append((int(s.prk_timesteps[call // 4 * 4]), t - (stride // 2) * (1 - call % 2)))
        else:
            ends.append((t + stride, t) if call == 1 else (t, t - stride))
    points = [point(values[t] if t >= 0 else final) for pair in ends for t in pair]
    grid = _grid(range(2 * len(told)), [*points, (1.0, 0.0)], 0)
    builder = TableBuilder(ring=3, keep=["x", "sum"] if starts else ["x"])
    base, total = builder.kept("x"), builder.kept("sum") if starts else x

    for call, t in enumerate(told):

        def move(sample: Linear, mixed: Linear, at: int = 2 * call) -> Linear:
            if s.config.prediction_type == "v_prediction":
                alpha, sigma = grid.point(at)
                mixed = alpha * mixed + sigma * sample
            return transfer(grid, at, at + 1, sample, mixed)

        m = model_output
        if call < starts:
            stage = call % 4
            if stage == 0:
                builder.row(t, next=move(x, m), push=m, keep={"x": x, "sum": m / 6})
            elif stage < 3:
                builder.row(t, next=move(base, m), keep={"sum": total + m / 3})
            else:
                builder.row(t, next=move(base, total + m / 6))
        elif call == 1:
            builder.row(t, next=move(base, (m + builder.last(1)) / 2))
        else:
            past = [builder.last(k) for k in range(1, builder.pushed + 1)]
            keep = {"x": x} if call == 0 else {}
            builder.row(t, next=move(x, adams([m, *past])), push=m, keep=keep)
    return _program(builder.build(), ring=3)


def ipndm(s: Any, begin: int, options: Options) -> Program:
    points = list(zip(host(s.alphas), host(s.betas), strict=True))
    grid = _grid(host(s.timesteps), points, begin)
    table = schedule.ipndm(grid, prediction="v_prediction")
    if points[begin][0] == 0:
        # From pure noise the library takes the clean sample for 0, whatever the model says.
        first = table.coefficients[0]
        first[Layout.NEXT : Layout.NEXT + table.layout.sources] = 0.0
        first[Layout.NEXT] = points[begin + 1][1]
    return _program(table, ring=3)


def deis(s: Any, begin: int, options: Options) -> Program:
    order = min(s.config.solver_order, 3)
    table = schedule.deis(
        preserving(s, begin, by_sample=True),
        prediction=_prediction(s),
        clip=_unclipped(s),
        order=order,
        lower_order_final=s.config.lower_order_final,
    )
    return _program(table, ring=order - 1)


def dpm_multistep(s: Any, begin: int, options: Options) -> Program:
    return _multistep(s, schedule.dpm_solver, preserving(s, begin), _prediction(s))


def edm_dpm(s: Any, begin: int, options: Options) -> Program:
    return _multistep(s, schedule.edm_dpm, _edm(s, begin), _edm_prediction(s))


def _multistep(s: Any, solver: Callable[..., SamplerTable], grid: Grid, prediction: str) -> Program:
    order = min(s.config.solver_order, 3)
    table = solver(
        grid,
        prediction=prediction,
        clip=_unclipped(s),
        order=order,
        algorithm=s.config.algorithm_type,
        solver_type=s.config.solver_type,
        lower_order_final=s.config.lower_order_final,
        euler_at_final=s.config.euler_at_final,
    )
    return _program(table, draws=s.config.algorithm_type.startswith("sde"), ring=order - 1)


def dpm_singlestep(s: Any, begin: int, options: Options) -> Program:
    order = s.config.solver_order
    table = schedule.dpm_solver_singlestep(
        preserving(s, begin),
        prediction=_prediction(s),
        clip=_unclipped(s),
        order=order,
        algorithm=s.config.algorithm_type,
        solver_type=s.config.solver_type,
        lower_order_final=s.config.lower_order_final,
    )
    return _program(table, draws=s.config.algorithm_type.startswith("sde"), ring=order - 1)


def edm_euler(s: Any, begin: int, options: Options) -> Program:
    """options: those of the churn, and whether the prediction itself is given."""
    *churn, given = options
    prediction = "sample" if given else _edm_prediction(s)
    table = schedule.edm_euler(_edm(s, 0), prediction=prediction, **_churn(tuple(churn)))
    return Program(table, _churned(host(s.sigmas), tuple(churn)))


def _edm(s: Any, begin: int) -> Grid:
    sigma_data, sigmas = s.config.sigma_data, host(s.sigmas)
    return _grid(
        host(s.timesteps),
        [(1.0, sigma) for sigma in sigmas],
        begin,
        points_of=Points(sigma_data),
        scales=[1 / math.hypot(sigma_data, sigma) for sigma in sigmas],
        sigma_data=sigma_data,
    )


def _edm_prediction(s: Any) -> str:
    return "edm" if s.config.prediction_type == "epsilon" else "edm_v"


def unipc(s: Any, begin: int, options: Options) -> Program:
    table = schedule.unipc(
        preserving(s, begin),
        prediction=_prediction(s),
        clip=_unclipped(s) if s.predict_x0 else None,
        order=s.config.solver_order,
        predictor=not s.solver_p,
        variant=s.config.solver_type,
        predict_x0=s.predict_x0,
        without_corrector=s.disable_corrector,
        lower_order_final=s.config.lower_order_final,
    )
    return _program(table, ring=s.config.solver_order)


def sa_solver(s: Any, begin: int, options: Options) -> Program:
    predictor, corrector = s.config.predictor_order, s.config.corrector_order
    table = schedule.sa_solver(
        preserving(s, begin),
        prediction=_prediction(s),
        clip=_unclipped(s),
        predictor_order=predictor,
        corrector_order=corrector,
        tau=lambda t: float(s.tau_func(t)),
        predict_x0=s.predict_x0,
        lower_order_final=s.config.lower_order_final,
    )
    return _program(table, draws=True, ring=max(predictor, corrector, 2) - 1)


def lcm(s: Any, begin: int, options: Options) -> Program:
    visited = [int(t) for t in host(s.timesteps)]
    clip = _clip(s)

    def make(grid: Grid) -> SamplerTable:
        t = grid.timestep(0)
        c_skip, c_out = s.get_scalings_for_boundary_condition_discrete(t)
        steps = Steps(grid, _prediction(s), clip, keep=[] if clip is None else ["consistent"])
        alpha, sigma = (1.0, 0.0) if t == visited[-1] else grid.point(1)
        clean = grid.denoised(0, steps.prediction)
        if clip is None:
            steps.step(0, alpha * denoised + sigma * noise, clean=c_out * clean + c_skip * x)
        else:
            value = c_out * denoised + c_skip * x
            steps.step(0, alpha * value + sigma * noise, keep={"consistent": value})
        return steps.table()

    return _consistency(s, visited, s.final_alpha_cumprod, clip, make)


def tcd(s: Any, begin: int, options: Options) -> Program:
    """options: eta."""
    (eta,) = options
    values, visited = host(s.alphas_cumprod), [int(t) for t in host(s.timesteps)]
    following = dict(itertools.pairwise(visited))

    def make(grid: Grid) -> SamplerTable:
        t = int(grid.timestep(0))
        steps = Steps(grid, _prediction(s))
        between = values[math.floor((1 - eta) * following.get(t, 0))]
        alpha, sigma = point(between)
        value = alpha * grid.denoised(0, steps.prediction) + sigma * steps.noise(0)
        after = denoised
        if eta > 0 and t in following:
            ratio = values[following[t]] / between
            after = math.sqrt(ratio) * denoised + math.sqrt(max(1 - ratio, 0.0)) * noise
        steps.step(0, after, clean=value)
        return steps.table()

    return _consistency(s, visited, s.alphas_cumprod[0], None, make, draws=eta > 0)


def _consistency(
    s: Any,
    visited: Sequence[int],
    final: Tensor,
    clip: Clip,
    make: Callable[[Grid], SamplerTable],
    draws: bool = True,
) -> Program:
    table, refused = _apart(s, visited, [*visited[1:], -1], final, clip, make)
    last = len(visited) - 1
    return Program(
        table,
        tuple(draws and i < last for i in range(len(visited))),
        output=0 if table.slots else None,
        final=True,
        refused=refused,
    )


def flow_euler(s: Any, begin: int, options: Options) -> Program:
    stochastic = s.config.stochastic_sampling
    grid = _flow(host(s.timesteps), host(s.sigmas), 0)
    return _program(schedule.flow_euler(grid, stochastic=stochastic), draws=stochastic)


def flow_heun(s: Any, begin: int, options: Options) -> Program:
    """options: those of the churn."""
    grid = _flow(*_paired(s, begin))
    churn, low, high, factor = options
    if churn <= 0:
        return _program(schedule.flow_heun(grid))
    # The library draws for both calls of a step, but what it adds for the second one cancels.
    most = min(churn / (len(s.sigmas) - 1), math.sqrt(2) - 1)
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


def noising(points: Sequence[tuple[float, float]]) -> Tensor:
    """A table of :func:`mmfast.add_noise`, of alpha and sigma alone."""
    rows = torch.zeros(len(points), 5, dtype=torch.float64)
    rows[:, [ALPHA, SIGMA]] = torch.tensor(points, dtype=torch.float64).view(-1, 2)
    rows[:, WEIGHT] = 1.0
    return rows
