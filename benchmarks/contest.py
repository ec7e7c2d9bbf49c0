"""One case: everybody's answers checked, then everybody timed in turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import memory, peers, timing
from benchmarks.cases import Case
from benchmarks.results import Row
from benchmarks.subjects import Arguments, Subject, answer, expected, judge, own, subjects
from mmfast.registry import OPS

# A slow contender is measured on so few vectors that a call takes this many seconds.
_CUT_SECONDS = 0.05
_CUT_LEAST = 1024
# On the curves only these are of interest, besides mmfast.
CURVES = ("addmm+argmin", "faiss flat")


@dataclass
class Entry:
    subject: Subject
    call: Callable[[], Any]
    rows: int  # vectors it is run on
    match: str | None
    memory: int | None


def run(
    case: Case,
    device: torch.device,
    threads: Sequence[int],
    seconds: float,
    wanted: Callable[[str], bool],
    tell: Callable[[str], None],
) -> list[Row]:
    """Measure ``case`` for ``seconds`` per number of threads.

    ``wanted`` chooses contenders by name, ``tell`` hears what is going on.
    """
    tell("reference")
    arguments = case.make(device)
    truth = expected(case.op, arguments)
    entries, rows = [], []
    for subject in _contenders(case):
        if not wanted(subject.name):
            continue
        tell(subject.name)
        entry = enter(case, subject, arguments, truth, device)
        if isinstance(entry, Entry):
            entries.append(entry)
        else:
            rows += [_row(case, subject, count, note=entry) for count in threads]
    for count in threads:
        tell(f"{count} threads" if device.type == "cpu" else "timing")
        with timing.threads(count):
            # Who is too slow for all rows is not worth a second look with fewer threads.
            fast = [e for e in entries if e.rows == case.shape["N"] or count == max(threads)]
            calls = {entry.subject.name: entry.call for entry in fast}
            times = timing.interleave(calls, device, seconds)
        for entry in fast:
            rows.append(_measured(case, entry, count, times[entry.subject.name], arguments))
    return rows


def _contenders(case: Case) -> list[Subject]:
    found = subjects(case.op)
    if case.sweep is None:
        return found
    return [s for s in found if s.kind == "mmfast" or s.name in CURVES]


def enter(
    case: Case, subject: Subject, arguments: Arguments, truth: Any, device: torch.device
) -> Entry | str:
    """The contender, warm and judged, or why it does not run."""
    reasons = subject.reasons(arguments)
    if reasons:
        return "; ".join(reasons)
    needed = subject.peer.workspace(*arguments)
    if needed > _free_memory(device) and not hasattr(peers.of(case.op), "first_rows"):
        return f"not run where it needs {needed >> 30} GiB"
    given, rows = _cut(case, subject, arguments, device)
    copies = own(case.op, given)
    call = subject.peer.make(*copies)
    match = None
    result = answer(case.op, call(), copies)
    if subject.kind != "floor" and not subject.peer.random:
        match = judge(case.op, result, given, truth_of(case, truth, given, rows))
    del result
    return Entry(subject, call, rows, match, memory.peak(call, device))


def _cut(
    case: Case, subject: Subject, arguments: Arguments, device: torch.device
) -> tuple[Arguments, int]:
    """The problem, or its first rows where it is too much for the contender; how many."""
    rows = fitting = case.shape["N"]
    shorten = getattr(peers.of(case.op), "first_rows", None)
    if shorten is None or rows <= _CUT_LEAST:
        return arguments, rows
    needed = subject.peer.workspace(*arguments)
    if needed > _free_memory(device):
        fitting = max(_CUT_LEAST, rows * _free_memory(device) // needed // 64 * 64)
    if subject.peer.cut:
        # The cost of a vector grows when a product of N x K no longer fits the caches.
        probed = _CUT_LEAST
        while True:
            probe = subject.peer.make(*shorten(arguments, probed))
            probe()
            each = timing.once(probe, device)[0] / probed
            allowed = max(_CUT_LEAST, int(_CUT_SECONDS / each) // 64 * 64)
            if allowed <= 2 * probed or probed == fitting:
                fitting = min(fitting, allowed)
                break
            probed = min(allowed, 8 * probed, fitting)
    return shorten(arguments, fitting), fitting


def _free_memory(device: torch.device) -> int:
    """Bytes that a contender may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // 2


def truth_of(case: Case, truth: Any, given: Arguments, rows: int) -> Any:
    """The truth about ``given``, the problem's first rows."""
    if rows == case.shape["N"]:
        return truth
    shorten = getattr(peers.of(case.op), "first_results", None)
    return shorten(truth, rows) if shorten else expected(case.op, given)


def _row(case: Case, subject: Subject, threads: int, **more: Any) -> Row:
    return Row(
        case.op,
        case.name,
        dict(case.shape),
        case.data,
        case.sweep,
        subject.name,
        subject.kind,
        threads,
        **more,
    )


def _measured(
    case: Case, entry: Entry, threads: int, times: timing.Timing, arguments: Arguments
) -> Row:
    scale = case.shape["N"] / entry.rows
    seconds = times.median * scale
    note = entry.subject.peer.note
    if scale > 1:
        note = f"timed on {entry.rows} vectors, scaled; {note}".rstrip("; ")
    rates: dict[str, float] = {}
    if case.op in OPS:
        cost = OPS[case.op].cost(*arguments)
        rates = {"gflops": cost.flops / seconds / 1e9, "gbps": cost.bytes / seconds / 1e9}
    return _row(
        case,
        entry.subject,
        threads,
        seconds=seconds,
        low=times.low * scale,
        high=times.high * scale,
        rounds=times.rounds,
        measured=entry.rows,
        memory=entry.memory,
        match=entry.match,
        note=note,
        **rates,
    )
