"""Times of contenders that take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.modules import Step

_SAMPLE = 5e-4  # seconds; shorter calls are repeated for so long, and divided
_SHORT = 0.02  # seconds; up to here shows what a call takes longer after those of others
_SETTLE = 0.01  # seconds
_MIN_ROUNDS = 3
_TINY = 1e-3  # seconds; rounds of such calls cost little, and there are more
_MIN_TINY_ROUNDS = 7
_LONG = 4.0  # of a time limit; who needs longer for two rounds has no third
SLOW = 1.0  # seconds; a call that takes longer is timed once
_MAX_ROUNDS = 40
_FLUSH = 1 << 28  # bytes; more than any GPU's L2 cache


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def once(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    call = _ready(call)
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def _ready(call: Callable[[], Any]) -> Callable[[], Any]:
    """What is timed of ``call``, after what is not."""
    if not isinstance(call, Step):
        return call
    call.reset()
    return call.step


def synchronize(device: torch.device) -> None:
    """Wait for ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    slow: float = SLOW,
) -> dict[str, Timing]:
    """Time ``calls``, already warm, in rounds of one sample each for about ``seconds``.

    Those that take longer than ``slow`` take part in no round: their first call is their sample.
    """
    sampler = _cuda_sampler(device) if device.type == "cuda" else _cpu_sample
    repeats, single, longest = {}, {}, 0.0
    for name, call in calls.items():
        taken = once(call, device)[0]
        if taken > slow:
            single[name] = Timing(taken, taken, taken, 1)
            continue
        if taken < _SHORT:
            taken = min(taken, *(once(call, device)[0] for _ in range(2)))
        longest = max(longest, taken)
        repeats[name] = max(1, min(10000, round(_SAMPLE / max(taken, 1e-7))))
    names = list(repeats)
    samples: dict[str, list[float]] = {name: [] for name in names}
    least = _MIN_TINY_ROUNDS if longest < _TINY else _MIN_ROUNDS
    start = time.perf_counter()
    with _no_garbage_collection():
        for done in range(_MAX_ROUNDS if names else 0):
            taken = time.perf_counter() - start
            if taken > seconds and done >= (least if taken < _LONG * seconds else 2):
                break
            names = names[1:] + names[:1]
            for name in names:
                samples[name].append(sampler(calls[name], repeats[name]))
    return single | {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def _cpu_sample(call: Callable[[], Any], repeats: int) -> float:
    # The threads of the contender before spin for a while, and would take this one's cores.
    time.sleep(_SETTLE)
    taken = _seconds(call, 1)
    # Shorter ones wait for threads to wake up, and for what the contender before had in the caches:
    # whoever is repeated within a sample would have it easier than who is not.
    return taken if taken > _SHORT else _seconds(call, repeats)


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of one call, the mean of ``repeats``."""
    call = _ready(call)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_sampler(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """Device time of a call with a cold L2 cache."""
    flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)

    def sample(call: Callable[[], Any], repeats: int) -> float:
        call = _ready(call)
        # Calls queue up behind the flushes, so that the host's time does not show; where the
        # host is slower than the device, it does, as it does for the user.
        events = []
        for _ in range(min(repeats, 10)):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(device)
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3

    return sample


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Everybody's thread pools limited to ``count``."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)
