"""The library's attributes of a scheduler's memory, as views of its history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


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
