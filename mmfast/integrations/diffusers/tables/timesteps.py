"""Schedulers of alphas_cumprod: DDPM, DDIM, LCM, TCD, PNDM and IPNDM."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast import schedule
from mmfast.integrations.diffusers.tables.program import (
    Options,
    Points,
    Program,
    clip_of,
    grid_of,
    host,
    point,
    prediction_of,
    program_of,
)
from mmfast.schedule import Grid, SamplerTable
from mmfast.schedule.layout import Layout, slots_of
from mmfast.schedule.samplers.ddpm import VARIANCES
from mmfast.schedule.samplers.multistep import adams, transfer
from mmfast.schedule.samplers.steps import Clip, Steps
from mmfast.schedule.table import Linear, TableBuilder, denoised, model_output, noise, x


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


_LEAST_ALPHA = 1e-12


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
    unseen = prediction_of(s) == "epsilon" and clip not in (None, math.inf)
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


def ddpm(s: Any, begin: int, options: Options) -> Program:
    visited = [int(t) for t in host(s.timesteps)]
    clip = clip_of(s)
    # The library takes what it does not know for this one.
    variance = s.variance_type if s.variance_type in VARIANCES else "fixed_small"

    def make(grid: Grid) -> SamplerTable:
        return schedule.ddpm(
            grid, prediction=prediction_of(s), clip=clip, variance=variance, noise_at_end=True
        )

    table, refused = _apart(s, visited, [*visited[1:], -1], torch.ones(()), clip, make)
    return Program(table, tuple(t > 0 for t in visited), refused=refused)


def ddim(s: Any, begin: int, options: Options) -> Program:
    """options: eta, use_clipped_model_output, and the timesteps if not the scheduler's."""
    eta, clip_noise, *given = options
    stride = s.config.num_train_timesteps // s.num_inference_steps
    visited = given or [int(t) for t in host(s.timesteps)]
    clip = clip_of(s)

    def make(grid: Grid) -> SamplerTable:
        return schedule.ddim(
            grid, prediction=prediction_of(s), clip=clip, clip_noise=clip_noise, eta=eta
        )

    # Each step goes to the timestep a stride below its own, which need not be the next one.
    ends = [t - stride for t in visited]
    table, refused = _apart(s, visited, ends, s.final_alpha_cumprod, clip, make)
    return program_of(table, draws=eta > 0, refused=refused)


def lcm(s: Any, begin: int, options: Options) -> Program:
    visited = [int(t) for t in host(s.timesteps)]
    clip = clip_of(s)

    def make(grid: Grid) -> SamplerTable:
        t = grid.timestep(0)
        c_skip, c_out = s.get_scalings_for_boundary_condition_discrete(t)
        steps = Steps(grid, prediction_of(s), clip, keep=[] if clip is None else ["consistent"])
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
        steps = Steps(grid, prediction_of(s))
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
    grid = grid_of(range(2 * len(told)), [*points, (1.0, 0.0)], 0)
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
    return program_of(builder.build(), ring=3)


def ipndm(s: Any, begin: int, options: Options) -> Program:
    points = list(zip(host(s.alphas), host(s.betas), strict=True))
    grid = grid_of(host(s.timesteps), points, begin)
    table = schedule.ipndm(grid, prediction="v_prediction")
    if points[begin][0] == 0:
        # From pure noise the library takes the clean sample for 0, whatever the model says.
        first = table.coefficients[0]
        first[Layout.NEXT : Layout.NEXT + table.layout.sources] = 0.0
        first[Layout.NEXT] = points[begin + 1][1]
    return program_of(table, ring=3)
