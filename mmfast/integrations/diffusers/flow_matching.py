"""Schedulers of flow matching."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.schedulers import (
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
)
from torch import Tensor

from mmfast.integrations.diffusers.families import (
    Churned,
    Generator,
    Output,
    Stretched,
)
from mmfast.integrations.diffusers.tabled import Tabled
from mmfast.integrations.diffusers.tables import sigmas
from mmfast.integrations.diffusers.tables.sigmas import churn_of
from mmfast.integrations.diffusers.two_calls import Call, Trapezoidal


class _Flow(Tabled):
    """Straight lines from the sample to noise."""

    _of_output = True
    _whole = False

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        return [(1 - sigma, sigma) for sigma in self._state().key[1]]


class FlowEuler(_Flow, Stretched):
    _program = staticmethod(sigmas.flow_euler)
    _outputs = (scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput, 1)
    _remembers = False

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table. It does not look at the options of a churn either.

        Steps of tokens at timesteps of their own, which are no rows of a table, are the library's.
        """
        if per_token_timesteps is not None:
            return super().step(  # type: ignore[misc]
                model_output,
                timestep,
                sample,
                generator=generator,
                per_token_timesteps=per_token_timesteps,
                return_dict=return_dict,
            )
        return self._run(model_output, timestep, sample, return_dict, (), generator)

    def _noise(self, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        return self._draw(sample, self._single, generator)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """As the library's: samples with the noise of their timesteps (B,)."""
        if noise is None:
            raise ValueError("noise must be given")
        return self._noised(sample, noise, timestep)


class FlowHeun(Trapezoidal, _Flow, Churned):
    _program = staticmethod(sigmas.flow_heun)
    _outputs = (scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteSchedulerOutput, 1)

    def _left(self, name: str, call: Call) -> Any:
        if name == "sample" and _raised(call) > 1:  # with the noise of the churn
            return call.out.to(self._single) - self._length(call) * self._slope(call)
        left = super()._left(name, call)
        return left.to(self._single) if name == "sample" else left

    def _slope(self, call: Call) -> Tensor:
        return call.model_output.to(self._single) / _raised(call)

    def _length(self, call: Call) -> float:
        index = int(call.at)
        return call.sigmas[index + 1] - call.sigmas[index] * _raised(call)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """As the library's: the sample with the noise of the step's timestep."""
        index = self._index(timestep, self._state())
        begin, self._begin_index = self._begin_index, index
        try:
            return self._noised(sample, noise, timestep)
        finally:
            self._begin_index = begin


def _raised(call: Call) -> float:
    """By what the churn of a call has multiplied its sigma."""
    churn, low, high, _ = call.options
    if churn > 0 and low <= call.sigmas[int(call.at)] <= high:
        return 1 + churn_of(churn, len(call.sigmas) - 1)
    return 1.0
