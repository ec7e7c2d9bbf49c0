"""Parts of a program with settings of their own: that autocast or autograd leave alone, say.

Exported programs have a region for each. Those that return nothing cannot be read from a file, so
that there are none where nothing depends on them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Value = TypeVar("_Value")


@contextlib.contextmanager
def setting(
    get: Callable[[], _Value], put: Callable[[_Value], object], value: _Value
) -> Iterator[None]:
    """A setting of torch's has ``value`` inside the block, and what it had before behind it."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast for devices of this ``kind`` computes in; None where it is off, or there is
    none, as for ``meta``."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def without_autocast(kind: str) -> contextlib.AbstractContextManager[None]:
    """Leave autocast for devices of this ``kind``, where it is on."""
    if autocast_dtype(kind) is not None:
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()  # ``meta`` knows no other


def without_gradients(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``torch.no_grad()`` around a function that only changes what it is given, or buffers.

    While exporting, the tensors given are detached instead.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_exporting():
            detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
            named = {k: t.detach() if isinstance(t, torch.Tensor) else t for k, t in kwargs.items()}
            return function(*detached, **named)  # type: ignore[arg-type]
        with torch.no_grad():
            return function(*args, **kwargs)

    return run
