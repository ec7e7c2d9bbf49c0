"""Schedulers in sigma, after k-diffusion: Euler, Heun, KDPM2, ancestral forms, and LMS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffusers.schedulers import (
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete,
    scheduling_lms_discrete,
)
from torch import Tensor

from mmfast.integrations.diffusers.families import (
    Churned,
    Generated,
    Output,
    Plain,
)
from mmfast.integrations.diffusers.history import History
from mmfast.integrations.diffusers.state import State
from mmfast.integrations.diffusers.tabled import Tabled
from mmfast.integrations.diffusers.tables import sigmas
from mmfast.integrations.diffusers.tables.program import Options, prediction_of
from mmfast.integrations.diffusers.two_calls import Call, Trapezoidal, TwoCalls
from mmfast.schedule.predictions import denoised_from


class Euler(Churned):
    _program = staticmethod(sigmas.euler)
    _outputs = (scheduling_euler_discrete.EulerDiscreteSchedulerOutput, 2)
    _remembers = False
    _of_output = _wide = _scaled = True
    _whole = False


class EulerAncestral(Generated):
    _program = staticmethod(sigmas.euler_ancestral)
    _outputs = (scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput, 2)
    _remembers = False
    _of_output = _wide = _scaled = True
    _whole = False


class Heun(Trapezoidal, Plain):
    _program = staticmethod(sigmas.heun)
    _outputs = (scheduling_heun_discrete.HeunDiscreteSchedulerOutput, 2)
    _scaled = True

    def _slope(self, call: Call) -> Tensor:
        sigma = call.sigmas[int(call.at)]
        scale = 1 / math.hypot(1.0, sigma)  # of what the model gets
        a, b = denoised_from(prediction_of(self), scale, scale * sigma)
        clean = a * scale * call.sample + b * call.model_output
        if self.config.clip_sample:
            most = self.config.clip_sample_range
            clean = clean.clamp(-most, most)
        return (call.sample - clean) / sigma


class KDPM2(TwoCalls, Plain):
    _program = staticmethod(sigmas.kdpm2)
    _levels = ("sigmas", "sigmas_interpol")
    _outputs = (scheduling_k_dpm_2_discrete.KDPM2DiscreteSchedulerOutput, 2)
    _scaled = True

    def _scales(self) -> list[float]:
        return _interpolated(self, 0)


class KDPM2Ancestral(TwoCalls, Generated):
    _program = staticmethod(sigmas.kdpm2_ancestral)
    _levels = ("sigmas", "sigmas_interpol", "sigmas_down", "sigmas_up")
    _outputs = (scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteSchedulerOutput, 2)
    _scaled = True

    sigmas: Tensor
    sigmas_interpol: Tensor

    @property
    def dt(self) -> Tensor:
        """Of the last step's first call: the library's second one leaves it as it is."""
        index = self._step_index
        if not index:
            raise AttributeError("dt")
        first = (index - 1) // 2 * 2
        return self.sigmas_interpol[first] - self.sigmas[first]

    def _scales(self) -> list[float]:
        return _interpolated(self, 1)


class LMS(Tabled):
    _program = staticmethod(sigmas.lms)
    _outputs = (scheduling_lms_discrete.LMSDiscreteSchedulerOutput, 2)
    _scaled = True

    derivatives = History("derivatives")

    def _recalled(self) -> tuple[int, Sequence[Tensor | None]]:
        values = vars(self)["derivatives"]
        return len(values), values

    def _cleared(self) -> None:
        vars(self)["derivatives"] = []

    def _handed(self, made: int, pushed: list[Tensor], kept: list[Tensor]) -> None:
        vars(self)["derivatives"] = pushed

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        return self._run(model_output, timestep, sample, return_dict, self._options(order))

    def _options(self, order: int) -> Options:
        state: State | None = vars(self).get("_tabled")
        if state is not None and state.runs() and state.options[0] == order:
            return state.options
        if not isinstance(order, int):
            raise TypeError(f"order must be an int, got {order!r}")
        # The library forgets one value a step at most: a lower order keeps those of a higher one.
        return order, max(order, len(self.derivatives))


def _interpolated(scheduler: Any, back: int) -> list[float]:
    _, sigmas, between, *_ = scheduler._state().key
    used = [between[i - back] if i % 2 else sigma for i, sigma in enumerate(sigmas)]
    return [(s * s + 1) ** -0.5 for s in used]
