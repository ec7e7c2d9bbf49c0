"""LCM and TCD: samplers of consistency models."""

from __future__ import annotations

from diffusers.schedulers import scheduling_lcm, scheduling_tcd
from torch import Tensor

from mmfast.integrations.diffusers.families import (
    Cumulative,
    Generated,
    Generator,
    NoiseOfBoth,
    Output,
    SetFirst,
)
from mmfast.integrations.diffusers.tables import timesteps


class LCM(NoiseOfBoth, SetFirst, Cumulative, Generated):
    _program = staticmethod(timesteps.lcm)
    _outputs = (scheduling_lcm.LCMSchedulerOutput, 2)
    _remembers = False


class TCD(NoiseOfBoth, SetFirst, Cumulative):
    _program = staticmethod(timesteps.tcd)
    _outputs = (scheduling_tcd.TCDSchedulerOutput, 2)
    _remembers = False

    def _thresholded(self) -> bool:
        return False  # it does not look at that option

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        if not 0 <= eta <= 1:
            raise AssertionError("gamma must be less than or equal to 1.0")
        return self._run(model_output, timestep, sample, return_dict, (eta,), generator)
