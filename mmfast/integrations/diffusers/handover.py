"""A run that goes on under another class or program: the library's memory, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.integrations.diffusers.noised import Noised
from mmfast.integrations.diffusers.state import State
from mmfast.integrations.diffusers.tables.program import Options, Program


class HandedOver(Noised):
    """Steps that were made by the library's class, and steps that it will make.

    The attributes of the library are read and written in ``vars``, where its own class has them.
    """

    def _recalled(self) -> tuple[int, Sequence[Tensor | None]]:
        """How many steps the library looks back on, and what they pushed, oldest first."""
        return 0, []

    def _recalled_kept(self, program: Program, row: int) -> list[Tensor | None]:
        """What it keeps besides, as the slots after the ring have it after a row."""
        return []

    def _cleared(self) -> None:
        """Empty what was recalled."""

    def _handed(self, made: int, pushed: list[Tensor], kept: list[Tensor]) -> None:
        """Write it after so many steps, from what they pushed and the slots after the ring."""

    def _pushed(self) -> list[int] | None:
        raise NotImplementedError

    def _take_over(self, state: State, index: int, options: Options, sample: Tensor) -> bool:
        """Go on at an index with what the library remembers; whether there was anything."""
        made, pushed = self._recalled()
        made = min(made, index)
        if not made:
            self._cleared()
            return False
        program = state.enter(self, index - made, options)
        ring = min(made, program.ring)
        values = [*pushed[len(pushed) - ring :], *self._recalled_kept(program, made - 1)]
        found = [value for value in values if value is not None]
        self._cleared()
        if len(found) < len(values) or len(pushed) < ring:
            return False
        slots = [k % program.ring for k in range(made - ring, made)]
        slots += range(program.ring, program.ring + len(found) - ring)
        if found:
            shape = (program.table.slots, *found[0].shape)
            wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
            state.history = found[0].new_zeros(shape, dtype=wide)
            for slot, value in zip(slots, found, strict=True):
                state.history[slot] = value
        state.next = index
        return True

    def _land(self) -> None:
        """Leave everything where the library's class goes on. May read a counter back."""
        state: State | None = vars(self).get("_tabled")
        if isinstance(vars(self).get("_step_index"), Tensor):
            self._step_index = int(self._step_index)
            if state is not None:
                state.next = self._step_index
        self._hand_back()

    def _hand_back(self) -> None:
        """Leave what our steps remember where the library's go on from it."""
        slots = self._pushed()
        if slots is None:
            return
        state: State = vars(self)["_tabled"]
        assert state.program is not None
        assert isinstance(state.next, int)
        made = state.next - state.begin
        after = range(state.program.ring, state.program.table.slots)
        if state.history is None:
            after = range(0)
        dtype = None if state.ready is None else state.ready.dtype
        pushed, kept = ([state.slot(s).to(dtype) for s in some] for some in (slots, after))
        if made > 0:
            self._handed(made, pushed, kept)


def filled(values: Sequence[Any], size: int) -> list[Any]:
    """The last of ``values`` at the end of a list of ``size``, behind None."""
    return [*[None] * (size - len(values)), *values[max(0, len(values) - size) :]]
