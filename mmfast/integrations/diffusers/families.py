"""What several schedulers of diffusers have alike, and differ in from the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.integrations.diffusers.handover import filled
from mmfast.integrations.diffusers.history import Count
from mmfast.integrations.diffusers.state import Index
from mmfast.integrations.diffusers.tabled import Tabled
from mmfast.integrations.diffusers.tables.program import host, point

Output = Any
Generator = Any


def check_set(scheduler: Any) -> None:
    """Refuse a scheduler whose timesteps have not been set."""
    if scheduler.num_inference_steps is None:
        raise ValueError(
            "Number of inference steps is 'None', you need to run 'set_timesteps' after creating "
            "the scheduler"
        )


class CumulativeNoise(Tabled):
    """Those whose noise for training is that of alphas_cumprod, by whole timesteps."""

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        return [point(value) for value in host(self.alphas_cumprod)]  # type: ignore[attr-defined]

    def _noisy_index(self, timesteps: Tensor, device: torch.device) -> Index:
        if timesteps.is_floating_point():
            raise TypeError(f"timesteps must be integers, got {timesteps.dtype}")
        return timesteps.to(device, torch.int64)


class Cumulative(CumulativeNoise):
    """Those whose steps are made of alphas_cumprod too."""

    _levels = ("alphas_cumprod",)


class NoiseOfBoth(Tabled):
    """Noise is drawn in the dtype of a prediction, made of the sample and the model's output."""

    def _noise(self, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        return self._draw(model_output, dtype, generator)


class Generated(Tabled):
    """Those that take a generator and nothing else."""

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        return self._run(model_output, timestep, sample, return_dict, (), generator)


class Plain(Tabled):
    """Those without any option of a step."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        return self._run(model_output, timestep, sample, return_dict)


class Churned(Tabled):
    """Those whose step may add noise first, a churn."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        options = (s_churn, s_tmin, s_tmax, s_noise)
        return self._run(model_output, timestep, sample, return_dict, options, generator)


class SetFirst(Tabled):
    """Those that want set_timesteps first."""

    def _check_first(self, timestep: Any) -> None:
        check_set(self)
        super()._check_first(timestep)


class Outputs(Tabled):
    """Those that remember what the model's last outputs were converted to."""

    lower_order_nums = Count()

    def _recalled(self) -> tuple[int, Sequence[Tensor | None]]:
        has = vars(self)
        return has["lower_order_nums"], has["model_outputs"]

    def _cleared(self) -> None:
        has = vars(self)
        has["lower_order_nums"] = 0
        has["model_outputs"] = filled([], len(has["model_outputs"]))

    def _handed(self, made: int, pushed: list[Tensor], kept: list[Tensor]) -> None:
        has = vars(self)
        has["lower_order_nums"] = min(made, self._highest())
        has["model_outputs"] = filled(pushed, len(has["model_outputs"]))


class Stretched(Tabled):
    """Those whose levels of a flow may end at ``shift_terminal``."""

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """As the library's; one step alone stays where it is, where that divides 0 by 0."""
        left = 1 - t
        if left[-1] == 0:
            return t
        return 1 - left * ((1 - self.config.shift_terminal) / left[-1])
