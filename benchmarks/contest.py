"""One case: everybody's answers checked, then everybody timed in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, peers, timing
from benchmarks.cases import Case
from benchmarks.results import Row
from benchmarks.spent import FIRST, ROUNDS, TRUTH, Spent
from benchmarks.subjects import Arguments, Subject, answer, expected, judge, own, subjects
from mmfast.registry import OPS

_CUT_LEAST = 1024  # vectors
# Bytes of a workspace, several tensors together, from which these are new pages in every call, as
# they are of the whole problem: glibc may have up to 32 MiB for each from the call before.
_NEW_PAGES = 1 << 28
# On the curves only these are of interest, besides mmfast.
CURVES = ("addmm+argmin", "faiss flat")


@dataclass(frozen=True)
class Effort:
    """How long measuring may take.

    Attributes:
        seconds: for the rounds of a case and number of threads.
        call: a slower contender is measured on so few vectors that a call takes this long.
        slow: a contender is timed once if a call takes longer.
        full: ``torch.compile`` takes part everywhere, not only where ``COMPILED`` says, and who is
            slow is timed with fewer threads too.
    """

    seconds: float
    call: float = 0.03
    slow: float = 0.3
    full: bool = False


# Compiling takes 5 to 10 seconds, of a loop over stages more.
COMPILED = (
    "nearest_code",
    "vector_quantize_step",
    "fsq_step",
    "sampler_step",
    "gated_residual_modulate",
)


NOT_COMPILED = "only with --full"


@dataclass
class Entry:
    subject: Subject
    call: Callable[[], Any]
    rows: int  # vectors it is run on
    match: str | None
    memory: int | None
    seconds: float  # of a call, about

    def scales(self, case: Case, effort: Effort) -> bool:
        """Whether it is timed with fewer threads than all."""
        quick = effort.full or self.subject.kind == "mmfast" or self.seconds <= effort.slow
        return quick and self.rows == case.shape["N"]


def run(
    case: Case,
    device: torch.device,
    threads: Sequence[int],
    effort: Effort,
    wanted: Callable[[str], bool],
    tell: Callable[[str], None],
    spent: Spent,
    truths: Path | None = None,
) -> list[Row]:
    """Measure ``case``.

    Args:
        wanted: chooses contenders by name.
        tell: hears what is going on.
        truths: a folder for results of the reference, which another process may have left there.
    """
    tell("reference")
    with spent.on(case.key, TRUTH):
        arguments = case.make(device)
        truth = _truth(case, arguments, truths)
    entries, rows = [], []
    for subject in _contenders(case):
        if not wanted(subject.name):
            continue
        tell(subject.name)
        with spent.on(case.key, FIRST, subject.name):
            entry = enter(case, subject, arguments, truth, device, effort)
        if isinstance(entry, Entry):
            entries.append(entry)
        else:
            rows += [_row(case, subject, count, note=entry) for count in threads]
    for count in threads:
        tell(f"{count} threads" if device.type == "cpu" else "timing")
        with timing.threads(count), spent.on(case.key, ROUNDS):
            # Who is too slow for all rows, or slow, is not worth a second look with fewer threads.
            fast = [e for e in entries if count == max(threads) or e.scales(case, effort)]
            calls = {entry.subject.name: entry.call for entry in fast}
            times = timing.interleave(calls, device, effort.seconds, effort.slow)
        for entry in fast:
            rows.append(_measured(case, entry, count, times[entry.subject.name], arguments))
    return rows


def _contenders(case: Case) -> list[Subject]:
    found = subjects(case.op)
    if case.sweep is None:
        return found
    return [s for s in found if s.kind == "mmfast" or s.name in CURVES]


def _truth(case: Case, arguments: Arguments, folder: Path | None) -> Any:
    """The reference's results for the vectors that are judged."""
    path = folder / f"{case.op}_{case.name}.pt" if folder else None
    if path and path.exists():
        return torch.load(path)
    if case.judged < case.shape["N"]:
        arguments = _shorten(case.op)(arguments, case.judged)
    truth = expected(case.op, arguments)
    if path and case.op == "nearest_code" and case.sweep is None:
        torch.save(truth, path)
    return truth


def enter(
    case: Case,
    subject: Subject,
    arguments: Arguments,
    truth: Any,
    device: torch.device,
    effort: Effort,
) -> Entry | str:
    """The contender, warm and judged, or why it does not run."""
    compiled = subject.kind == "compile" or subject.name == "torch.compile"
    if compiled and not effort.full and case.op not in COMPILED:
        return NOT_COMPILED
    reasons = subject.reasons(arguments)
    if reasons:
        return "; ".join(reasons)
    needed = subject.peer.workspace(*arguments)
    if needed > _free_memory(device) and not hasattr(peers.of(case.op), "first_rows"):
        return f"not run where it needs {needed >> 30} GiB"
    given, rows = _cut(case, subject, arguments, device, effort.call)
    copies = own(case.op, given)
    call = subject.peer.make(*copies)
    match = None
    # A floor has no answer, and is not called for it.
    result = None if subject.kind == "floor" else answer(case.op, call(), copies)
    if subject.kind != "floor" and not subject.peer.random:
        judged = min(rows, case.judged)
        if judged < rows:
            result = _first(case.op, result, judged)
            given = _shorten(case.op)(given, judged)
        match = judge(case.op, result, given, truth_of(case, truth, given, judged))
    result = None
    start = time.perf_counter()
    most = memory.peak(call, device)
    return Entry(subject, call, rows, match, most, time.perf_counter() - start)


def _shorten(op: str) -> Callable[[Arguments, int], Arguments]:
    """What gives the problem of the first rows."""
    found = peers.of(op)
    assert found is not None
    return found.first_rows


def _first(op: str, result: Any, rows: int) -> Any:
    """The results of the first ``rows`` vectors, of all outputs or the only one."""
    found = peers.of(op)
    assert found is not None
    shorten = found.first_results
    return shorten(result, rows) if isinstance(result, tuple) else shorten((result,), rows)[0]


def _cut(
    case: Case, subject: Subject, arguments: Arguments, device: torch.device, longest: float
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
        least = min(fitting, max(_CUT_LEAST, rows * min(_NEW_PAGES, needed) // max(needed, 1)))
        probed = least
        while True:
            probe = subject.peer.make(*shorten(arguments, probed))
            probe()
            each = timing.once(probe, device)[0] / probed
            allowed = max(least, int(longest / each) // 64 * 64)
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
    if rows == case.judged:
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
