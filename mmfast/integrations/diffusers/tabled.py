"""What all patched schedulers share: a table instead of arithmetic, and a counter on the host.

:class:`Tabled` goes before a scheduler's own class among the bases. Configuration, timesteps and
sigmas stay the library's; a step is one :func:`mmfast.sampler_step` with the row of its index.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, empty_like, is_grad_enabled
from torch.autograd.graph import increment_version

from mmfast import backends, philox
from mmfast.checks import check_beside, check_floating
from mmfast.integrations.diffusers.tables import Options, Program, host, noising
from mmfast.ops.add_noise import OP as ADD_NOISE
from mmfast.ops.add_noise import add_noise
from mmfast.ops.dynamic_threshold import dynamic_threshold
from mmfast.ops.sampler_step import OP

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
        self.name = scheduler._levels
        self.levels = vars(scheduler).get(self.name)
        self.config = scheduler._internal_dict
        self.watched = (*_watched(self.timesteps), *_watched(self.levels))
        self.values: list[float] = [] if self.timesteps is None else host(self.timesteps)
        self.own = None if self.timesteps is None else (self.timesteps.dtype, self.timesteps.device)
        self.key = (tuple(self.values), () if self.levels is None else tuple(host(self.levels)))
        self.places: dict[float, int] = {}  # the library takes the second of equal ones
        seen: set[float] = set()
        for i, value in enumerate(self.values):
            if value not in self.places:
                self.places[value] = i
            elif value not in seen:
                self.places[value] = i
                seen.add(value)
        self.addresses = _addresses(self.timesteps)
        if scheduler._twice:
            self.addresses = {at: self.places[self.values[i]] for at, i in self.addresses.items()}
        self.scales: list[float] | None = None
        self.noisy: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}
        self.programs = programs
        self.forgets = not scheduler._remembers
        self.program: Program | None = None
        self.options: Options = ()
        self.begin = 0
        self.next: Index = -1
        self.coefficients: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}
        self.history: Tensor | None = None
        self.ready: Ready | None = None
        self.shown = False  # whether views of the history may be known outside

    def holds(self, has: dict[str, Any]) -> bool:
        """Whether a scheduler with these attributes is still as it was."""
        watched, seen, also, known = self.watched
        return (
            has["timesteps"] is self.timesteps
            and has.get(self.name) is self.levels
            and has["_internal_dict"] is self.config
            and watched._version == seen
            and also._version == known
        )

    def enter(self, scheduler: Any, index: Index, options: Options) -> Program:
        """The program for steps that begin at ``index``."""
        begin = index if isinstance(index, int) else 0
        key = (*self.key, begin, options)
        found = self.programs.get(key)
        if found is None:
            found = type(scheduler)._program(scheduler, begin, options)
            if scheduler._thresholded():
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
        self.ready = None
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


_UNWATCHED = torch.empty(0)  # nobody changes it


def _watched(tensor: Any) -> tuple[Tensor, int]:
    """A tensor whose version says that ``tensor`` has changed, and what it is now."""
    if not isinstance(tensor, Tensor) or tensor.is_inference():
        tensor = _UNWATCHED
    return tensor, tensor._version


def _addresses(timesteps: Tensor | None) -> dict[int, int]:
    """The index of each timestep, by its place in memory."""
    if timesteps is None or timesteps.is_meta or not timesteps.dim():
        return {}
    start, stride = timesteps.data_ptr(), timesteps.stride(0) * timesteps.element_size()
    return {start + i * stride: i for i in range(len(timesteps))}


def _storage(tensor: Tensor) -> int:
    """Which memory it is in, for tensors on the meta device, which have no addresses."""
    return tensor.untyped_storage()._cdata


class Ready:
    """What the steps of a program need for samples of one shape, dtype and device.

    Attributes:
        rows: the number of each row on the device, whether the step draws noise, whether its second
            output is a tensor of its own.
    """

    def __init__(
        self, scheduler: Any, state: State, program: Program, sample: Tensor, model_output: Tensor
    ) -> None:
        kind = type(scheduler)
        self.kind, self.outputs = kind._outputs
        self.shape, self.dtype, self.device = sample.shape, sample.dtype, sample.device
        self.output_dtype = model_output.dtype
        self.table, steps = state.on(self.device)
        self.draws = any(program.draws)
        two = self.outputs > 1 and program.output is None
        last = len(steps) - 1
        self.rows = [
            (step, draws, two and not (i == last and program.final))
            for i, (step, draws) in enumerate(zip(steps, program.draws, strict=True))
        ]
        self.two = two
        result = self.dtype
        if self.output_dtype != result:
            other = self.output_dtype
            result = other if kind._of_output else torch.promote_types(result, other)
        self.out = _unless(self.dtype, result)
        wide = kind._wide and result.itemsize < 4
        self.second = _unless(self.dtype, torch.float32 if wide else result)
        self.slots = program.table.slots
        self.threshold = program.threshold
        self.history: Tensor | None = None  # that is known to fit
        self.philox: int | Tensor | None = None  # of which seed is the tensor
        self.seed: Tensor | None = None

    def suits(self, sample: Tensor, model_output: Tensor) -> bool:
        """Whether it is for these."""
        return (
            sample.shape == self.shape
            and model_output.shape == self.shape
            and sample.dtype is self.dtype
            and model_output.dtype is self.output_dtype
            and sample.device == self.device
            and model_output.device == self.device
        )


def _unless(dtype: torch.dtype, wanted: torch.dtype) -> torch.dtype | None:
    """What empty_like is told. An argument takes time, even one that changes nothing."""
    return None if dtype == wanted else wanted


def _new(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    return empty_like(like) if dtype is None else empty_like(like, dtype=dtype)


def _check_like(name: str, tensor: Tensor, sample: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.shape != sample.shape:
        raise ValueError(f"{name} must have shape {tuple(sample.shape)}, got {tuple(tensor.shape)}")
    check_beside("the sample", sample.device, name, tensor)


def made(kind: Any, **fields: Tensor) -> Any:
    """An output of the library, without looking for its fields in the class each time."""
    output = kind.__new__(kind)
    output.__dict__.update(fields)
    OrderedDict.update(output, fields)
    return output


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
        scheduler._given(given)


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
    _outputs: ClassVar[tuple[type, int]]  # type, and how many tensors
    _of_output: ClassVar[bool] = False  # the result has the dtype of the model's output
    _wide: ClassVar[bool] = False  # the prediction is float32 at least
    _scaled: ClassVar[bool] = False  # scale_model_input does something
    _whole: ClassVar[bool] = True  # integers are timesteps
    _remembers: ClassVar[bool] = True  # steps depend on those before them
    _twice: ClassVar[bool] = False  # two calls a step, and of equal timesteps the second is meant
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

    def _thresholded(self) -> bool:
        return bool(self.config.get("thresholding"))

    def _prepare(self) -> State:
        """Read the timesteps and sigmas, maybe from a device: when they are set, not in a step."""
        old = vars(self).get("_tabled")
        state = State(self, {})
        if old is not None:
            state.history, state.shown = old.history, old.shown
            if old.config is state.config:
                state.programs = old.programs
        vars(self)["_tabled"] = state
        return state

    def _state(self) -> State:
        has = self.__dict__
        state: State | None = has.get("_tabled")
        return state if state is not None and state.holds(has) else self._prepare()

    def _forget(self) -> None:
        state = vars(self).get("_tabled")
        if state is not None:
            state.next = -1

    def _given(self, values: list[Tensor]) -> None:
        """A history of ``values`` was set before a run."""

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
        state.shown = True
        return [state.history[k % ring] for k in range(max(0, made - ring), made)]

    def _pushes(self, made: int) -> int:
        """How many values so many steps have pushed."""
        return made

    # Where a timestep is, without asking the device.

    def _locate(self, timestep: Any, state: State | None = None) -> Index:
        """The index of a timestep.

        One of the scheduler's own is known by its place in memory, numbers and tensors on the CPU
        by their value. For any other tensor the index is found on its device.
        """
        if state is None:
            state = self._state()
        if isinstance(timestep, Tensor):
            if (timestep.dtype, timestep.device) == state.own and timestep.numel() == 1:
                if timestep.is_meta:
                    if _storage(timestep) == _storage(self.timesteps):
                        return timestep.storage_offset() - self.timesteps.storage_offset()
                else:
                    place = state.addresses.get(timestep.data_ptr())
                    if place is not None:
                        return place
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

    def _index(self, timestep: Any, state: State) -> Index:
        """The index of a step, and of the model's input before it."""
        index = self._step_index
        if index is None:
            self._init_step_index(timestep)
            index = self._step_index
        return index

    def _check_first(self, timestep: Any) -> None:
        """Refuse what no run can begin with."""
        if not self._whole:
            _refuse_whole(timestep)

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
        following = state.next
        if type(following) is int and following < 0:
            self._check_first(timestep)
        if index is None:
            index = self._index(timestep, state)
        counted = type(index) is int
        goes_on = index is following
        if counted and type(following) is int:
            goes_on = index == following  # type: ignore[assignment]
        program = state.program
        if program is None or options != state.options or not (goes_on or state.forgets):
            program = state.enter(self, index, options)
            goes_on = False
        if is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
            raise RuntimeError(
                f"no gradient passes through the steps of mmfast's {type(self).__name__}: call it "
                "under torch.no_grad(), or take the patch back"
            )
        ready = state.ready
        if ready is None or not ready.suits(sample, model_output):
            check_floating("sample", sample)
            _check_like("model_output", model_output, sample)
            ready = state.ready = Ready(self, state, program, sample, model_output)
        if counted:
            row = index - state.begin
            if row == len(ready.rows) and self._twice:
                # The last step is one call; the library lets a second one pass, of no length.
                self._advance(index)
                state.next = index + 1
                return self._returned(ready, sample.clone(), sample.clone(), return_dict)
            if not 0 <= row < len(ready.rows):
                raise IndexError(
                    f"step {index} of {len(ready.rows) + state.begin}: the schedule is at its end; "
                    "call set_timesteps to start again"
                )
            step, draws, two = ready.rows[row]
        else:
            step, draws, two = index.to(ready.device), ready.draws, ready.two  # type: ignore[union-attr]
        seed = None
        if draws:
            if noise is not None:
                _check_like("noise", noise, sample)
            elif generator is not None or self._philox is None:
                noise = self._noise(model_output, sample, generator)
            else:
                if ready.philox is not self._philox:
                    ready.seed = self._seed(sample)
                    ready.philox = self._philox
                seed = ready.seed
        else:
            noise = None
        if variance is not None:
            _check_like("variance", variance, sample)
        history = None
        if ready.slots:
            history = self._history(state, ready, sample, goes_on)
        out = _new(sample, ready.out)
        second = _new(sample, ready.second) if two else None
        threshold = None
        if ready.threshold is not None:
            ratio, maximum = ready.threshold
            threshold = dynamic_threshold(
                sample, model_output, ready.table, step, ratio=ratio, maximum=maximum
            )
        # The public function's checks were made above.
        backends.call_on_new(
            OP, sample, model_output, None, 1.0, None, ready.table, step, noise, seed, variance,
            threshold, out, history, second, None,
        )  # fmt: skip
        self._advance(index)
        state.next = index + 1 if counted else self.__dict__.get("_step_index", -1)
        if second is None:
            second = out
            if program.output is not None:
                assert history is not None
                second = history[program.output]
        return self._returned(ready, out, second, return_dict)

    @staticmethod
    def _returned(ready: Ready, out: Tensor, second: Tensor, return_dict: bool) -> Any:
        if ready.outputs == 1:
            return made(ready.kind, prev_sample=out) if return_dict else (out,)
        if not return_dict:
            return out, second
        return made(ready.kind, prev_sample=out, pred_original_sample=second)

    def _history(self, state: State, ready: Ready, sample: Tensor, goes_on: bool) -> Tensor:
        history = state.history
        if not self._remembers:
            return sample.new_empty((ready.slots, *ready.shape))
        if goes_on and history is ready.history and history is not None:
            if state.shown:
                increment_version(history)
            return history
        shape = (ready.slots, *ready.shape)
        wide = torch.float64 if ready.dtype == torch.float64 else torch.float32
        fits = history is not None and history.shape == shape and history.dtype == wide
        if history is None or not fits or history.device != ready.device:
            if goes_on:
                was = None if history is None else tuple(history.shape[1:])
                raise ValueError(
                    f"{type(self).__name__} is in the middle of samples of shape {was}, got "
                    f"{tuple(ready.shape)} in {ready.dtype} on {ready.device}: call set_timesteps "
                    "to start new ones"
                )
            history = torch.empty(shape, dtype=wide, device=ready.device)
        state.history = ready.history = history
        if state.shown:
            increment_version(history)
        return history

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
        state = self._state()
        index = self._index(timestep, state)
        self.is_scale_input_called = True
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
        if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
            places = self._state().places
            missing = len(self.timesteps) - 1 if self._missing_is_last else -1
            told = (timesteps if timesteps.dim() == 1 else timesteps.reshape(-1)).tolist()
            if len(told) == 1:
                return places.get(told[0], missing)
            return torch.tensor([places.get(value, missing) for value in told], device=device)
        return _places(timesteps.to(device), self.timesteps.to(device), self._missing_is_last)

    def _noised(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As the library's: samples with the noise of their timesteps (B,)."""
        if torch.is_grad_enabled() and noise.requires_grad:
            raise RuntimeError(
                f"no gradient passes to the noise in add_noise of mmfast's {type(self).__name__}: "
                "call it under torch.no_grad(), or take the patch back"
            )
        device, dtype = original_samples.device, original_samples.dtype
        state = self._state()
        found = state.noisy.get(device)
        if found is None:
            table = noising(list(self._noisy_points())).to(device)
            found = table, list(torch.arange(len(table), device=device).unbind())
            state.noisy[device] = found
        table, numbers = found
        index = self._noisy_index(timesteps, device)
        if not isinstance(index, Tensor):
            if index < 0:
                raise IndexError(f"timestep {timesteps} is none of the scheduler's timesteps")
            index = numbers[index]
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
