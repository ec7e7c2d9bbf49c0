"""The memory that a call needs at its peak, its outputs included."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import mmfast.memory
from benchmarks.timing import once


class Taken(NamedTuple):
    """What a call returned, its seconds, and the bytes by which it raised the memory in use; None
    if nobody can tell."""

    result: Any
    seconds: float
    memory: int | None


def watch(call: Callable[[], Any], device: torch.device) -> Taken:
    """Call once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds, result = once(call, device)
        return Taken(result, seconds, torch.cuda.max_memory_allocated(device) - before)
    can_tell = _reset_peak()
    before = _resident("VmRSS") if can_tell else 0
    seconds, result = once(call, device)
    return Taken(result, seconds, max(0, _resident("VmHWM") - before) if can_tell else None)


def _reset_peak() -> bool:
    """Whether the system has one."""
    if sys.platform != "linux":
        return False
    try:
        # Freed memory that an allocator keeps would hide what is taken from it.
        mmfast.memory.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return False
    return True


def _resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
