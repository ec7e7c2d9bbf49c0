"""What the tables of all schedulers share: programs, grids of their own points, and options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmfast.schedule import Grid, SamplerTable
from mmfast.schedule.samplers.steps import Clip

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
        factors: by what each row multiplies the sample that it starts from, for the slot after the
            ring; 0 where it keeps none. Empty for those without such a slot.
        noises: by what the noise, in the same slot. Empty where there is none.
    """

    table: SamplerTable
    draws: tuple[bool, ...]
    ring: int = 0
    output: int | None = None
    final: bool = False
    refused: Mapping[int, str] = field(default_factory=dict)
    threshold: tuple[float, float] | None = None
    factors: tuple[float, ...] = ()
    noises: tuple[float, ...] = ()


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


def point(alpha_cumprod: float) -> tuple[float, float]:
    """alpha and sigma; NaN where betas above 1 leave none."""
    if not 0 <= alpha_cumprod <= 1:
        return math.nan, math.nan
    return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)


def host(values: Tensor) -> list[float]:
    """Numbers of a tensor. They are read back: not for use within a step."""
    return values.detach().double().cpu().tolist()


def grid_of(
    timesteps: Sequence[float],
    points: Sequence[tuple[float, float]],
    begin: int,
    *,
    points_of: Points | None = None,
    scales: Sequence[float] | None = None,
    sigma_data: float | None = None,
    kind: type[Grid] = Grid,
    **more: Any,
) -> Grid:
    if begin >= len(timesteps):
        raise IndexError(
            f"the schedule has {len(timesteps)} steps, got a begin at {begin}: call set_timesteps"
        )
    alpha, sigma = torch.tensor(points, dtype=torch.float64).unbind(1)
    grid = kind(
        torch.tensor(timesteps, dtype=torch.float64),
        alpha,
        sigma,
        torch.ones_like(alpha) if scales is None else torch.tensor(scales, dtype=torch.float64),
        Points() if points_of is None else points_of,
        sigma_data=sigma_data,
        **more,
    )
    return grid.skip(begin) if begin else grid


def prediction_of(s: Any) -> str:
    name = s.config.prediction_type
    return "sample" if name == "original_sample" else name


def clip_of(s: Any) -> Clip:
    if getattr(s.config, "thresholding", False):
        return math.inf
    return s.config.clip_sample_range if s.config.clip_sample else None


def unclipped(s: Any) -> Clip:
    return math.inf if s.config.thresholding else None


def program_of(table: SamplerTable, draws: bool = False, **more: Any) -> Program:
    return Program(table, (draws,) * len(table), **more)
