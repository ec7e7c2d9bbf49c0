"""The library's attributes of a scheduler's memory, as views of its history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmfast.integrations.diffusers.state import State


class Remembered(list[Any]):
    """The memory of a scheduler, newest last: what is written to a place goes to the history."""

    def __init__(self, state: State, slots: Sequence[int | None]) -> None:
        super().__init__(None if slot is None else state.slot(slot) for slot in slots)
        self._state, self._slots = state, slots

    def __setitem__(self, place: Any, value: Any) -> None:
        slot = self._slots[place]
        if not isinstance(slot, int) or not isinstance(value, Tensor):
            raise ValueError("only a tensor can take the place of one in a scheduler's history")
        self._state.write(slot, value)
        super().__setitem__(place, self._state.slot(slot))


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
        past = scheduler._pushed()
        if past is None:
            try:
                return vars(scheduler)[self.name]
            except KeyError:
                raise AttributeError(self.name) from None
        state = vars(scheduler)["_tabled"]
        if self.length is None:
            return Remembered(state, past)
        size = len(vars(scheduler)[self.name])
        return Remembered(state, [*[None] * (size - len(past)), *past])

    def __set__(self, scheduler: Any, values: Sequence[Any]) -> None:
        past = scheduler._pushed()
        given = [value for value in values if value is not None]
        if past is not None and given:
            if len(given) > len(past):
                raise ValueError(f"{self.name} holds {len(past)} tensors here, got {len(given)}")
            state = vars(scheduler)["_tabled"]
            for slot, value in zip(reversed(past), reversed(given), strict=False):
                if value is not state.slot(slot):
                    state.write(slot, value)
            return
        scheduler._forget()
        vars(scheduler)[self.name] = values
        scheduler._given(given)


class LastSample:
    """``last_sample``, that the last step started from.

    Our history has a multiple of it, with what the step's noise adds.
    """

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        if scheduler._pushed() is None:
            return vars(scheduler)["last_sample"]
        state = vars(scheduler)["_tabled"]
        factor = self._factor(state)
        if not factor:
            return None
        return (state.slot(state.program.ring) - scheduler._noise_of_last(state)) / factor

    def __set__(self, scheduler: Any, value: Tensor | None) -> None:
        if scheduler._pushed() is None:
            vars(scheduler)["last_sample"] = value
            return
        state = vars(scheduler)["_tabled"]
        factor = self._factor(state)
        if value is None or not factor:
            raise ValueError(
                "last_sample is what the last step started from and can be replaced by a tensor "
                f"until the last step, got {'None' if value is None else 'a tensor after it'}; "
                "call set_timesteps to begin anew"
            )
        noise = scheduler._noise_of_last(state)
        if isinstance(noise, Tensor) and noise.shape != value.shape:
            raise ValueError(
                "last_sample must have the shape of last_noise, "
                f"{tuple(noise.shape)}, got {tuple(value.shape)}"
            )
        state.write(state.program.ring, value * factor + noise)

    @staticmethod
    def _factor(state: State) -> float:
        """By what the sample was multiplied; 0 before the first step and after the last."""
        assert state.program is not None
        assert isinstance(state.next, int)
        made = state.next - state.begin
        return state.program.factors[made - 1] if made else 0.0


class Kept:
    """An attribute of the library that steps keep besides: a copy of a slot of our history.

    Setting it to a tensor replaces that; what a run has not can only be set before one.
    """

    def __init__(self, name: str, default: Any = None) -> None:
        self.name = name
        self.default = default  # the library's, where there is nothing to keep

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        if scheduler._pushed() is None:
            try:
                return vars(scheduler)[self.name]
            except KeyError:
                raise AttributeError(self.name) from None
        kept = scheduler._kept(self.name)
        return self.default if kept is None else kept

    def __set__(self, scheduler: Any, value: Any) -> None:
        if scheduler._pushed() is None:
            vars(scheduler)[self.name] = value
            return
        has = scheduler._kept(self.name)
        if isinstance(value, Tensor) and has is not None:
            scheduler._keep(self.name, value)
        elif isinstance(value, Tensor) or has is not None or value != self.default:
            here = self.default if has is None else "a tensor"
            raise ValueError(
                f"{self.name} is {here} after these steps and stays one in the middle of a run: "
                "call set_timesteps to begin anew"
            )


class Count:
    """``lower_order_nums``: how many steps there are to look back on."""

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        past = scheduler._pushed()
        return vars(scheduler)["lower_order_nums"] if past is None else scheduler._steps_made()

    def __set__(self, scheduler: Any, value: int) -> None:
        if scheduler._pushed() is not None:
            if value == scheduler._steps_made():
                return
            if value:
                raise ValueError(
                    f"lower_order_nums is {scheduler._steps_made()} here and can be set to 0, "
                    f"which begins anew, got {value}"
                )
        scheduler._forget()
        vars(scheduler)["lower_order_nums"] = value


class Shown:
    """An attribute that a step leaves for the next one: made when it is read.

    What the next step does is in the table: it can be set before a run and not in one.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        if scheduler._pushed():
            return scheduler._shown(self.name)
        try:
            return vars(scheduler)[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, scheduler: Any, value: Any) -> None:
        if scheduler._pushed():
            raise ValueError(
                f"{self.name} is what the steps so far make it and cannot be set in the middle of "
                "a run: call set_timesteps to begin anew"
            )
        vars(scheduler)[self.name] = value
