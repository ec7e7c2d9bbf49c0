"""What all patched schedulers share: a table instead of arithmetic, and a counter on the host.

:class:`Tabled` goes before a scheduler's own class among the bases. Configuration, timesteps and
sigmas stay the library's; a step is one :func:`mmfast.sampler_step` with the row of its index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmfast import backends, philox
from mmfast.integrations.diffusers.tables import Options, Program, host, noising
from mmfast.ops.add_noise import OP as ADD_NOISE
from mmfast.ops.add_noise import add_noise
from mmfast.ops.dynamic_threshold import dynamic_threshold
from mmfast.ops.sampler_step import OP, sampler_step

_PROGRAMS = 8  # that a scheduler remembers: of other numbers of steps, begins and options

Index = int | Tensor


class State:
    """What is known of a scheduler's timesteps and sigmas, and where its steps are.

    Attributes:
        program: the table in use, from index ``begin``.
        next: the index that goes on with the history; any other starts anew.
        history: (slots, B, ...), the memory of the steps.
    """

    def __init__(self, scheduler: Any, programs: dict[Any, Program]) -> None:
        self.timesteps = scheduler.timesteps
        self.levels = getattr(scheduler, scheduler._levels, None)
        self.config = scheduler._internal_dict
        self.versions = (_version(self.timesteps), _version(self.levels))
        self.values: list[float] = [] if self.timesteps is None else host(self.timesteps)
        self.address, self.stride = _place_in_memory(self.timesteps)
        self.key = (tuple(self.values), () if self.levels is None else tuple(host(self.levels)))
        self.places: dict[float, int] = {}  # the library takes the second of equal ones
        seen: set[float] = set()
        for i, value in enumerate(self.values):
            if value not in self.places:
                self.places[value] = i
            elif value not in seen:
                self.places[value] = i
                seen.add(value)
        self.scales: list[float] | None = None
        self.noisy: dict[torch.device, Tensor] = {}
        self.programs = programs
        self.program: Program | None = None
        self.options: Options = ()
        self.begin = 0
        self.next: Index = -1
        self.coefficients: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}
        self.history: Tensor | None = None

    def holds(self, scheduler: Any) -> bool:
        """Whether the scheduler is still as it was."""
        timesteps, levels = self.timesteps, self.levels
        return (
            scheduler.timesteps is timesteps
            and getattr(scheduler, scheduler._levels, None) is levels
            and scheduler._internal_dict is self.config
            and (_version(timesteps), _version(levels)) == self.versions
        )

    def enter(self, scheduler: Any, index: Index, options: Options) -> Program:
        """The program for steps that begin at ``index``."""
        begin = index if isinstance(index, int) else 0
        key = (*self.key, begin, options)
        found = self.programs.get(key)
        if found is None:
            found = type(scheduler)._program(scheduler, begin, options)
            if scheduler._thresholds and scheduler.config.get("thresholding"):
                config = scheduler.config
                limits = config.dynamic_thresholding_ratio, config.sample_max_value
                found = replace(found, threshold=limits)
            if len(self.programs) >= _PROGRAMS:
                self.programs.clear()
            self.programs[key] = found
        program = found
        if len(program.table) == len(self.values):
            begin = 0
        if program is not self.program:
            self.coefficients = {}
        self.program, self.options, self.begin = program, options, begin
        return program

    def on(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """The table and the numbers of its rows."""
        found = self.coefficients.get(device)
        if found is None:
            assert self.program is not None
            table = self.program.table.coefficients.to(device)
            found = table, list(torch.arange(len(table), device=device).unbind())
            self.coefficients[device] = found
        return found


def _place_in_memory(tensor: Tensor | None) -> tuple[int, int]:
    """Where its first number is, and how many bytes on the next one, if there is one."""
    if tensor is None or not tensor.dim():
        return 0, 1
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size() or 1 << 62


def _storage(tensor: Tensor) -> int:
    """Which memory it is in, for tensors on the meta device, which have no addresses."""
    return tensor.untyped_storage()._cdata


def _new(like: Tensor, dtype: torch.dtype) -> Tensor:
    # An argument takes time, even one that changes nothing.
    return torch.empty_like(like) if like.dtype == dtype else torch.empty_like(like, dtype=dtype)


def _version(tensor: Any) -> int | None:
    if not isinstance(tensor, Tensor) or tensor.is_inference():
        return None
    return tensor._version


class Remembered(list[Any]):
    """The memory of a scheduler, newest last: what is written to a place goes to the history."""

    def __setitem__(self, place: Any, value: Any) -> None:
        current = self[place]
        if not isinstance(current, Tensor) or not isinstance(value, Tensor):
            raise ValueError("only a tensor can take the place of one in a scheduler's history")
        current.copy_(value)


class History:
    """An attribute of the library that holds the last values: a view of our history.

    Setting it to nothing, a list of None or 0, makes the next step begin anew.
    """

    def __init__(self, name: str, length: str | None = None) -> None:
        self.name = name
        self.length = length  # the option that the list is as long as; without, it grows

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        past = scheduler._past()
        if past is None:
            try:
                return vars(scheduler)[self.name]
            except KeyError:
                raise AttributeError(self.name) from None
        if self.length is None:
            return Remembered(past)
        size = len(vars(scheduler)[self.name])
        return Remembered([*[None] * (size - len(past)), *past])

    def __set__(self, scheduler: Any, values: Sequence[Any]) -> None:
        past = scheduler._past()
        given = [value for value in values if value is not None]
        if past is not None and given:
            if len(given) > len(past):
                raise ValueError(f"{self.name} holds {len(past)} tensors here, got {len(given)}")
            for mine, value in zip(reversed(past), reversed(given), strict=False):
                if mine is not value:
                    mine.copy_(value)
            return
        scheduler._forget()
        vars(scheduler)[self.name] = values


class Count:
    """``lower_order_nums``: how many steps there are to look back on."""

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        past = scheduler._past()
        return vars(scheduler)["lower_order_nums"] if past is None else scheduler._steps_made()

    def __set__(self, scheduler: Any, value: int) -> None:
        if scheduler._past() is not None:
            if value == scheduler._steps_made():
                return
            if value:
                raise ValueError(
                    f"lower_order_nums is {scheduler._steps_made()} here and can be set to 0, "
                    f"which begins anew, got {value}"
                )
        scheduler._forget()
        vars(scheduler)["lower_order_nums"] = value


class Tabled:
    """The steps of a scheduler, by a table."""

    _program: ClassVar[Any]  # (scheduler, begin, options) to Program
    _levels: ClassVar[str] = "sigmas"  # the attribute the table is made from, besides timesteps
    _missing_is_last: ClassVar[bool] = False  # an unknown timestep counts as the last one
    _outputs: ClassVar[tuple[type | None, int]] = (None, 1)  # type, and how many tensors
    _of_output: ClassVar[bool] = False  # the result has the dtype of the model's output
    _wide: ClassVar[bool] = False  # the prediction is float32 at least
    _scaled: ClassVar[bool] = False  # scale_model_input does something
    _whole: ClassVar[bool] = True  # integers are timesteps
    _remembers: ClassVar[bool] = True  # steps depend on those before them
    _thresholds: ClassVar[bool] = True  # where the configuration says so
    _philox: int | Tensor | None = None

    # Attributes of the library's own classes.
    config: Any
    timesteps: Any
    _step_index: Any
    _begin_index: Any

    def use_philox(self, seed: int | Tensor | None) -> None:
        """Draw the noise of steps without a generator in the kernel, from this seed.

        The noise of a step is that of :func:`mmfast.randn` with its number as offset, the same on
        every device. By default, and again after ``use_philox(None)``, it comes from
        torch's global generator.

        Args:
            seed: an int, or an int64 tensor on the samples' device, with one per sample.
        """
        self._philox = seed

    def _prepare(self) -> State:
        """Read the timesteps and sigmas, maybe from a device: when they are set, not in a step."""
        old = vars(self).get("_tabled")
        state = State(self, {})
        if old is not None:
            state.history = old.history
            if old.config is state.config:
                state.programs = old.programs
        vars(self)["_tabled"] = state
        return state

    def _state(self) -> State:
        state = vars(self).get("_tabled")
        if state is not None and state.holds(self):
            return state
        return self._prepare()

    def _forget(self) -> None:
        state = vars(self).get("_tabled")
        if state is not None:
            state.next = -1

    def _steps_made(self) -> int:
        state = vars(self)["_tabled"]
        return min(state.next - state.begin, self._highest())

    def _highest(self) -> int:
        """At most so many earlier steps are counted."""
        return int(self.config.solver_order)

    def _past(self) -> list[Tensor] | None:
        """What the last steps pushed, oldest first; None while there is nothing to go on with."""
        state = vars(self).get("_tabled")
        if state is None or type(state.next) is not int or state.next < 0:
            return None
        if state.program is None or not self._remembers:
            return None
        ring = state.program.ring
        made = self._pushes(state.next - state.begin)
        if not ring or state.history is None:
            return []
        return [state.history[k % ring] for k in range(max(0, made - ring), made)]

    def _pushes(self, made: int) -> int:
        """How many values so many steps have pushed."""
        return made

    # Where a timestep is, without asking the device.

    def _locate(self, timestep: Any) -> Index:
        """The index of a timestep.

        One of the scheduler's own is known by its place in memory, numbers and tensors on the CPU
        by their value. For any other tensor the index is found on its device.
        """
        state = self._state()
        if isinstance(timestep, Tensor):
            timesteps = self.timesteps
            if (
                timestep.dtype == timesteps.dtype
                and timestep.numel() == 1
                and timestep.device == timesteps.device
            ):
                place, rest = divmod(timestep.data_ptr() - state.address, state.stride)
                if not rest and 0 <= place < len(state.values):
                    return place
                if timestep.is_meta and _storage(timestep) == _storage(timesteps):
                    return timestep.storage_offset() - timesteps.storage_offset()
            if timestep.device.type != "cpu":
                return self._locate_on_device(timestep)
            timestep = timestep.item()
        place = state.places.get(float(timestep), -1)
        return self._missing(timestep) if place < 0 else place

    def _missing(self, timestep: float) -> int:
        if self._missing_is_last:
            return len(self._state().values) - 1
        raise IndexError(f"timestep {timestep} is none of the scheduler's timesteps")

    def _locate_on_device(self, timestep: Tensor) -> Tensor:
        own = self.timesteps.to(timestep.device)
        index = _places(timestep.reshape(1), own, self._missing_is_last)[0]
        if self._remembers:
            # Which orders the first steps have depends on where they begin: here, at the first.
            return torch.where(index == 0, 0, -1 - len(self.timesteps))
        return index

    def _init_step_index(self, timestep: Any) -> None:
        begin = self._begin_index
        self._step_index = self._locate(timestep) if begin is None else begin

    def _index(self, timestep: Any) -> Index:
        """The index of a step, and of the model's input before it."""
        index = self._step_index
        if index is None:
            if not self._whole:
                _refuse_whole(timestep)
            self._init_step_index(timestep)
            index = self._step_index
        return index

    def _advance(self, index: Index) -> None:
        self._step_index = index + 1

    # The step.

    def _run(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool,
        options: Options = (),
        generator: Any = None,
        noise: Tensor | None = None,
        variance: Tensor | None = None,
        index: Index | None = None,
    ) -> Any:
        state = self._state()
        if index is None:
            index = self._index(timestep)
        program = state.program
        goes_on = index is state.next or (
            type(index) is int and type(state.next) is int and index == state.next
        )
        if program is None or options != state.options or (self._remembers and not goes_on):
            program = state.enter(self, index, options)
            goes_on = False
        if torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
            raise RuntimeError(
                f"no gradient passes through the steps of mmfast's {type(self).__name__}: call it "
                "under torch.no_grad(), or take the patch back"
            )
        table, steps = state.on(sample.device)
        if isinstance(index, Tensor):
            step, draws, last = index.to(sample.device), any(program.draws), False
        else:
            row = index - state.begin
            if not 0 <= row < len(steps):
                raise IndexError(
                    f"step {index} of {len(steps) + state.begin}: the schedule is at its end; call "
                    "set_timesteps to start again"
                )
            step, draws, last = steps[row], program.draws[row], row == len(steps) - 1
        seed, given = None, noise is not None
        if draws and noise is None:
            if self._philox is not None and generator is None:
                seed = self._seed(sample)
            else:
                noise = self._noise(model_output, sample, generator)
        result = sample.dtype
        if model_output.dtype != result:
            other = model_output.dtype
            result = other if self._of_output else torch.promote_types(result, other)
        history = None
        if program.table.slots:
            history = self._history(state, program, sample, goes_on)
        kind, outputs = self._outputs
        out = _new(sample, result)
        second = None
        if outputs > 1 and program.output is None and not (last and program.final):
            wide = self._wide and result.itemsize < 4
            second = _new(sample, torch.float32 if wide else result)
        threshold = None
        if program.threshold is not None:
            ratio, maximum = program.threshold
            threshold = dynamic_threshold(
                sample, model_output, table, step, ratio=ratio, maximum=maximum
            )
        if (
            not given
            and model_output.shape == sample.shape
            and model_output.device == sample.device
            and model_output.is_floating_point()
            and sample.is_floating_point()
            and sample.dim()
        ):
            # The public function's checks would find nothing: all else was made here.
            backends.call(
                OP, sample, model_output, None, 1.0, None, table, step, noise, seed, variance,
                threshold, out, history, second, None,
            )  # fmt: skip
        else:
            sampler_step(
                sample, model_output, table, step, noise=noise, seed=seed, variance=variance,
                threshold=threshold, history=history, out=out, denoised=second,
            )  # fmt: skip
        self._advance(index)
        state.next = index + 1 if isinstance(index, int) else vars(self).get("_step_index", -1)
        if outputs > 1 and second is None:
            second = out
            if program.output is not None:
                assert history is not None
                second = history[program.output]
        if return_dict and kind is not None:
            return kind(out) if second is None else kind(out, second)
        return (out,) if second is None else (out, second)

    def _history(self, state: State, program: Program, sample: Tensor, goes_on: bool) -> Tensor:
        shape = (program.table.slots, *sample.shape)
        wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
        history = state.history
        if not self._remembers:
            return torch.empty(shape, dtype=sample.dtype, device=sample.device)
        fits = history is not None and history.shape == shape and history.dtype == wide
        if history is not None and fits and history.device == sample.device:
            return history
        if goes_on:
            was = None if history is None else tuple(history.shape[1:])
            raise ValueError(
                f"{type(self).__name__} is in the middle of samples of shape {was}, got "
                f"{tuple(sample.shape)} in {sample.dtype} on {sample.device}: call set_timesteps "
                "to start new ones"
            )
        state.history = torch.empty(shape, dtype=wide, device=sample.device)
        return state.history

    def _seed(self, sample: Tensor) -> Tensor:
        seed = self._philox
        if (
            isinstance(seed, Tensor)
            and not seed.dim()
            and seed.dtype == torch.int64
            and seed.device == sample.device
        ):
            return seed
        if not isinstance(seed, Tensor) or seed.device != sample.device:
            assert seed is not None
            seed = self._philox = philox.as_stream(seed, sample.device, "seed")
        if seed.dtype != torch.int64 or seed.shape not in ((), sample.shape[:1]):
            raise ValueError(
                f"the seed of use_philox must be int64, () or (B,) = ({sample.shape[0]},), got "
                f"{tuple(seed.shape)} in {seed.dtype}"
            )
        return seed

    def _noise(self, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        return self._draw(model_output, model_output.dtype, generator)

    @staticmethod
    def _draw(like: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
        if generator is None:
            return torch.randn(like.shape, device=like.device, dtype=dtype)
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)

    # The model's input, and noise for samples.

    def _scale(self, sample: Tensor, *args: Any, **options: Any) -> Tensor:
        """As the library's: the sample as the model gets it."""
        if not self._scaled:
            return sample
        timestep = args[0] if args else options.get("timestep")
        index = self._index(timestep)
        self.is_scale_input_called = True
        state = self._state()
        scales = state.scales
        if scales is None:
            scales = state.scales = self._scales()
        if isinstance(index, int):
            return sample * scales[index]
        every = torch.tensor(scales, device=index.device)
        return sample * every.index_select(0, index.reshape(1).clamp(min=0)).to(sample)

    def _scales(self) -> list[float]:
        return [(s * s + 1) ** -0.5 for s in self._state().key[1]]

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        """alpha and sigma at each index."""
        return [(1.0, sigma) for sigma in self._state().key[1]]

    def _noisy_index(self, timesteps: Tensor, device: torch.device) -> Index:
        begin = self._begin_index
        if begin is not None:
            return begin if self._step_index is None else self._step_index
        own = self.timesteps.to(device)
        return _places(timesteps.to(device), own, self._missing_is_last)

    def _noised(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As the library's: samples with the noise of their timesteps (B,)."""
        if torch.is_grad_enabled() and noise.requires_grad:
            raise RuntimeError(
                f"no gradient passes to the noise in add_noise of mmfast's {type(self).__name__}: "
                "call it under torch.no_grad(), or take the patch back"
            )
        device, dtype = original_samples.device, original_samples.dtype
        state = self._state()
        table = state.noisy.get(device)
        if table is None:
            table = noising(list(self._noisy_points())).to(device)
            state.noisy[device] = table
        index = self._noisy_index(timesteps, device)
        if not isinstance(index, Tensor):
            index = torch.full((), index, dtype=torch.int64, device=device)
        elif index.numel() == 1 and index.shape != original_samples.shape[:1]:
            index = index.reshape(())
        if noise.dtype != dtype:
            original_samples = original_samples.to(torch.promote_types(dtype, noise.dtype))
        if (
            noise.shape == original_samples.shape
            and noise.device == index.device == device
            and noise.is_floating_point()
            and original_samples.is_floating_point()
            and index.dtype == torch.int64
            and index.shape in ((), original_samples.shape[:1])
            and original_samples.dim()
        ):
            # As in a step, the public function's checks would find nothing.
            made = backends.call(
                ADD_NOISE, original_samples, index, table, noise, None, None, False
            )
            noisy: Tensor = made[0]
            return noisy
        return add_noise(original_samples, index, table, noise=noise, target=None).noisy


def _places(timesteps: Tensor, own: Tensor, missing_is_last: bool) -> Tensor:
    """Indices (B,) of timesteps (B,), the second of equal ones; without reading anything back."""
    equal = timesteps.reshape(-1, 1) == own
    counts = equal.cumsum(1)
    found = counts[:, -1:]
    index = (equal & (counts == found.clamp(max=2))).to(torch.uint8).argmax(1)
    absent = found[:, 0] == 0
    return torch.where(absent, len(own) - 1 if missing_is_last else -1, index)


def _refuse_whole(timestep: Any) -> None:
    whole = isinstance(timestep, int)
    if isinstance(timestep, Tensor):
        whole = timestep.dtype in (torch.int32, torch.int64)
    if whole:
        raise ValueError(
            "Passing integer indices (e.g. from `enumerate(timesteps)`) as timesteps is not "
            "supported: pass one of the `scheduler.timesteps`"
        )
