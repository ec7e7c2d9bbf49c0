"""What the launch functions share."""

from __future__ import annotations

import functools
import os

import torch


def interpreting() -> bool:
    """Whether Triton interprets kernels, on CPU tensors. Fixed when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(device: torch.device, each: int = 2) -> int:
    """Programs of a persistent grid: ``each`` per multiprocessor."""
    if device.type != "cuda":
        return 2
    index = torch.cuda.current_device() if device.index is None else device.index
    return each * _multiprocessors(index)
