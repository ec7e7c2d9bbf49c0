"""What is known of a scheduler's timesteps and sigmas, and of its table in use."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmfast.integrations.diffusers.tables.program import Options, Program, host
from mmfast.schedule.table import row_numbers

_PROGRAMS = 8  # that a scheduler remembers: of other numbers of steps, begins and options

Index = int | Tensor
# Of a call: its sample, model output, result and noise.
Made = tuple[Tensor, Tensor, Tensor, Tensor | None]


class State:
    """What is known of a scheduler's timesteps and sigmas, and where its steps are.

    Attributes:
        program: the table in use, from index ``begin``.
        next: the index that goes on with the history; any other starts anew.
        history: (slots, B, ...), the memory of the steps.
    """

    def __init__(self, scheduler: Any, programs: dict[Any, Program]) -> None:
        self.timesteps = scheduler.timesteps
        self.made_from = {
            name: vars(scheduler).get(name) for name in ("timesteps", *scheduler._levels)
        }
        self.config = scheduler._internal_dict
        self.own = None if self.timesteps is None else (self.timesteps.dtype, self.timesteps.device)
        self.key = tuple(map(_numbers, self.made_from.values()))
        self.values = list(self.key[0])
        self.places: dict[float, int] = {}  # the library takes the second of equal ones
        seen: set[float] = set()
        for i, value in enumerate(self.values):
            if value not in self.places:
                self.places[value] = i
            elif value not in seen:
                self.places[value] = i
                seen.add(value)
        self.twice = scheduler._twice
        self.scales: list[float] | None = None
        self.programs = programs
        self.forgets = not scheduler._remembers
        self.program: Program | None = None
        self.options: Options = ()
        self.begin = 0
        self.next: Index = -1
        self.history: Tensor | None = None
        self.shown = False  # whether views of the history may be known outside
        self.resized: dict[int, Tensor] = {}  # what takes the place of slots, in another shape
        self.dtype: torch.dtype | None = None  # of the samples
        self.left: Any = None  # what the last call leaves to be shown
        self._look()

    def _look(self) -> None:
        """What depends on where tensors are, and is not the same for copies of them."""
        self.watched = [(name, it, *_watched(it)) for name, it in self.made_from.items()]
        self.addresses = _addresses(self.timesteps)
        if self.twice:
            self.addresses = {at: self.places[self.values[i]] for at, i in self.addresses.items()}
        self.noisy: dict[torch.device, tuple[Tensor, Tensor, list[Tensor]]] = {}
        self.coefficients: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}
        self.ready: Ready | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _LOOKED}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)
        self._look()

    def holds(self, has: dict[str, Any]) -> bool:
        """Whether a scheduler with these attributes is still as it was."""
        for name, values, watched, version in self.watched:
            if has.get(name) is not values or watched._version != version:
                return False
        return has["_internal_dict"] is self.config

    def runs(self) -> bool:
        """Whether steps have been made, and others may follow."""
        return type(self.next) is not int or self.next >= 0

    def slot(self, slot: int) -> Tensor:
        """What the history has in a slot."""
        assert self.history is not None
        found = self.resized.get(slot)
        return self.history[slot] if found is None else found

    def copied(self, slot: int) -> Tensor:
        """A copy of what the history has in a slot, in the dtype of the samples."""
        return self.slot(slot).to(self.dtype, copy=True)

    def write(self, slot: int, value: Tensor) -> None:
        """Put a value into a slot; one of another shape waits for samples of its shape."""
        assert self.history is not None
        place = self.history[slot]
        if value.shape == place.shape:
            self.resized.pop(slot, None)
            place.copy_(value)
        else:
            self.resized[slot] = value.to(place, copy=True)

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
        self.resized.clear()
        self.program, self.options, self.begin = program, options, begin
        return program

    def on(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """The table, each row at its index as noise is counted by that, and the rows' numbers."""
        found = self.coefficients.get(device)
        if found is None:
            assert self.program is not None
            rows = self.program.table.coefficients
            table = torch.cat((rows.new_zeros(self.begin, rows.shape[1]), rows)).to(device)
            found = table, row_numbers(len(table), device)[self.begin :]
            self.coefficients[device] = found
        return found


_LOOKED = {"watched", "addresses", "noisy", "coefficients", "ready"}

_UNWATCHED = torch.empty(0)  # nobody changes it


def _numbers(values: Tensor | None) -> tuple[float, ...]:
    """Those of a tensor, one and the same NaN for every NaN: such tuples can be equal."""
    if values is None:
        return ()
    return tuple(math.nan if math.isnan(value) else value for value in host(values))


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


class Ready:
    """What the steps of a program need for samples of one shape, dtype and device.

    Attributes:
        rows: the number of each row on the device, whether the step draws noise, whether its second
            output is a tensor of its own. None for those that are refused.
    """

    def __init__(
        self, scheduler: Any, state: State, program: Program, sample: Tensor, model_output: Tensor
    ) -> None:
        kind = type(scheduler)
        self.kind, self.outputs = kind._outputs
        self.fields = tuple(self.kind.__dataclass_fields__)
        self.shape, self.dtype, self.device = sample.shape, sample.dtype, sample.device
        self.output_dtype = model_output.dtype
        self.table, steps = state.on(self.device)
        self.draws = any(program.draws)
        two = self.outputs > 1 and program.output is None
        last = len(steps) - 1
        self.rows = [
            None
            if i in program.refused
            else (step, draws, two and not (i == last and program.final))
            for i, (step, draws) in enumerate(zip(steps, program.draws, strict=True))
        ]
        self.two = two
        result = self.dtype
        if self.output_dtype != result:
            result = scheduler._result(result, self.output_dtype)
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
    """What empty_like is told."""
    return None if dtype == wanted else wanted
