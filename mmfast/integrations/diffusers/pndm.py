"""PNDM and IPNDM, whose programs also run out of order."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from mmfast.integrations.diffusers.families import Cumulative, Output, SetFirst, check_set
from mmfast.integrations.diffusers.history import History, Kept
from mmfast.integrations.diffusers.state import Index, State
from mmfast.integrations.diffusers.tabled import Tabled
from mmfast.integrations.diffusers.tables import timesteps


class Fixed(Tabled):
    """Those whose coefficients do not depend on where the history is from.

    Programs give them one, call steps at timesteps that do not follow one another, or run twice
    without an end between. No table has these runs; they are the library's own arithmetic.
    """

    _by_library = False
    _besides: ClassVar[tuple[str, ...]] = ()  # attributes, of the slots after the ring

    def _given(self, values: list[Tensor]) -> None:
        self._by_library = self._by_library or bool(values)

    def _prepare(self) -> State:
        self._by_library = bool(vars(self).get("ets"))  # those of a run that was the library's
        return super()._prepare()

    def _hand_back(self) -> None:
        if not self._by_library:
            self._leave()

    def _leave(self) -> None:
        """Go on with the library's arithmetic, until timesteps are set."""
        slots, kept = self._pushed(), {name: getattr(self, name) for name in self._besides}
        if slots is not None:
            vars(self).update(kept, ets=[vars(self)["_tabled"].copied(slot) for slot in slots])
        self._forget()
        self._by_library = True


class PNDM(Fixed, Cumulative):
    _program = staticmethod(timesteps.pndm)
    _outputs = (SchedulerOutput, 1)
    _besides = ("cur_sample", "cur_model_output")

    ets = History("ets")
    cur_sample = Kept("cur_sample")
    cur_model_output = Kept("cur_model_output", 0)
    counter: int  # of the library
    _first: Any = 0  # the index of its first call

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        if not self._by_library and not self._follows(timestep):
            self._leave()
        if self._by_library:
            step = super().step_prk if self._starting() else super().step_plms  # type: ignore[misc]
            return step(model_output, timestep, sample, return_dict=return_dict)
        return self._run(model_output, timestep, sample, return_dict)

    def _slot(self, name: str) -> int | None:
        """Where it is; None while there is nothing."""
        state: State = vars(self)["_tabled"]
        first, total = state.program.ring, state.program.ring + 1  # type: ignore[union-attr]
        if name == "cur_model_output":
            return total if self.counter % 4 and self._starting() else None
        return first if self.counter == 1 or not self.config.skip_prk_steps else None

    def _looked_at(self, state: State) -> list[int]:
        starting = bool(self.counter % 4 and self._starting())
        first = starting or (self.counter == 1 and self.config.skip_prk_steps)
        ring = state.program.ring  # type: ignore[union-attr]
        return [ring] * first + [ring + 1] * starting

    def _kept(self, name: str) -> Tensor | None:
        slot, state = self._slot(name), vars(self)["_tabled"]
        return None if slot is None else state.copied(slot)

    def _keep(self, name: str, value: Tensor) -> None:
        vars(self)["_tabled"].write(self._slot(name), value)

    def _starting(self) -> bool:
        """Whether the next call is one of the Runge-Kutta steps."""
        return not self.config.skip_prk_steps and self.counter < len(self.prk_timesteps)  # type: ignore[attr-defined]

    def step_prk(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        check_set(self)
        if not self._by_library and self._starting():
            return self.step(model_output, timestep, sample, return_dict)
        if not self._by_library:
            self._leave()
        return super().step_prk(model_output, timestep, sample, return_dict)  # type: ignore[misc]

    def step_plms(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        check_set(self)
        if not self._by_library and not self._starting():
            return self.step(model_output, timestep, sample, return_dict)
        if not self._by_library:
            self._leave()
        return super().step_plms(model_output, timestep, sample, return_dict)  # type: ignore[misc]

    def _follows(self, timestep: Any) -> bool:
        """Whether the timestep is that of the next row. Elsewhere than on the CPU it is trusted."""
        check_set(self)
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


class IPNDM(Fixed, SetFirst):
    _program = staticmethod(timesteps.ipndm)
    _outputs = (SchedulerOutput, 1)
    _levels = ("betas",)

    ets = History("ets")

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """As the library's, by a table."""
        if not self._by_library:
            check_set(self)
            state = self._state()
            index, following = self._index(timestep, state), state.next
            if type(index) is type(following) is int and index != following and self._past():
                self._leave()
        if self._by_library:
            return super().step(model_output, timestep, sample, return_dict)  # type: ignore[misc]
        return self._run(model_output, timestep, sample, return_dict)
