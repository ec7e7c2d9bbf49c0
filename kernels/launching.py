"""Launches of kernels that are launched again and again with arguments of the same kind.

Triton binds all arguments of a launch in Python, and looks at each, which takes longer than the
launch itself. Here what it compiled is remembered by all that it compiles for: constants, dtypes,
which tensors are absent and which begin at a multiple of 16 bytes, and the values of integers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from mmfast.kernels.common import interpreting

_HALF = 1 << 31
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, on the current device and stream.

    Args:
        kernel: a JITFunction whose compile-time arguments are its last.
        args: tensors, None, integers and floats: all but the compile-time arguments.
        constants: these, and options of the launch.
    """
    if interpreting() or _watched(kernel):
        kernel[grid](*args, **constants)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    kinds: list[Any] = [kernel, driver, device, *constants.values()]
    given: list[Any] = []
    for a, plain in zip(args, _plain(kernel), strict=True):
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
                return
        given.append(a)
    key = tuple(kinds)
    known = _compiled.get(key)
    if known is None:
        made = kernel[grid](*args, **constants)
        # On AMD Triton also asks how large tensors are; what was only compiled has no function.
        if getattr(made, "function", None) is not None and torch.version.hip is None:
            last = kernel.arg_names[len(args) :]
            _compiled[key] = made, tuple(constants[name] for name in last)
        return
    made, last = known
    made.run(
        grid[0],
        grid[1] if len(grid) > 1 else 1,
        grid[2] if len(grid) > 2 else 1,
        driver.get_current_stream(device),
        made.function,
        made.packed_metadata,
        None,
        None,
        None,
        *given,
        *last,
    )


def place() -> Any:
    """What launches go to: what they need there may be kept."""
    return None if interpreting() else triton.runtime.driver.active.get_current_device()


@functools.cache
def _plain(kernel: Any) -> tuple[bool, ...]:
    """Of each argument that is none of compile time, whether Triton looks at no value of it.

    Raises:
        ValueError: another follows one of compile time, or is said to be aligned otherwise.
    """
    params = kernel.params
    count = sum(not p.is_constexpr for p in params)
    if any(p.is_constexpr or p.do_not_specialize_on_alignment for p in params[:count]):
        raise ValueError(f"{kernel.__name__} must have its compile-time arguments last")
    return tuple(bool(p.do_not_specialize) for p in params[:count])


def _watched(kernel: Any) -> bool:
    """Whether somebody is to be told of launches, by Triton."""
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks) or any(h is not None and h.calls for h in hooks)
