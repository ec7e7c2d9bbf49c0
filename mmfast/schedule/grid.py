"""The points a sampler visits: timesteps, and how much signal and noise there is at each."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mmfast.schedule.predictions import denoised_from, noise_from
from mmfast.schedule.table import Linear, denoised, model_output, x


class Schedule(Protocol):
    """What a grid needs to know of where it comes from, for points between its own."""

    def at(self, timestep: float) -> tuple[float, float]:
        """alpha and sigma at a timestep."""

    def timestep_of(self, ratio: float) -> float:
        """The timestep where sigma / alpha is ``ratio``."""

    def input_scale(self, ratio: float) -> float:
        """Of x / alpha, when the model gets it where sigma / alpha is ``ratio``."""


@dataclass(frozen=True)
class Grid:
    """S steps between S + 1 points; the sample at a point is alpha x0 + sigma n.

    Attributes:
        timesteps: (S,) float64: what the model is told. The last point is the result: it has none.
        alpha: (S + 1,) float64.
        sigma: (S + 1,) float64; the last is 0 or the least noise that there is.
        input_scale: (S + 1,) float64: the model gets the sample times this.
        schedule: where the points are from.
        sigma_data: of EDM's preconditioning.
        initial_scale: of the noise that sampling starts from.
        unit_start: whether x / alpha starts with the variance of noised data, not the noise's.
        skipped: steps that were left out at the start.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    input_scale: Tensor
    schedule: Schedule
    sigma_data: float | None = None
    initial_scale: float = 1.0
    unit_start: bool = False
    skipped: int = 0

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        for name in ("alpha", "sigma", "input_scale"):
            shape = tuple(getattr(self, name).shape)
            if shape != (steps + 1,):
                raise ValueError(
                    f"{name} must be ({steps + 1},) for {steps} timesteps, got {shape}"
                )

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def total_steps(self) -> int:
        """Number of steps with those left out."""
        return len(self) + self.skipped

    def point(self, i: int) -> tuple[float, float]:
        """alpha and sigma at point i."""
        return float(self.alpha[i]), float(self.sigma[i])

    def forward_variance(self, i: int) -> float:
        """Of the noise that the way back from point i + 1 to i adds."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.point(i), self.point(i + 1)
        return sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2

    def timestep(self, i: int) -> float:
        """What the model is told at point i."""
        return float(self.timesteps[i])

    def scale(self, i: int) -> float:
        """Of the model's input at point i; 1 at the last, where there is no call."""
        return float(self.input_scale[i]) if i < len(self) else 1.0

    def denoised(self, i: int, prediction: str) -> Linear:
        """The clean sample at point i, of the sample and the model's output."""
        alpha, sigma = self.point(i)
        scale = self.scale(i)
        a, b = denoised_from(prediction, alpha * scale, sigma * scale, self.sigma_data)
        return a * scale * x + b * model_output

    def noise(self, i: int, prediction: str, clip: object = None) -> Linear:
        """The noise at point i.

        Of the sample and the model's output; with ``clip``, of the sample and the clamped
        prediction.
        """
        alpha, sigma = self.point(i)
        if clip is not None:
            return (x - alpha * denoised) / sigma
        scale = self.scale(i)
        c, d = noise_from(prediction, alpha * scale, sigma * scale, self.sigma_data)
        return c * scale * x + d * model_output

    def variance_exploding(self) -> Grid:
        """The same points for x / alpha: alpha is 1, and the model's input is scaled instead.

        Raises:
            ValueError: alpha is 0 somewhere.
        """
        if not bool((self.alpha > 0).all()):
            raise ValueError(
                "this sampler divides by alpha, which is 0 at the start of this grid: use a "
                "schedule with a floor for alphas_cumprod, or flow_euler or flow_heun for flows"
            )
        ratio = self.sigma / self.alpha
        return replace(
            self,
            alpha=torch.ones_like(self.alpha),
            sigma=ratio,
            input_scale=self.input_scale * self.alpha,
            initial_scale=math.hypot(float(ratio[0]), float(self.unit_start)),
        )

    def refined(self, timesteps: Sequence[float], points: Sequence[tuple[float, float]]) -> Grid:
        """With one more point, its alpha and sigma, after each of the first ``len(points)``."""
        tail = len(points)

        def woven(values: Tensor, more: Sequence[float]) -> Tensor:
            between = torch.tensor(more, dtype=torch.float64)
            return torch.cat([torch.stack([values[:tail], between], 1).flatten(), values[tail:]])

        scales = [self.schedule.input_scale(sigma / alpha) / alpha for alpha, sigma in points]
        return replace(
            self,
            timesteps=woven(self.timesteps, timesteps),
            alpha=woven(self.alpha, [alpha for alpha, _ in points]),
            sigma=woven(self.sigma, [sigma for _, sigma in points]),
            input_scale=woven(self.input_scale, scales),
        )

    def skip(self, steps: int) -> Grid:
        """Without the first ``steps``, to start from an image.

        Raises:
            ValueError: not from 0 to S - 1.
        """
        if not 0 <= steps < len(self):
            raise ValueError(f"start must be from 0 to {len(self) - 1}, got {steps}")
        return replace(
            self,
            timesteps=self.timesteps[steps:],
            alpha=self.alpha[steps:],
            sigma=self.sigma[steps:],
            input_scale=self.input_scale[steps:],
            skipped=self.skipped + steps,
        )


def check_final(final: float, highest: float = sys.float_info.max) -> float:
    """The level of the result, if there is such a level, else ValueError."""
    if not 0 <= final <= highest:
        raise ValueError(f"final must be from 0 to {highest:.4g}, got {final}")
    return float(final)
