"""Where the time of a training step goes: by marks within it, or by the ops that it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

PRODUCTS, ATTENTION, NORMS, ACTIVATION, BLOCKS, OTHER = (
    "linear layers",
    "attention",
    "norms, modulation",
    "activation",
    "whole blocks",
    "other",
)
_STEPS = 3  # that are profiled
_TRACKED = "GeneratedBackwardFor_mmfast_"
_LINEAR = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "linear_backward")
# A transformer's plain products and sums outside of linear layers are those of its modulation.
_ELEMENTWISE = ("mul", "mul_", "add", "add_", "addcmul", "sum", "neg", "div")


class Marks:
    """Seconds by part: each call ends one that began at the call before.

    Parts may come again, as they do in the backward.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each part over the steps."""
    parts = dict.fromkeys(part for step in steps for part in step)
    return {part: statistics.median(step.get(part, 0.0) for step in steps) for part in parts}


def kind(op: str) -> str:
    """What an op of a transformer, such as ``aten::mm``, belongs to."""
    space, _, name = op.partition("::")
    if space.startswith(_TRACKED) and space.endswith("_default"):  # an op of ours under autograd
        name = space.removeprefix(_TRACKED)
    if "dit_block" in name:
        return BLOCKS  # where an op makes all of a block but its modulation
    if "attention" in name:
        return ATTENTION
    if name in _LINEAR or "gemm" in name or name.startswith(("linear", "_linear")):
        return PRODUCTS
    if any(part in name for part in ("norm", "modulate", "gated_residual")):
        return NORMS
    if any(part in name for part in ("gelu", "silu")):
        return ACTIVATION
    return NORMS if space == "aten" and name in _ELEMENTWISE else OTHER


def profiled(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by what the ops of ``run``, already warm, belong to, where there are any; what is
    outside of ops, Python and autograd and the profiler itself, is with the others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begin = time.perf_counter()
        for _ in range(_STEPS):
            run()
        whole = (time.perf_counter() - begin) / _STEPS
    seconds = dict.fromkeys((PRODUCTS, ATTENTION, NORMS, ACTIVATION, BLOCKS), 0.0)
    for event in profile.key_averages():
        part = kind(event.key)
        if part in seconds:
            seconds[part] += event.self_cpu_time_total / 1e6 / _STEPS
    found = {part: spent for part, spent in seconds.items() if spent > 0}
    return {**found, OTHER: max(0.0, whole - sum(found.values()))}
