"""Times of contenders that take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.modules import Step

_SAMPLE = 5e-4  # seconds; shorter calls are repeated for so long, and divided
_SHORT = 0.02  # seconds; up to here shows what a call takes longer after those of others
_SETTLE = 0.006  # seconds; libgomp's threads spin about as long
_MIN_ROUNDS = 3
_TINY = 1e-3  # seconds; rounds of such calls cost little, and there are more
_MIN_TINY_ROUNDS = 7
_MAX_ROUNDS = 40
_STEADY = 0.1  # of the median; where nobody's samples are further apart, more say no more
# Of overheads: turns, blocks in a turn, and the calls and seconds of a block. A Step must have as
# many calls before its next reset as a block and its warming up have together.
_TURNS, _BLOCKS = 3, 3
_BLOCK_CALLS, _BLOCK = 60, 2e-3
_WARM = 0.2  # of a block's calls, before it
_FLUSH = 1 << 28  # bytes; more than any GPU's L2 cache
_QUEUED = 10  # calls of a sample, at most


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """From a sample of each round."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


def once(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    call = ready(call)
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def ready(call: Callable[[], Any]) -> Callable[[], Any]:
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
    known: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time ``calls``, already warm, in rounds of one sample each: three of them or more, until the
    samples agree or ``seconds`` are over.

    Args:
        known: about how many seconds calls take, by name, so that nobody has to find out.
    """
    sampler = _cuda_sampler(device) if device.type == "cuda" else _cpu_sample
    repeats, longest = {}, 0.0
    for name, call in calls.items():
        taken = (known or {}).get(name, 0.0) or once(call, device)[0]
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
            enough = time.perf_counter() - start > seconds or _steady(samples.values())
            if done >= least and enough:
                break
            names = names[1:] + names[:1]
            for name in names:
                samples[name].append(sampler(calls[name], repeats[name]))
    return {name: Timing.of(values) for name, values in samples.items()}


def _steady(samples: Iterable[list[float]]) -> bool:
    return all(s and max(s) - min(s) < _STEADY * statistics.median(s) for s in samples)


def overhead(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, Timing]:
    """Time ``calls``, already warm and so small that next to nothing but overhead is left of them.

    Each in loops of its own, after calls of its own: what the others leave in the caches is not
    what a call costs. A sample is the mean of such a loop.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for _ in range(_TURNS):
            for name, call in calls.items():
                _settle()
                taken = min(once(call, device)[0] for _ in range(3))
                count = min(_BLOCK_CALLS, max(1, round(_BLOCK / max(taken, 1e-7))))
                for block in range(1 + _BLOCKS):
                    run = ready(call)
                    _mean(run, math.ceil(_WARM * count))
                    mean = _mean(run, count)
                    if block:  # before the first, the processor has slept
                        samples[name].append(mean)
                    synchronize(device)
    return {name: Timing.of(values) for name, values in samples.items()}


def _settle() -> None:
    """The threads of the contender before spin for a while, and would take this one's cores."""
    if torch.get_num_threads() > 1:
        time.sleep(_SETTLE)


def _cpu_sample(call: Callable[[], Any], repeats: int) -> float:
    _settle()
    taken = _mean(ready(call), 1)
    # Shorter ones wait for threads to wake up, and for what the contender before had in the caches:
    # whoever is repeated within a sample would have it easier than who is not.
    return taken if taken > _SHORT else _mean(ready(call), repeats)


def _mean(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call, the mean of ``repeats``."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_sampler(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """Device time of a call with a cold L2 cache: what was in it makes way for a buffer that is
    only read. Lines that were written would go back to memory while the call runs."""
    flush = torch.zeros(_FLUSH // 4, dtype=torch.int32, device=device)
    largest = flush.amax()

    def sample(call: Callable[[], Any], repeats: int) -> float:
        call = ready(call)
        # Calls queue up behind the flushes, so that the host's time does not show; where the
        # host is slower than the device, it does, as it does for the user.
        events = []
        for _ in range(min(repeats, _QUEUED)):
            torch.amax(flush, (0,), out=largest)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(device)
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3

    return sample


def without_host(call: Callable[[], Any], device: torch.device) -> float | None:
    """Device time of ``call``, already warm, as a CUDA graph. None where it cannot be captured,
    because it waits for the device, say, or is a step with a reset."""
    if device.type != "cuda" or isinstance(call, Step):
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            # What it returns must stay, or its memory would be another call's.
            result = call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    sample = _cuda_sampler(device)
    taken = statistics.median(sample(graph.replay, _QUEUED) for _ in range(_MIN_ROUNDS))
    del result
    return taken


def best(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Seconds of a call at best, which is warm after the first."""
    call()
    if device.type == "cuda":
        sample = _cuda_sampler(device)
        return min(sample(call, 1) for _ in range(rounds))
    return min(once(call, device)[0] for _ in range(rounds))


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
