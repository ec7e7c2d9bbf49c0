"""DDPM and DDIM."""

from __future__ import annotations

from typing import Any

from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from torch import Tensor

from mmfast.integrations.diffusers.families import Cumulative, Generator, Output, check_set
from mmfast.integrations.diffusers.state import Index, State
from mmfast.integrations.diffusers.tables import timesteps
from mmfast.integrations.diffusers.tables.program import Options


class Uncounted(Cumulative):
    """Those that know the step by its timestep alone."""

    _remembers = False

    def _index(self, timestep: Any, state: State) -> Index:
        return self._locate(timestep, state)

    def _advance(self, index: Index) -> None:
        pass


class DDPM(Uncounted):
    _program = staticmethod(timesteps.ddpm)
    _outputs = (scheduling_ddpm.DDPMSchedulerOutput, 2)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        variance, kind = None, self.variance_type  # type: ignore[attr-defined]
        if kind in ("learned", "learned_range"):
            channels = sample.shape[1]
            if model_output.shape[1] != 2 * channels:
                raise ValueError(
                    f"variance_type {kind!r} needs {2 * channels} channels of the model's output, "
                    f"got {model_output.shape[1]}"
                )
            model_output, variance = model_output.split(channels, 1)
            if kind == "learned":  # the variance itself; the table expects its logarithm
                variance = variance.log()
        return self._run(
            model_output, timestep, sample, return_dict, (), generator, variance=variance
        )


class DDIM(Uncounted):
    _program = staticmethod(timesteps.ddim)
    _outputs = (scheduling_ddim.DDIMSchedulerOutput, 2)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        check_set(self)
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError(
                "Cannot pass both generator and variance_noise. Please make sure that either "
                "`generator` or `variance_noise` stays `None`."
            )
        options: Options = (eta, use_clipped_model_output)
        index = self._locate(timestep)
        if type(index) is int and index < 0:  # a timestep of its own, not of the schedule
            options, index = (*options, int(timestep)), 0
        return self._run(
            model_output,
            timestep,
            sample,
            return_dict,
            options,
            generator,
            variance_noise,
            index=index,
        )

    def _missing(self, timestep: float) -> int:
        return -1
