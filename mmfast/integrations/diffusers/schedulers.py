"""Schedulers of diffusers, by their own names, on tables.

Each has the arguments, attributes and configuration of the library's class, which it derives from.
The mixins below hold what differs: the signature of ``step``, and the function that makes the
table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_edm_euler,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_heun_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete,
    scheduling_lcm,
    scheduling_lms_discrete,
    scheduling_tcd,
)
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from mmfast.integrations.diffusers import tables
from mmfast.integrations.diffusers.tabled import Count, History, Index, State, Tabled
from mmfast.integrations.diffusers.tables import Options, host, point

Output = Any
Generator = Any


def _set(scheduler: Any) -> None:
    if scheduler.num_inference_steps is None:
        raise ValueError(
            "Number of inference steps is 'None', you need to run 'set_timesteps' after creating "
            "the scheduler"
        )


class Cumulative(Tabled):
    """Those whose noise for training is that of alphas_cumprod, by whole timesteps."""

    _levels = "alphas_cumprod"

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        return [point(value) for value in host(self.alphas_cumprod)]  # type: ignore[attr-defined]

    def _noisy_index(self, timesteps: Tensor, device: torch.device) -> Index:
        return timesteps.to(device, torch.int64)


class Uncounted(Cumulative):
    """Those that know the step by its timestep alone."""

    _remembers = False

    def _index(self, timestep: Any, state: State) -> Index:
        return self._locate(timestep, state)

    def _advance(self, index: Index) -> None:
        pass


class DDPM(Uncounted):
    _program = staticmethod(tables.ddpm)
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
    _program = staticmethod(tables.ddim)
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
        _set(self)
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


class Euler(Tabled):
    _program = staticmethod(tables.euler)
    _outputs = (scheduling_euler_discrete.EulerDiscreteSchedulerOutput, 2)
    _remembers = False
    _of_output = _wide = _scaled = True
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
    ) -> Output:
        """As the library's, by a table."""
        options = (s_churn, s_tmin, s_tmax, s_noise)
        return self._run(model_output, timestep, sample, return_dict, options, generator)


class EDMEuler(Tabled):
    _program = staticmethod(tables.edm_euler)
    _outputs = (scheduling_edm_euler.EDMEulerSchedulerOutput, 2)
    _remembers = False
    _of_output = _wide = _scaled = True
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

    def _scales(self) -> list[float]:
        return [1 / math.hypot(s, self.config.sigma_data) for s in self._state().key[1]]


class FlowEuler(Tabled):
    _program = staticmethod(tables.flow_euler)
    _outputs = (scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput, 1)
    _remembers = False
    _of_output = True
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
        wide = torch.float32 if sample.dtype.itemsize < 4 else sample.dtype
        return self._draw(sample, wide, generator)

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        return [(1 - sigma, sigma) for sigma in self._state().key[1]]

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """As the library's: samples with the noise of their timesteps (B,)."""
        if noise is None:
            raise ValueError("noise must be given")
        return self._noised(sample, noise, timestep)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """As the library's; one step alone stays where it is, where that divides 0 by 0."""
        return _stretched(self, t)


class FlowHeun(Tabled):
    _program = staticmethod(tables.flow_heun)
    _twice = True
    _outputs = (scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteSchedulerOutput, 1)
    _of_output = True
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
    ) -> Output:
        """As the library's, by a table."""
        options = (s_churn, s_tmin, s_tmax, s_noise)
        return self._run(model_output, timestep, sample, return_dict, options, generator)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of two."""
        return _first_of_two(self)

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        return [(1 - sigma, sigma) for sigma in self._state().key[1]]

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """As the library's: the sample with the noise of the step's timestep."""
        index = self._index(timestep, self._state())
        begin, self._begin_index = self._begin_index, index
        try:
            return self._noised(sample, noise, timestep)
        finally:
            self._begin_index = begin


class _Generated(Tabled):
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


class _Plain(Tabled):
    """Those without any option of a step."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        return self._run(model_output, timestep, sample, return_dict)


class EulerAncestral(_Generated):
    _program = staticmethod(tables.euler_ancestral)
    _outputs = (scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput, 2)
    _remembers = False
    _of_output = _wide = _scaled = True
    _whole = False


class Heun(_Plain):
    _program = staticmethod(tables.heun)
    _twice = True
    _outputs = (scheduling_heun_discrete.HeunDiscreteSchedulerOutput, 2)
    _scaled = True

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of two."""
        return _first_of_two(self)


class KDPM2(_Plain):
    _program = staticmethod(tables.kdpm2)
    _twice = True
    _outputs = (scheduling_k_dpm_2_discrete.KDPM2DiscreteSchedulerOutput, 2)
    _scaled = True

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of two."""
        return _first_of_two(self)

    def _scales(self) -> list[float]:
        return _interpolated(self, 0)


class KDPM2Ancestral(_Generated):
    _program = staticmethod(tables.kdpm2_ancestral)
    _twice = True
    _outputs = (scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteSchedulerOutput, 2)
    _scaled = True

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of two."""
        return _first_of_two(self)

    def _scales(self) -> list[float]:
        return _interpolated(self, 1)


class LMS(Tabled):
    _program = staticmethod(tables.lms)
    _outputs = (scheduling_lms_discrete.LMSDiscreteSchedulerOutput, 2)
    _scaled = True

    derivatives = History("derivatives")

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        return self._run(model_output, timestep, sample, return_dict, (order,))


class _Fixed(Tabled):
    """Those whose coefficients do not depend on where the history is from.

    Programs give them one, call steps at timesteps that do not follow one another, or run twice
    without an end between. No table has these runs; they are the library's own arithmetic.
    """

    _by_library = False
    _kept: ClassVar[tuple[tuple[int, str], ...]] = ()  # slots after the ring, and whose they are

    def _given(self, values: list[Tensor]) -> None:
        self._by_library = self._by_library or bool(values)

    def _prepare(self) -> State:
        self._by_library = False
        return super()._prepare()

    def _leave(self) -> None:
        """Go on with the library's arithmetic, until timesteps are set."""
        state = self._state()
        history, past = state.history, self._past()
        if past:
            assert history is not None
            for slot, name in self._kept:
                if slot < len(history):
                    setattr(self, name, history[slot].clone())
            past = [value.clone() for value in past]
        self._forget()
        if past is not None:
            vars(self)["ets"] = past
        self._by_library = True


class PNDM(_Fixed, Cumulative):
    _program = staticmethod(tables.pndm)
    _outputs = (SchedulerOutput, 1)
    _kept = ((3, "cur_sample"), (4, "cur_model_output"))

    ets = History("ets")
    counter: int  # of the library
    _first: Any = 0  # the index of its first call

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        if not self._by_library and not self._follows(timestep):
            between = self.counter % 4 and self._starting()
            self._leave()
            if not between:
                self.cur_model_output = 0
        if self._by_library:
            step = super().step_prk if self._starting() else super().step_plms  # type: ignore[misc]
            return step(model_output, timestep, sample, return_dict=return_dict)
        return self._run(model_output, timestep, sample, return_dict)

    def _starting(self) -> bool:
        """Whether the next call is one of the Runge-Kutta steps."""
        return not self.config.skip_prk_steps and self.counter < len(self.prk_timesteps)  # type: ignore[attr-defined]

    def step_prk(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        _set(self)
        if not self._by_library and self._starting():
            return self.step(model_output, timestep, sample, return_dict)
        if not self._by_library:
            self._leave()
        return super().step_prk(model_output, timestep, sample, return_dict)  # type: ignore[misc]

    def step_plms(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        _set(self)
        if not self._by_library and not self._starting():
            return self.step(model_output, timestep, sample, return_dict)
        if not self._by_library:
            self._leave()
        return super().step_plms(model_output, timestep, sample, return_dict)  # type: ignore[misc]

    def _follows(self, timestep: Any) -> bool:
        """Whether the timestep is that of the next row. Elsewhere than on the CPU it is trusted."""
        _set(self)
        state = self._state()
        place = self._locate(timestep, state)
        if isinstance(place, Tensor):
            return True
        if place < 0:
            return False
        if self.counter == 0:
            return not (place and self._starting())
        first = self._first
        if not isinstance(first, int):
            return True
        index = first + self.counter
        return index < len(state.values) and state.values[place] == state.values[index]

    def _missing(self, timestep: float) -> int:
        return -1

    def _index(self, timestep: Any, state: State) -> Index:
        if self.counter == 0:
            self._first = self._locate(timestep, state)
        return self._first + self.counter

    def _advance(self, index: Index) -> None:
        self.counter += 1

    def _pushes(self, made: int) -> int:
        if self.config.skip_prk_steps:
            return made - (made > 1)
        return (made + 3) // 4 if made < 12 else made - 9


class _Set(Tabled):
    """Those that want set_timesteps first."""

    def _check_first(self, timestep: Any) -> None:
        _set(self)
        super()._check_first(timestep)


class IPNDM(_Fixed, _Set):
    _program = staticmethod(tables.ipndm)
    _outputs = (SchedulerOutput, 1)
    _levels = "betas"

    ets = History("ets")

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        if not self._by_library:
            _set(self)
            state = self._state()
            index, following = self._index(timestep, state), state.next
            if type(index) is type(following) is int and index != following and self._past():
                self._leave()
        if self._by_library:
            return super().step(model_output, timestep, sample, return_dict)  # type: ignore[misc]
        return self._run(model_output, timestep, sample, return_dict)


class _Solver(_Set):
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


class DEIS(_Solver, _Plain):
    _program = staticmethod(tables.deis)

    lower_order_nums = Count()


class DPMMultistep(_Solver):
    _program = staticmethod(tables.dpm_multistep)
    _of_output = True

    lower_order_nums = Count()

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
        wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
        return self._draw(model_output, wide, generator)


class DPMSinglestep(_Solver):
    _program = staticmethod(tables.dpm_singlestep)

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


class UniPC(_Solver):
    _program = staticmethod(tables.unipc)

    lower_order_nums = Count()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table; with ``solver_p`` this corrects, and that goes on."""
        predictor = self.solver_p  # type: ignore[attr-defined]
        if not predictor:
            return self._run(model_output, timestep, sample, return_dict)
        (corrected,) = self._run(model_output, timestep, sample, False)
        out = predictor.step(model_output, timestep, corrected, return_dict=False)[0]
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _thresholded(self) -> bool:
        return self.predict_x0 and super()._thresholded()  # type: ignore[attr-defined]

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """As the library's; one step alone stays where it is, where that divides 0 by 0."""
        return _stretched(self, t)


class SASolver(_Solver):
    _program = staticmethod(tables.sa_solver)

    lower_order_nums = Count()

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Output:
        """As the library's, by a table."""
        if self.config.variance_type is not None:
            model_output = self._predicted(model_output)
        return self._run(model_output, timestep, sample, return_dict, (), generator)

    def _highest(self) -> int:
        return max(self.config.predictor_order, self.config.corrector_order - 1)

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        return [point(value) for value in host(self.alphas_cumprod)]  # type: ignore[attr-defined]

    def _noisy_index(self, timesteps: Tensor, device: torch.device) -> Index:
        return timesteps.to(device, torch.int64)


class EDMDPM(_Set, _Generated):
    _program = staticmethod(tables.edm_dpm)
    _outputs = (SchedulerOutput, 1)
    _missing_is_last = True
    _scaled = True

    model_outputs = History("model_outputs", "solver_order")
    lower_order_nums = Count()

    def _scales(self) -> list[float]:
        return [1 / math.hypot(s, self.config.sigma_data) for s in self._state().key[1]]


class LCM(_Set, Cumulative, _Generated):
    _program = staticmethod(tables.lcm)
    _outputs = (scheduling_lcm.LCMSchedulerOutput, 2)
    _remembers = False


class TCD(_Set, Cumulative):
    _program = staticmethod(tables.tcd)
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


def _first_of_two(scheduler: Any) -> bool:
    index = scheduler._step_index
    return index is None or index % 2 == 0


def _interpolated(scheduler: Any, back: int) -> list[float]:
    between = host(scheduler.sigmas_interpol)
    sigmas = scheduler._state().key[1]
    used = [between[i - back] if i % 2 else sigma for i, sigma in enumerate(sigmas)]
    return [(s * s + 1) ** -0.5 for s in used]


def _stretched(scheduler: Any, t: Any) -> Any:
    left = 1 - t
    if left[-1] == 0:
        return t
    return 1 - left * ((1 - scheduler.config.shift_terminal) / left[-1])


# What can't be done.


def objections(scheduler: Any) -> list[str]:
    """Options of a scheduler of the library that its class here has not; empty when all is well."""
    name, config = type(scheduler).__name__, scheduler.config
    return [
        f"{name}: {key}={config[key]} is not supported: it can be 1 to {highest}"
        for key, highest in _HIGHEST.get(name, {}).items()
        if not 1 <= config[key] <= highest
    ]


_HIGHEST = {
    "UniPCMultistepScheduler": {"solver_order": 12},
    "SASolverScheduler": {"predictor_order": 4, "corrector_order": 4},
}


_MIXINS: dict[str, type[Tabled]] = {
    "DDPMScheduler": DDPM,
    "DDIMScheduler": DDIM,
    "EulerDiscreteScheduler": Euler,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "HeunDiscreteScheduler": Heun,
    "KDPM2DiscreteScheduler": KDPM2,
    "KDPM2AncestralDiscreteScheduler": KDPM2Ancestral,
    "LMSDiscreteScheduler": LMS,
    "PNDMScheduler": PNDM,
    "IPNDMScheduler": IPNDM,
    "DEISMultistepScheduler": DEIS,
    "DPMSolverMultistepScheduler": DPMMultistep,
    "DPMSolverSinglestepScheduler": DPMSinglestep,
    "UniPCMultistepScheduler": UniPC,
    "SASolverScheduler": SASolver,
    "LCMScheduler": LCM,
    "TCDScheduler": TCD,
    "FlowMatchEulerDiscreteScheduler": FlowEuler,
    "FlowMatchHeunDiscreteScheduler": FlowHeun,
    "EDMEulerScheduler": EDMEuler,
    "EDMDPMSolverMultistepScheduler": EDMDPM,
}


def on_tables(theirs: type) -> type:
    """The class ``theirs`` of the library with its steps by tables."""

    made: Any = theirs.__init__  # type: ignore[misc]

    @functools.wraps(made)  # its signature is what configurations are read by
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        reasons = objections(self)
        if reasons:
            raise ValueError("; ".join(reasons))

    given: Any = theirs.set_timesteps  # type: ignore[attr-defined]

    @functools.wraps(given)  # pipelines ask its signature for what it takes
    def set_timesteps(self: Any, *args: Any, **options: Any) -> None:
        given(self, *args, **options)
        self._prepare()

    mixin = _MIXINS[theirs.__name__]
    members: dict[str, Any] = {
        "__init__": __init__,
        "__doc__": f"diffusers' {theirs.__name__} with its steps by tables.",
        # Pipelines are saved with the module of their scheduler: they stay readable without mmfast.
        "__module__": theirs.__module__,
        "__reduce_ex__": _reduced,
        "set_timesteps": set_timesteps,
    }
    for method, by_table in (("add_noise", Tabled._noised), ("scale_model_input", Tabled._scale)):
        if hasattr(theirs, method):
            members[method] = by_table
    return type(theirs.__name__, (mixin, theirs), members)


def _reduced(scheduler: Any, protocol: int) -> Any:
    name = type(scheduler).__name__
    if type(scheduler) is not CLASSES.get(name):
        return object.__reduce_ex__(scheduler, protocol)
    return _blank, (name,), vars(scheduler).copy()


def _blank(name: str) -> Any:
    return object.__new__(CLASSES[name])


CLASSES: dict[str, type] = {
    name: on_tables(getattr(diffusers, name)) for name in _MIXINS if hasattr(diffusers, name)
}
