"""Schedulers of EDM's preconditioning."""

from __future__ import annotations

import math

from diffusers.schedulers import scheduling_edm_euler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from mmfast.integrations.diffusers.families import (
    Generated,
    Generator,
    NoiseOfBoth,
    Output,
    Outputs,
    SetFirst,
)
from mmfast.integrations.diffusers.history import History
from mmfast.integrations.diffusers.tabled import Tabled
from mmfast.integrations.diffusers.tables import edm


class _Preconditioned(Tabled):
    """The model's input is scaled by the variance of the data too."""

    _scaled = True

    def _scales(self) -> list[float]:
        return [1 / math.hypot(s, self.config.sigma_data) for s in self._state().key[1]]


class EDMEuler(_Preconditioned):
    _program = staticmethod(edm.edm_euler)
    _outputs = (scheduling_edm_euler.EDMEulerSchedulerOutput, 2)
    _remembers = False
    _of_output = _wide = True
    _whole = False

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
        pred_original_sample: Tensor | None = None,
    ) -> Output:
        """As the library's, by a table."""
        given = pred_original_sample is not None
        options = (s_churn, s_tmin, s_tmax, s_noise, given)
        output = model_output if pred_original_sample is None else pred_original_sample
        return self._run(output, timestep, sample, return_dict, options, generator)


class EDMDPM(NoiseOfBoth, Outputs, _Preconditioned, SetFirst, Generated):
    _program = staticmethod(edm.edm_dpm)
    _outputs = (SchedulerOutput, 1)
    _missing_is_last = True

    model_outputs = History("model_outputs", "solver_order")
