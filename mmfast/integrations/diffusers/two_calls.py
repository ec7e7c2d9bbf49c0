"""Schedulers that call the model twice a step, and what they show between the calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mmfast.integrations.diffusers.state import Index, Made, State
from mmfast.integrations.diffusers.tabled import Tabled
from mmfast.integrations.diffusers.tables.program import Options, Program


class Call(NamedTuple):
    """The first of two calls, while the second is to come.

    Attributes:
        at: the index of its timestep.
        sample: that it started from.
        model_output: what it was given.
        out: the sample that the second is called with.
        sigmas: of the schedule, as they were then.
        options: of the step.
    """

    at: Index
    sample: Tensor
    model_output: Tensor
    out: Tensor
    sigmas: Sequence[float]
    options: Options


class Between:
    """An attribute of the library that the first call sets for the second.

    It is made when it is read; one that is set is what the second call goes on with.

    Args:
        name: the attribute.
        fixed: whether the table has it, so that it cannot be set to anything else.
    """

    def __init__(self, name: str, fixed: bool = False) -> None:
        self.name = name
        self.fixed = fixed

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        has = vars(scheduler)
        state: State | None = has.get("_tabled")
        if state is not None and state.runs():
            call = state.left
            return None if call is None else scheduler._left(self.name, call)
        try:
            return has[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, scheduler: Any, value: Any) -> None:
        has = vars(scheduler)
        state: State | None = has.get("_tabled")
        if state is not None and state.runs():
            if self.fixed and value is not None:
                has_now = self.__get__(scheduler)
                if value == has_now:
                    return
                raise ValueError(
                    f"{self.name} is that of the sigmas, {has_now}, got {value}: change the sigmas"
                )
            if value is None:
                has.update(dict.fromkeys(scheduler._between))
            else:
                scheduler._hand_back()
            scheduler._forget()
        has[self.name] = value


class TwoCalls(Tabled):
    """Those that call the model twice a step."""

    _twice = _leaves = True
    _between: ClassVar[tuple[str, ...]] = ("sample",)

    sample = Between("sample")

    def _left(self, name: str, call: Call) -> Any:
        """The value of an attribute after the first of two calls."""
        assert name == "sample"
        return call.sample

    def _called(self, state: State, index: Index, call: Made) -> None:
        between = state.left is not None
        if isinstance(index, int):
            between = (index - state.begin) % 2 == 1
        if between:
            state.left = None
        else:
            state.left = Call(index, *call[:3], state.key[1], state.options)

    def _recalled(self) -> tuple[int, Sequence[Tensor | None]]:
        return 0 if vars(self).get("sample") is None else 1, []

    def _recalled_kept(self, program: Program, row: int) -> list[Tensor | None]:
        return [vars(self)["sample"]]

    def _cleared(self) -> None:
        vars(self).update(dict.fromkeys(self._between))

    def _handed(self, made: int, pushed: list[Tensor], kept: list[Tensor]) -> None:
        call = vars(self)["_tabled"].left
        if call is not None:
            vars(self).update({name: self._left(name, call) for name in self._between})


class Trapezoidal(TwoCalls):
    """Those whose first call leaves its slope for the second."""

    _between = ("sample", "dt", "prev_derivative")

    dt = Between("dt", fixed=True)
    prev_derivative = Between("prev_derivative")

    def _recalled_kept(self, program: Program, row: int) -> list[Tensor | None]:
        has = vars(self)
        return [has["sample"] + has["dt"] / 2 * has["prev_derivative"]]

    def _left(self, name: str, call: Call) -> Any:
        if name == "dt":
            return torch.tensor(self._length(call), dtype=self.sigmas.dtype)  # type: ignore[attr-defined]
        return self._slope(call) if name == "prev_derivative" else super()._left(name, call)

    def _slope(self, call: Call) -> Tensor:
        """Of the first call."""
        raise NotImplementedError

    def _length(self, call: Call) -> float:
        """Of the step."""
        index = int(call.at)
        return call.sigmas[index + 1] - call.sigmas[index]

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of two."""
        index = self._step_index
        return index is None or index % 2 == 0
