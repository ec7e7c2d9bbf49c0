"""Noise levels, times and predictions of a diffusion or flow model, of one description."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmfast
from mmfast.checks import check_choice, check_floating
from mmfast.models.variational_bound import bound_rows
from mmfast.ops.add_noise import SIGMA, TARGETS
from mmfast.schedule import FlowSchedule, NoiseSchedule
from mmfast.schedule.betas import BETAS
from mmfast.schedule.weights import NAMED, logit_normal_quantile

TIMES = ("uniform", "logit_normal")
# Random numbers of the times are others than those of the noise, whose offset is the step.
_TIMES_STREAM = 1 << 62


class Noised(NamedTuple):
    """A batch to train on.

    Attributes:
        noisy: ``(B, ...)``, what the model gets.
        timesteps: ``(B,)``, likewise: int64, or float32 for flows.
        target: ``(B, ...)``, what it is to predict.
        weight: ``(B,)``, float32, of the loss.
        rows: ``(B,)``, int64: of the schedule's table, from 0 to T - 1.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor
    rows: Tensor


@dataclasses.dataclass(frozen=True)
class Noising:
    """How data is noised, at what times, and what is predicted: the part of
    :class:`mmfast.models.Diffusion` without a model, and its arguments."""

    schedule: str = "linear"
    prediction: str | None = None
    num_steps: int = 1000
    times: str = "uniform"
    times_mean: float = 0.0
    times_std: float = 1.0
    shift: float = 1.0
    weighting: str | None = None
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_snr: bool = False
    data_mean: float | Sequence[float] = 0.0
    data_std: float | Sequence[float] = 1.0
    levels: NoiseSchedule | FlowSchedule = dataclasses.field(init=False, repr=False, compare=False)
    _tables: dict[tuple[str, torch.device], Tensor] = dataclasses.field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        flow = self.schedule == "flow"
        check_choice("schedule", self.schedule, ("flow", *BETAS))
        check_choice("times", self.times, TIMES)
        if self.prediction is None:
            object.__setattr__(self, "prediction", "flow_prediction" if flow else "epsilon")
        assert self.prediction is not None
        check_choice("prediction", self.prediction, TARGETS)
        if self.weighting is not None:
            check_choice("weighting", self.weighting, tuple(NAMED))
        if self.times_std <= 0:
            raise ValueError(f"times_std must be above 0, got {self.times_std}")
        if not flow and self.shift != 1:
            raise ValueError(f"shift is of flows, not of schedule {self.schedule!r}")
        if flow and self.zero_snr:
            raise ValueError("zero_snr is of discrete schedules: flows end without signal anyway")
        if self.prediction == "epsilon" and (flow or self.zero_snr):
            raise ValueError(
                "prediction 'epsilon' says nothing of the sample where no signal is left: use "
                "v_prediction, flow_prediction or sample with this schedule"
            )
        for name in ("data_mean", "data_std"):
            given = getattr(self, name)
            if not isinstance(given, int | float):
                object.__setattr__(self, name, tuple(float(value) for value in given))
        if min(_numbers(self.data_std)) <= 0:
            raise ValueError(f"data_std must be above 0, got {self.data_std}")
        levels = (
            FlowSchedule(self.num_steps, self.shift)
            if flow
            else NoiseSchedule.from_betas(
                self.schedule,
                self.num_steps,
                start=self.beta_start,
                end=self.beta_end,
                zero_snr=self.zero_snr,
            )
        )
        object.__setattr__(self, "levels", levels)
        table = levels.noising_table(self.prediction, self.weighting)
        cpu = torch.device("cpu")
        self._tables["noising", cpu] = table
        # The timesteps that the model is told, of a table's rows: those of the sampling grids.
        self._tables["times", cpu] = (
            (table[:, SIGMA] * self.num_steps).float() if flow else torch.arange(self.num_steps)
        )
        self._tables["mean", cpu] = torch.tensor(_numbers(self.data_mean))
        self._tables["std", cpu] = torch.tensor(_numbers(self.data_std))
        if isinstance(levels, NoiseSchedule):
            self._tables["ratio", cpu] = levels.ratio

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, as JSON knows them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def draw(
        self,
        batch: int,
        *,
        seed: int | Tensor,
        offset: int | Tensor = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Rows of the schedule to train at, int64, ``(B,)``: see :meth:`noised` for seed, offset.

        Args:
            batch: B.
            device: of the result; that of a tensor among seed and offset, else the CPU.
        """
        level = uniform((batch,), seed, offset + _TIMES_STREAM, device)
        if self.times == "logit_normal":
            level = logit_normal_quantile(level, self.times_mean, self.times_std)
        return (level * self.num_steps).long().clamp(max=self.num_steps - 1)

    def noised(
        self,
        x0: Tensor,
        *,
        seed: int | Tensor | None = None,
        offset: int | Tensor = 0,
        rows: Tensor | None = None,
    ) -> Noised:
        """Draw times and noise for a batch, which is normalised already.

        Args:
            x0: ``(B, ...)``, floating.
            seed: of times and noise, an int or an int64 tensor on x0's device, ``()`` or ``(B,)``;
                with one for each sample a sample's do not depend on the rest of the batch. Drawn
                from torch's generator if not given.
            offset: likewise: the step of the training. Steps have independent noise.
            rows: ``(B,)``, int64, from 0 to T - 1: instead of drawn times.

        Raises:
            TypeError, ValueError: as of :func:`mmfast.add_noise`.
        """
        check_floating("x0", x0)
        if seed is None:
            seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), device=x0.device)
        if rows is None:
            rows = self.draw(x0.shape[0], seed=seed, offset=offset, device=x0.device)
        table = self.on(x0.device, "noising")
        added = mmfast.add_noise(x0, rows, table, seed=seed, offset=offset)
        assert added.target is not None
        times = self.on(x0.device, "times")[rows]
        return Noised(added.noisy, times, added.target, added.weight, rows)

    def prediction_of(self, denoised: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """What a model predicts that takes the clean sample for ``denoised``.

        Args:
            denoised: the clean sample, ``(B, ...)``.
            x: the noisy one, likewise.
            timesteps: that a model is told, ``(B,)``, whole or not, above 0 for flows.
        """
        last = self.num_steps - 1
        if isinstance(self.levels, FlowSchedule):
            sigma = timesteps.double() / self.num_steps
            alpha = 1 - sigma
        else:
            # As NoiseSchedule.at has it.
            ratio = self.on(x.device, "ratio")
            low = timesteps.double().clamp(0, last).floor()
            part = timesteps.double() - low
            row = low.long()
            between = torch.lerp(ratio[row], ratio[(row + 1).clamp(max=last)], part)
            found = torch.where(part == 0, ratio[row], between)
            alpha, sigma = (1 + found**2).rsqrt(), (1 + found**-2).rsqrt()
        lead = (-1, *[1] * (x.dim() - 1))
        alpha, sigma = alpha.float().view(lead), sigma.float().view(lead)
        denoised = denoised.float()
        noise = (x.float() - alpha * denoised) / sigma
        if self.prediction == "epsilon":
            made = noise
        elif self.prediction == "sample":
            made = denoised
        elif self.prediction == "v_prediction":
            made = alpha * noise - sigma * denoised
        else:
            made = noise - denoised
        return made.to(x.dtype)

    def normalized(self, x: Tensor) -> Tensor:
        """The data ``(B, C, ...)`` with the mean 0 and the deviation 1, if ``data_mean`` and
        ``data_std`` are its own."""
        if not self._scaled:
            return x
        mean, std = self._scale(x)
        return (x - mean) / std

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`normalized`."""
        if not self._scaled:
            return x
        mean, std = self._scale(x)
        return x * std + mean

    @property
    def _scaled(self) -> bool:
        return self.data_mean != 0 or self.data_std != 1

    def _scale(self, x: Tensor) -> list[Tensor]:
        shape = (-1, *[1] * (x.dim() - 2))
        return [self.on(x.device, name).to(x.dtype).view(shape) for name in ("mean", "std")]

    def check_learned_variances(self) -> NoiseSchedule:
        """The discrete schedule, for models that learn variances.

        Raises:
            ValueError: it is a flow's.
        """
        if not isinstance(self.levels, NoiseSchedule):
            raise ValueError("learned variances (learn_sigma) need a discrete schedule, not 'flow'")
        return self.levels

    def on(self, device: torch.device, name: str) -> Tensor:
        """A table on ``device``; that of the bound is made when it is first asked for."""
        if (name, device) not in self._tables:
            cpu = torch.device("cpu")
            if (name, cpu) not in self._tables:
                levels = self.check_learned_variances()
                assert self.prediction is not None
                self._tables[name, cpu] = bound_rows(levels, self.prediction)
            self._tables[name, device] = self._tables[name, cpu].to(device)
        return self._tables[name, device]


def uniform(
    shape: Sequence[int],
    seed: int | Tensor,
    offset: int | Tensor,
    device: torch.device | str | None,
) -> Tensor:
    """Numbers from 0 to 1, float32; arguments as of :func:`mmfast.randn`."""
    return torch.special.ndtr(mmfast.randn(shape, seed=seed, offset=offset, device=device))


def _numbers(value: float | Sequence[float]) -> list[float]:
    return [value] if isinstance(value, int | float) else list(value)
