"""The memory that a call needs at its peak, its outputs included."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which ``call``, already warm, raises the memory in use; None if nobody can tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    try:
        # Freed memory that the allocator keeps would hide what is taken from it.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    result = call()
    after = _resident("VmHWM")
    del result
    return max(0, after - before)


def _resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
