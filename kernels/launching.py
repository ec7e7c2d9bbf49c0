"""Launches of kernels that are launched again and again with arguments of the same kind.

Triton binds all arguments of a launch in Python, and looks at each, which takes longer than the
launch itself. Here what it compiled is remembered by all that it compiles for: constants, dtypes,
which tensors are absent and which begin at a multiple of 16 bytes, and whether an integer is 1, a
multiple of 16 or beyond 32 bits. :class:`Repeated` keeps a whole launch. What Triton is told to
compile otherwise (``knobs.runtime.debug``, instrumentation, hooks of its stages) is seen by kernels
that have not been launched before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from mmfast.kernels.common import interpreting

_HALF = 1 << 31
_driver = triton.runtime.driver
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
# Of each kernel's function, for a kernel's own hash is one of its source.
_plain: dict[Any, tuple[bool, ...]] = {}


def launch(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> Any:
    """``kernel[grid](*args, **constants)``, on the current device and stream.

    Args:
        kernel: a JITFunction whose compile-time arguments are its last.
        args: tensors, None, integers and floats: all but the compile-time arguments.
        constants: these, and options of the launch.

    Returns:
        What Triton compiled, with the values of the compile-time arguments, if that is remembered.
    """
    if interpreting() or _watched(kernel):
        kernel[grid](*args, **constants)
        return None
    driver = _driver.active
    device = driver.get_current_device()
    kinds: list[Any] = [kernel.fn, driver, device, *constants, *constants.values()]
    given: list[Any] = []
    for a, plain in zip(args, _plain.get(kernel.fn) or _look_at(kernel), strict=True):
        kind = type(a)
        if kind is int:
            # Of one that is not looked at, only whether it fits 32 bits.
            value = 0 if plain else 1 if a == 1 else 16 if a % 16 == 0 else 0
            kinds.append(value if -_HALF <= a < _HALF else value + 2)
        elif kind is Tensor or kind is Parameter:
            dtype, a = a.dtype, a.data_ptr()
            kinds.append((dtype,) if a % 16 else dtype)
        else:
            kinds.append(kind)
            if not (a is None or kind is float):
                kernel[grid](*args, **constants)
                return None
        given.append(a)
    key = tuple(kinds)
    known = _compiled.get(key)
    if known is None:
        made = kernel[grid](*args, **constants)
        # On AMD Triton also asks how large tensors are; what was only compiled has no function.
        if getattr(made, "function", None) is not None and torch.version.hip is None:
            last = kernel.arg_names[len(args) :]
            known = _compiled[key] = made, tuple(constants[name] for name in last)
        return known
    made, last = known
    stream = driver.get_current_stream(device)
    _run(made, _three(grid), stream, given, last)
    return known


class Repeated:
    """Launches of one kernel on one device that differ in nothing but where their tensors lie, and
    in the values of floats. The caller sees to it that an argument is always a tensor of the same
    dtype, always a float or always None.

    Args:
        kernel: as of :func:`launch`.
        numbers: its integers, all behind the tensors and floats.
        constants: its compile-time arguments, and options of the launch.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[int],
        constants: Mapping[str, Any],
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, _three(grid), tuple(numbers)
        self._constants = dict(constants)
        # Where tensors begin at a multiple of 16 bytes: the driver, its device, what Triton
        # compiled, all arguments behind the tensors, and where tensors are among those before.
        self._known: tuple[Any, Any, Any, tuple[Any, ...], list[int]] | None = None

    def __call__(self, *args: Any) -> None:
        """Launch it on these tensors, floats and Nones."""
        known = self._known
        if known is not None and known[0] is _driver.active and not _watched(self._kernel):
            driver, device, made, rest, tensors = known
            given, begins = list(args), 0  # bits of all addresses
            for i in tensors:
                begin = given[i].data_ptr()
                begins |= begin
                given[i] = begin
            if not begins % 16:
                _run(made, self._grid, driver.get_current_stream(device), given, rest)
                return
        found = launch(self._kernel, self._grid, *args, *self._numbers, **self._constants)
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        if found is not None and not any(args[i].data_ptr() % 16 for i in tensors):
            driver = _driver.active
            made, last = found
            rest = (*self._numbers, *last)
            self._known = driver, driver.get_current_device(), made, rest, tensors


def place() -> Any:
    """What launches go to: what they need there may be kept."""
    return None if interpreting() else _driver.active.get_current_device()


def _three(grid: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def _run(made: Any, grid: tuple[int, int, int], stream: Any, given: Any, rest: Any) -> None:
    made.run(*grid, stream, made.function, made.packed_metadata, None, None, None, *given, *rest)


def _look_at(kernel: Any) -> tuple[bool, ...]:
    """Of each argument that is none of compile time, whether Triton looks at no value of it.

    Raises:
        ValueError: another follows one of compile time, or is said to be aligned otherwise.
    """
    params = kernel.params
    count = sum(not p.is_constexpr for p in params)
    if any(p.is_constexpr or p.do_not_specialize_on_alignment for p in params[:count]):
        raise ValueError(f"{kernel.__name__} must have its compile-time arguments last")
    _plain[kernel.fn] = tuple(bool(p.do_not_specialize) for p in params[:count])
    return _plain[kernel.fn]


def _watched(kernel: Any) -> bool:
    """Whether somebody is to be told of launches, by Triton."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        kernel.pre_run_hooks
        or (enter is not None and enter.calls)
        or (leave is not None and leave.calls)
    )
