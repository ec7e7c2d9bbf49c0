"""Calls whose bytes come from memory: each works on another copy of its arguments, of which there
are so many that no cache has the one whose turn it is, nor where its result goes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.modules import Step

# Ops that are held to the time of the bytes they move.
OPS = (
    "add_noise",
    "fsq_step",
    "gated_residual_modulate",
    "gated_residual_modulate_bwd",
    "lfq_signs_step",
    "qk_norm_rope",
    "qk_norm_rope_bwd",
    "sampler_step",
)
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 10, "M": 20, "G": 30}  # powers of two
_USUAL = 32 << 20  # bytes of a last cache of which nothing is known
_TIMES = 2  # as much as it holds
_MOST = 1 << 30  # bytes of all copies

Arguments = tuple[Any, ...]


def last_cache() -> int:
    """Bytes of the processor's largest cache."""
    sizes = [_USUAL]
    with contextlib.suppress(OSError, ValueError, KeyError):
        texts = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
        sizes = [int(text[:-1]) << _UNITS[text[-1]] for text in texts] or sizes
    return max(sizes)


def copies(arguments: Arguments) -> list[Arguments]:
    """``arguments``, and as many copies as it takes; what shares memory there does in each."""
    bytes_ = sum(t.untyped_storage().nbytes() for t in _tensors(arguments))
    wanted = min(_TIMES * last_cache(), _MOST - bytes_)
    more = math.ceil(wanted / max(bytes_, 1))
    return [arguments, *(copy.deepcopy(arguments) for _ in range(more))]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """One of each memory."""
    found: dict[int, Tensor] = {}
    for value in values:
        inside = [value] if isinstance(value, Tensor) else []
        if isinstance(value, (list, tuple)):
            inside = _tensors(value)
        for tensor in inside:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return list(found.values())


def in_turns(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One that makes a call of another of ``calls`` each time, and keeps what it returned until
    that one's next turn."""
    if len(calls) == 1:
        return calls[0]
    steps = [call.step if isinstance(call, Step) else call for call in calls]
    kept: list[Any] = [None] * len(calls)
    at = 0

    def run() -> Any:
        nonlocal at
        at = (at + 1) % len(steps)
        kept[at] = steps[at]()
        return kept[at]

    if not isinstance(calls[0], Step):
        return run

    def reset() -> None:
        for call in calls:
            if isinstance(call, Step):
                call.reset()

    return Step(reset, run, calls[0].parts)
