"""Where in its schedule a scheduler is, without asking the device."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mmfast.integrations.diffusers.state import Index, State


class Placed:
    """The state of a scheduler, and the index of a timestep in it."""

    _program: ClassVar[Any]  # (scheduler, begin, options) to Program
    _levels: ClassVar[tuple[str, ...]] = ("sigmas",)  # what tables are made from, and timesteps
    _missing_is_last: ClassVar[bool] = False  # an unknown timestep counts as the last one
    _outputs: ClassVar[tuple[type, int]]  # type, and how many tensors
    _of_output: ClassVar[bool] = False  # the result has the dtype of the model's output
    _wide: ClassVar[bool] = False  # the prediction is float32 at least
    _single: ClassVar[torch.dtype] = torch.float32  # of noise that is drawn in it for any sample
    _scaled: ClassVar[bool] = False  # scale_model_input does something
    _whole: ClassVar[bool] = True  # integers are timesteps
    _remembers: ClassVar[bool] = True  # steps depend on those before them
    _leaves: ClassVar[bool] = False  # what a call is given is shown after it
    _twice: ClassVar[bool] = False  # two calls a step, and of equal timesteps the second is meant

    # Attributes of the library's own classes.
    config: Any
    timesteps: Any
    _step_index: Any
    _begin_index: Any

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
        return state if state is not None and state.holds(has) else self._renew()

    def _renew(self) -> State:
        """Read them again, for a run that may be under way."""
        self._hand_back()
        return self._prepare()

    def _hand_back(self) -> None:
        """What steps remember, as the library does."""

    def _forget(self) -> None:
        state = vars(self).get("_tabled")
        if state is not None:
            state.next = -1

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
        index = find(timestep.reshape(1), own, self._missing_is_last)[0]
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


def _storage(tensor: Tensor) -> int:
    """Which memory it is in, for tensors on the meta device, which have no addresses."""
    return tensor.untyped_storage()._cdata


def find(timesteps: Tensor, own: Tensor, missing_is_last: bool) -> Tensor:
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
