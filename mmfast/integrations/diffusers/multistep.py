"""Multistep and singlestep solvers: DEIS, DPM-Solver, UniPC and SA-Solver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from mmfast.integrations.diffusers.families import (
    CumulativeNoise,
    Generator,
    Output,
    Outputs,
    Plain,
    SetFirst,
    Stretched,
)
from mmfast.integrations.diffusers.handover import filled
from mmfast.integrations.diffusers.history import History, Kept, LastSample, Shown
from mmfast.integrations.diffusers.state import Index, Made, State
from mmfast.integrations.diffusers.tabled import Tabled
from mmfast.integrations.diffusers.tables import solvers
from mmfast.integrations.diffusers.tables.program import Program
from mmfast.ops.randn import randn


class Solver(SetFirst):
    """Multistep and singlestep solvers."""

    _missing_is_last = True
    _outputs = (SchedulerOutput, 1)

    model_outputs = History("model_outputs", "solver_order")

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        sigmas = self._state().key[1]
        if self.config.get("use_flow_sigmas", False):
            return [(1 - s, s) for s in sigmas]
        return [(1 / math.hypot(1.0, s), s / math.hypot(1.0, s)) for s in sigmas]

    def _predicted(self, model_output: Tensor) -> Tensor:
        """Without the variances that the model predicts too."""
        if self.config.prediction_type == "epsilon" and self.config.get("variance_type") in (
            "learned",
            "learned_range",
        ):
            return model_output[:, :3]
        return model_output


class DPM(Solver):
    """DPM-Solver's algorithms."""

    def _converted(self, sample: torch.dtype, model_output: torch.dtype) -> torch.dtype:
        """Of what the model's output is converted to."""
        config = self.config
        clean = config.algorithm_type.endswith("++")
        same = config.prediction_type == ("sample" if clean else "epsilon")
        if same and (clean or not config.thresholding):
            return model_output
        return torch.promote_types(sample, model_output)


class KeepsType(Tabled):
    """Samples stay in their dtype, whatever that of the model's output is."""

    def _result(self, sample: torch.dtype, model_output: torch.dtype) -> torch.dtype:
        return sample


class DEIS(Outputs, Solver, Plain):
    _program = staticmethod(solvers.deis)


class DPMMultistep(Outputs, DPM):
    _program = staticmethod(solvers.dpm_multistep)

    def _result(self, sample: torch.dtype, model_output: torch.dtype) -> torch.dtype:
        return self._converted(sample, model_output)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        if self.config.variance_type is not None:
            model_output = self._predicted(model_output)
        return self._run(model_output, timestep, sample, return_dict, (), generator, variance_noise)

    def _noise(self, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        return self._draw(model_output, self._single, generator)


class Predicting(Solver):
    """Those that take a generator, and leave out variances that the model predicts."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        if self.config.variance_type is not None:
            model_output = self._predicted(model_output)
        return self._run(model_output, timestep, sample, return_dict, (), generator)


class DPMSinglestep(DPM, Predicting):
    _program = staticmethod(solvers.dpm_singlestep)

    sample = Kept("sample")  # that the group of steps started from

    def _looked_at(self, state: State) -> list[int]:
        assert state.program is not None
        orders = self.order_list[state.next : state.next + 1]  # type: ignore[attr-defined]
        return [state.program.ring] if max(orders, default=1) > 1 else []

    def _kept(self, name: str) -> Tensor:
        state: State = vars(self)["_tabled"]
        assert state.program is not None
        return state.copied(state.program.ring)

    def _keep(self, name: str, value: Tensor) -> None:
        state: State = vars(self)["_tabled"]
        assert state.program is not None
        state.write(state.program.ring, value)

    def _noise(self, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        dtype = self._converted(sample.dtype, model_output.dtype)
        return self._draw(model_output, dtype, generator)

    def _recalled(self) -> tuple[int, Sequence[Tensor | None]]:
        values = [value for value in vars(self)["model_outputs"] if value is not None]
        return len(values), values

    def _recalled_kept(self, program: Program, row: int) -> list[Tensor | None]:
        return [vars(self)["sample"]]

    def _cleared(self) -> None:
        has = vars(self)
        has["model_outputs"] = [None] * self.config.solver_order
        has["sample"] = None

    def _handed(self, made: int, pushed: list[Tensor], kept: list[Tensor]) -> None:
        has = vars(self)
        has["model_outputs"] = filled(pushed, self.config.solver_order)
        (has["sample"],) = kept


class Corrected(Outputs):
    """Those that correct the last step, for which they keep what it started from."""

    _orders: ClassVar[dict[str, tuple[str, int]]]  # of the last step: of which option, and how many

    last_sample = LastSample()
    timestep_list = Shown("timestep_list")

    def _shown(self, name: str) -> Any:
        state = vars(self)["_tabled"]
        if name == "timestep_list":
            told = list(state.timesteps[state.begin : state.next])
            return filled(told, len(vars(self)["timestep_list"]))
        key, more = self._orders[name]
        return self._order_of_last(self.config[key], state.next - state.begin, more)

    def _recalled_kept(self, program: Program, row: int) -> list[Tensor | None]:
        last = vars(self)["last_sample"]
        return [None if last is None else last * program.factors[row]]

    def _noise_of_last(self, state: State) -> Tensor | float:
        """What the noise of the last step has added to the slot of its sample."""
        return 0.0

    def _cleared(self) -> None:
        super()._cleared()
        vars(self)["last_sample"] = None
        vars(self)["timestep_list"] = filled([], len(vars(self)["timestep_list"]))

    def _handed(self, made: int, pushed: list[Tensor], kept: list[Tensor]) -> None:
        super()._handed(made, pushed, kept)
        has = vars(self)
        last = self.last_sample
        has["last_sample"] = None if last is None else last.to(kept[0].dtype)
        for name in ("timestep_list", *self._orders):
            has[name] = self._shown(name)

    def _order_of_last(self, highest: int, made: int, more: int = 0) -> int:
        """Of the last of so many steps: the corrector, with one more value, has one more."""
        highest = min(highest, made + more)
        if self.config.lower_order_final:
            highest = min(highest, len(self.timesteps) - self._step_index + 1 + more)
        return highest


_HIGHEST = 12


class UniPC(KeepsType, Corrected, Solver, Stretched):
    _program = staticmethod(solvers.unipc)

    _orders: ClassVar = {"this_order": ("solver_order", 0)}

    this_order = Shown("this_order")

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table; with ``solver_p`` this corrects, and that goes on."""
        if self.config.solver_order > _HIGHEST:  # more than a table has slots for
            return super().step(model_output, timestep, sample, return_dict)  # type: ignore[misc]
        predictor = self.solver_p  # type: ignore[attr-defined]
        if not predictor:
            return self._run(model_output, timestep, sample, return_dict)
        (corrected,) = self._run(model_output, timestep, sample, False)
        out = predictor.step(model_output, timestep, corrected, return_dict=False)[0]
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _thresholded(self) -> bool:
        return self.predict_x0 and super()._thresholded()  # type: ignore[attr-defined]


class SASolver(KeepsType, Corrected, CumulativeNoise, Predicting):
    _program = staticmethod(solvers.sa_solver)

    _orders: ClassVar = {
        "this_predictor_order": ("predictor_order", 0),
        "this_corrector_order": ("corrector_order", 1),
    }

    _leaves = True

    last_noise = Kept("last_noise")
    this_predictor_order = Shown("this_predictor_order")
    this_corrector_order = Shown("this_corrector_order")

    def _called(self, state: State, index: Index, call: Made) -> None:
        ready = state.ready
        assert ready is not None
        noise = call[-1]
        state.left = (ready.shape, ready.seed, ready.device) if noise is None else noise

    def _kept(self, name: str) -> Tensor | None:
        noise = self._last_noise(vars(self)["_tabled"])
        return None if noise is None else noise.clone()

    def _last_noise(self, state: State) -> Tensor | None:
        if isinstance(state.left, tuple):  # it was drawn in the kernel
            shape, seed, device = state.left
            state.left = randn(shape, seed=seed, offset=int(state.next) - 1, device=device)
        noise: Tensor | None = state.left
        return noise

    def _keep(self, name: str, value: Tensor) -> None:
        state: State = vars(self)["_tabled"]
        assert state.program is not None
        last = self.last_sample
        if last is not None:
            if value.shape != last.shape:
                raise ValueError(
                    f"last_noise must have the shape of last_sample, {tuple(last.shape)}, got "
                    f"{tuple(value.shape)}"
                )
            slot, added = state.slot(state.program.ring), self._noise_of_last(state)
            state.left = value
            state.write(state.program.ring, slot + (self._noise_of_last(state) - added))
        state.left = value

    def _noise_of_last(self, state: State) -> Tensor | float:
        noise = self._last_noise(state)
        assert state.program is not None
        return 0.0 if noise is None else state.program.noises[_row(state)] * noise

    def _recalled_kept(self, program: Program, row: int) -> list[Tensor | None]:
        (base,) = super()._recalled_kept(program, row)
        noise = vars(self)["_tabled"].left = vars(self).get("last_noise")
        return [base if base is None or noise is None else base + program.noises[row] * noise]

    def _handed(self, made: int, pushed: list[Tensor], kept: list[Tensor]) -> None:
        super()._handed(made, pushed, kept)
        vars(self)["last_noise"] = self.last_noise

    def _highest(self) -> int:
        return max(self.config.predictor_order, self.config.corrector_order - 1)


def _row(state: State) -> int:
    """Of the last step."""
    return int(state.next) - state.begin - 1
