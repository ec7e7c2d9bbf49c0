"""What all patched schedulers share: a table instead of arithmetic, and a counter on the host.

:class:`Tabled` goes before a scheduler's own class among the bases. Configuration, timesteps and
sigmas stay the library's; a step is one :func:`mmfast.sampler_step` with the row of its index.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from mmfast import backends, library, philox
from mmfast.checks import check_beside, check_floating
from mmfast.integrations.diffusers.handover import HandedOver
from mmfast.integrations.diffusers.state import Index, Made, Ready, State
from mmfast.integrations.diffusers.tables.program import Options, Program
from mmfast.memory import empty_like, new_empty
from mmfast.ops.dynamic_threshold import dynamic_threshold
from mmfast.ops.sampler_step import DIRECT, OP, _values, reference


class Tabled(HandedOver):
    """The steps of a scheduler, by a table."""

    _philox: int | Tensor | None = None

    def use_philox(self, seed: int | Tensor | None) -> None:
        """Draw the noise of steps without a generator in the kernel, from this seed.

        The noise of a step is that of :func:`mmfast.randn` with its index among the timesteps as
        offset, the same on every device. By default, and again after ``use_philox(None)``, it
        comes from torch's global generator.

        Args:
            seed: an int, or an int64 tensor on the samples' device, with one per sample.
        """
        self._philox = seed

    def _thresholded(self) -> bool:
        return bool(self.config.get("thresholding"))

    def _given(self, values: list[Tensor]) -> None:
        """A history of ``values`` was set before a run."""

    def _result(self, sample: torch.dtype, model_output: torch.dtype) -> torch.dtype:
        """What the next sample is in, of what the last one and the model's output are in."""
        return model_output if self._of_output else torch.promote_types(sample, model_output)

    def _steps_made(self) -> int:
        state = vars(self)["_tabled"]
        return min(state.next - state.begin, self._highest())

    def _highest(self) -> int:
        """At most so many earlier steps are counted."""
        return int(self.config.solver_order)

    def _pushed(self) -> list[int] | None:
        """Slots of what the last steps pushed, oldest first; None with nothing to go on with."""
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
        return [k % ring for k in range(max(0, made - ring), made)]

    def _past(self) -> list[Tensor] | None:
        """What the last steps pushed, oldest first; None while there is nothing to go on with."""
        slots = self._pushed()
        return None if slots is None else [vars(self)["_tabled"].slot(s) for s in slots]

    def _pushes(self, made: int) -> int:
        """How many values so many steps have pushed."""
        return made

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
        has = self.__dict__
        state: State | None = has.get("_tabled")
        if state is None or not state.holds(has):
            state = self._renew()
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
            program, goes_on = self._begin(state, index, options, sample, goes_on)
        ready = state.ready
        if ready is None or not ready.suits(sample, model_output):
            check_floating("sample", sample)
            _check_like("model_output", model_output, sample)
            ready = state.ready = Ready(self, state, program, sample, model_output)
            state.dtype = sample.dtype
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
            entry = ready.rows[row]
            if entry is None:
                reason = program.refused[row]  # type: ignore[index]
                raise ValueError(f"no step from timestep {timestep}: {reason}")
            step, draws, two = entry
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
        out = empty_like(sample, ready.out)
        second = None
        if two:
            second = empty_like(sample, ready.second)
        threshold = None
        if ready.threshold is not None:
            ratio, maximum = ready.threshold
            threshold = dynamic_threshold(
                sample, model_output, ready.table, step, ratio=ratio, maximum=maximum
            )
        # The public function's checks were made above.
        call = DIRECT if backends.forced() is None and not is_compiling() else _call
        if library.tracked(sample, model_output, noise, variance, threshold, history):
            call = reference
        elif history is not None and history.requires_grad:
            call = _within_graph
        call(
            sample, model_output, None, 1.0, None, ready.table, step, noise, seed, variance,
            threshold, out, history, second, None,
        )  # fmt: skip
        if self._leaves:
            self._called(state, index, (sample, model_output, out, noise))
        self._advance(index)
        state.next = index + 1 if counted else self.__dict__.get("_step_index", -1)
        if second is None:
            second = out
            if program.output is not None:
                assert history is not None
                second = history[program.output]
        return self._returned(ready, out, second, return_dict)

    def _begin(
        self, state: State, index: Index, options: Options, sample: Tensor, goes_on: bool
    ) -> tuple[Program, bool]:
        """The program for a step that the one in use has not, and whether the run goes on."""
        if goes_on:  # with other options
            self._hand_back()
            state.next = -1
        lost = self._remembers and isinstance(index, int) and state.next == -1
        if lost and self._take_over(state, index, options, sample):  # type: ignore[arg-type]
            assert state.program is not None
            return state.program, True
        return state.enter(self, index, options), False

    @staticmethod
    def _returned(ready: Ready, out: Tensor, second: Tensor, return_dict: bool) -> Any:
        values = (out,) if ready.outputs == 1 else (out, second)
        return made(ready.kind, ready.fields, values) if return_dict else values

    def _called(self, state: State, index: Index, call: Made) -> None:
        """Remember of a call what is to be shown."""

    def _history(self, state: State, ready: Ready, sample: Tensor, goes_on: bool) -> Tensor:
        history = state.history
        if not self._remembers:
            return new_empty(sample, (ready.slots, *ready.shape))
        if goes_on and history is ready.history and history is not None and not state.resized:
            if state.shown:
                increment_version(history)
            return history
        shape = (ready.slots, *ready.shape)
        wide = torch.float64 if ready.dtype == torch.float64 else torch.float32
        if goes_on and state.resized and history is not None and history.device == ready.device:
            history = self._resized(state, sample)
        if goes_on and history is not None:
            history = history.to(wide)  # outputs in float64 made the sample that too
        fits = history is not None and history.shape == shape and history.dtype == wide
        if fits and history.requires_grad and not goes_on:  # type: ignore[union-attr]
            fits = False  # it is part of the graph of the steps before
        if history is None or not fits or history.device != ready.device:
            if goes_on:
                was = None if history is None else tuple(history.shape[1:])
                raise ValueError(
                    f"{type(self).__name__} is in the middle of samples of shape {was}, got "
                    f"{tuple(ready.shape)} in {ready.dtype} on {ready.device}: call set_timesteps "
                    "to start new ones"
                )
            history = new_empty(sample, shape, wide)
        state.history = ready.history = history
        if state.shown:
            increment_version(history)
        return history

    def _looked_at(self, state: State) -> Iterable[int]:
        """Slots after the ring of which the next step goes on."""
        assert state.program is not None
        return [state.program.ring] if state.program.factors else []

    def _resized(self, state: State, sample: Tensor) -> Tensor:
        """The history of values in another shape, which must all be the sample's."""
        assert state.program is not None
        assert state.history is not None
        slots = {*(self._pushed() or ()), *self._looked_at(state)}
        shapes = {tuple(state.slot(slot).shape) for slot in slots}
        if shapes != {tuple(sample.shape)}:
            raise ValueError(
                f"{type(self).__name__} is in the middle of samples and remembers tensors of "
                f"{', '.join(map(str, sorted(shapes)))}, got a sample of {tuple(sample.shape)}: "
                "they must all have its shape"
            )
        made = state.history.new_zeros((len(state.history), *sample.shape))
        for slot in slots:
            made[slot] = state.slot(slot)
        state.resized.clear()
        return made

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


_call = functools.partial(backends.call_on_new, OP)


def _within_graph(*args: Any) -> None:
    """A step without gradients, of a history that is part of a graph: what it forgets leaves it."""
    history = args[12]
    given: list[Any] = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    given[12] = made = history.detach().clone()
    reference(*given)
    for s, stays in enumerate(_values(*args).stays):
        with torch.enable_grad():
            history[s].copy_(torch.where(stays, history[s], made[s]))


def _check_like(name: str, tensor: Tensor, sample: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.shape != sample.shape:
        raise ValueError(f"{name} must have shape {tuple(sample.shape)}, got {tuple(tensor.shape)}")
    check_beside("the sample", sample.device, name, tensor)


def made(kind: Any, names: Iterable[str], values: Iterable[Tensor]) -> Any:
    """An output of the library, without looking for its fields in the class each time."""
    output = kind.__new__(kind)
    fields = dict(zip(names, values, strict=False))
    output.__dict__.update(fields)
    OrderedDict.update(output, fields)
    return output
