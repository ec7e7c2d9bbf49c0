"""One case: everybody's answers checked, then everybody timed in turns."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, memory, peers, rotation, timing
from benchmarks.cases import SHIFTED, Case
from benchmarks.modules import Step
from benchmarks.results import Row
from benchmarks.spent import FIRST, ROUNDS, TRUTH, Spent
from benchmarks.subjects import (
    Arguments,
    Subject,
    answer,
    errors,
    expected,
    judge,
    own,
    subjects,
)
from mmfast.registry import OPS

_CUT_LEAST = 1024  # vectors
# Bytes of an N x K matrix that is new pages in every call, as that of the whole problem is: below,
# glibc may have it from the call before.
_NEW_PAGES = 70 << 20
# On the curves, and with shifted data, only these are of interest, besides mmfast.
CURVES = ("addmm+argmin", "faiss flat")
_CLOSE = 3.0  # times mmfast's time, below which a contender has more than one sample in any case
_NEAR = 10.0  # the same for shorter calls, of which new pages can be half where there is one sample
_QUICK = 0.05  # seconds; longer calls have one sample where no goal compares with them
_WARM = 3.0  # seconds; what a turn of all copies may take
_SURE = 1.0  # seconds; of longer calls, what a first one does besides is a small part


@dataclass(frozen=True)
class Effort:
    """How long measuring may take.

    Attributes:
        seconds: for the rounds of a case and number of threads.
        call: a slower contender is measured on so few vectors that a call takes this long.
        slow: a contender is timed once if a call takes longer, and some times as long as mmfast's.
        full: everybody takes part everywhere, with fewer threads too, and is judged.
    """

    seconds: float
    call: float = 0.03
    slow: float = 0.12
    full: bool = False


# Compiling takes 5 to 10 seconds, of a loop over stages more.
COMPILED = (
    "nearest_code",
    "vector_quantize_step",
    "fsq_step",
    "sampler_step",
    "gated_residual_modulate",
)
# Cases with everybody; in the others of these ops those that may be the fastest take part.
HEADLINES = {
    "nearest_code": ("n65536_k1024_d64", "n256_k512_d64"),
    "vector_quantize_step": ("n65536_k1024_d64",),
    "lfq_signs_step": ("n65536_k16384_d14",),
}
ABSENT = "only with --full"


@dataclass
class Entry:
    subject: Subject
    call: Callable[[], Any]
    rows: int  # vectors it is run on
    match: str | None
    memory: int | None
    seconds: float  # of a call
    errors: list[float] | None = None
    turns: int = 1  # calls until memory comes again

    def once(self, effort: Effort, fastest: float) -> bool:
        """Whether one call says enough, ``fastest`` being mmfast's seconds per vector: who is close
        to mmfast is measured as often as mmfast."""
        aside = self.subject.peer.aside and not effort.full
        sure = self.subject.kind == "floor" or self.seconds > _SURE
        close = (_CLOSE if sure else _NEAR) * fastest
        far = self.subject.kind != "mmfast" and self.seconds / self.rows > close
        return self.seconds > (_QUICK if aside else effort.slow) and (far or aside)

    def scales(self, effort: Effort) -> bool:
        """Whether it is timed with fewer threads than all, for which code is compiled again."""
        return effort.full or not (self.subject.peer.aside or self.subject.compiled)


def run(
    case: Case,
    device: torch.device,
    threads: Sequence[int],
    effort: Effort,
    wanted: Callable[[str], bool],
    tell: Callable[[str], None],
    spent: Spent,
    truths: Path | None = None,
    lost: Mapping[str, str] | None = None,
) -> list[Row]:
    """Measure ``case``.

    Args:
        wanted: chooses contenders by name.
        tell: hears what is going on.
        truths: a folder for results of the reference, which another process may have left there.
        lost: what is known of contenders that are not to run again, by name.
    """
    lost = lost or {}
    most = max(threads)
    tell("reference")
    with spent.on(case.key, TRUTH), timing.threads(most):
        arguments = gpu.arguments_of(case.make, device)
        truth, reference = _truth(case, arguments, device, truths)
    turns = [arguments]
    if device.type == "cpu" and case.op in rotation.OPS:
        turns = rotation.copies(arguments)
    entries: list[Entry] = []
    rows = []
    with timing.threads(most):
        for subject in (s for s in contenders(case) if wanted(s.name)):
            if subject.name in lost:
                came = lost[subject.name]
                wrong = came if subject.kind == "mmfast" else None
                rows += [_row(case, subject, n, note=came, match=wrong) for n in threads]
                continue
            tell(subject.name)
            entry: Entry | str
            with spent.on(case.key, FIRST, subject.name):
                if subject.kind == "reference" and reference and not effort.full:
                    entry = Entry(subject, lambda: None, case.shape["N"], "", *reference)
                else:
                    entry = _entered(case, subject, arguments, truth, device, effort, turns[1:])
            if isinstance(entry, Entry):
                entries.append(entry)
            else:
                rows += [_row(case, subject, count, note=entry) for count in threads]
    fastest = min((e.seconds / e.rows for e in entries if e.subject.kind == "mmfast"), default=0.0)
    for count in threads:
        tell(f"{count} threads" if device.type == "cpu" else "timing")
        here = [e for e in entries if count == most or e.scales(effort)]
        with timing.threads(count), spent.on(case.key, ROUNDS):
            times = _times(case, here, device, most / count, effort, fastest)
            for entry in here:
                taken = times[entry.subject.name]
                graph = timing.without_host(entry.call, device)
                rows.append(_measured(case, entry, count, taken, graph, arguments))
    return rows


def _times(
    case: Case,
    entries: list[Entry],
    device: torch.device,
    longer: float,
    effort: Effort,
    fastest: float,
) -> dict[str, timing.Timing]:
    """By contender; with fewer threads a call takes about ``longer`` times as long."""
    turns = {e.subject.name: e for e in entries if not e.once(effort, fastest)}
    calls = {name: e.call for name, e in turns.items()}
    for name, entry in turns.items():
        if longer > 1 and entry.subject.compiled:
            calls[name]()
    for name, entry in turns.items():
        # Modules and the memory of results are new in the first turns, and a system may have
        # reclaimed what nobody touched while others were made ready.
        start = time.perf_counter()
        for _ in range(entry.turns if entry.turns > 1 else 0):
            calls[name]()
            if time.perf_counter() - start > _WARM:
                break
    if case.overhead:
        times = timing.overhead(calls, device)
    else:
        known = {name: e.seconds * longer for name, e in turns.items()}
        times = timing.interleave(calls, device, effort.seconds, known)
    for entry in (e for e in entries if e.subject.name not in turns):
        # With all threads, its first call was that one.
        again = timing.once(entry.call, device)[0] if longer > 1 else entry.seconds
        times[entry.subject.name] = timing.Timing.of([again])
    return times


def contenders(case: Case) -> list[Subject]:
    """Who may take part in it."""
    found = subjects(case.op)
    if case.sweep is None and case.data != SHIFTED:
        return found
    return [s for s in found if s.kind == "mmfast" or s.name in CURVES]


def names(case: Case) -> list[str]:
    """Theirs."""
    return [subject.name for subject in contenders(case)]


def _truth(
    case: Case, arguments: Arguments, device: torch.device, folder: Path | None
) -> tuple[Any, tuple[int | None, float] | None]:
    """The reference's results for the vectors that are judged; and, where that is as good as a
    measurement of the reference, its memory and seconds."""
    path = folder / f"{case.op}_{case.name}.pt" if folder else None
    if path and path.exists():
        return torch.load(path), None
    whole = case.judged == case.shape["N"]
    if not whole:
        arguments = _shorten(case.op)(arguments, case.judged)
    truth, seconds, most = memory.watch(lambda: expected(case.op, arguments), device)
    if path and case.op == "nearest_code" and case.sweep is None:
        torch.save(truth, path)
    same = whole and case.op in OPS and not OPS[case.op].mutates and seconds > _QUICK
    return truth, (most, seconds) if same else None


def _entered(case: Case, subject: Subject, *others: Any) -> Entry | str:
    """On a GPU others may refuse what they find unsuitable only when they are called."""
    if subject.kind == "mmfast" or not torch.cuda.is_available():
        return enter(case, subject, *others)
    try:
        return enter(case, subject, *others)
    except Exception as error:
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
        return _reason(error)


def enter(
    case: Case,
    subject: Subject,
    arguments: Arguments,
    truth: Any,
    device: torch.device,
    effort: Effort,
    turns: Sequence[Arguments] = (),
) -> Entry | str:
    """The contender, warm and judged, or why it does not run.

    Args:
        turns: other copies of ``arguments``, on which its calls work in turns.
    """
    headline = case.name in HEADLINES.get(case.op, (case.name,))
    if not effort.full and (
        (subject.compiled and not (case.compiled or (case.op in COMPILED and headline)))
        or (subject.peer.rarely and not headline and device.type == "cpu")
    ):
        return ABSENT
    reasons = subject.reasons(arguments)
    if reasons:
        return "; ".join(reasons)
    needed = subject.peer.workspace(*arguments)
    if needed > _free_memory(device) and not hasattr(peers.of(case.op), "first_rows"):
        return f"not run where it needs {needed >> 30} GiB"
    given, rows, warm = _cut(case, subject, arguments, device, effort.call)
    copies = own(case.op, given)
    call = subject.peer.make(*copies)
    taken = memory.watch(call, device)
    match = wrong_by = None
    if subject.kind == "reference":
        match = ""
    elif _is_judged(case, subject, effort):
        judged = min(rows, case.judged)
        result = answer(case.op, taken.result, copies)
        if judged < rows:
            result = _first(case.op, result, judged)
            given = _shorten(case.op)(given, judged)
        wanted = truth_of(case, truth, given, judged)
        match = judge(case.op, result, given, wanted)
        wrong_by = errors(case.op, result, wanted)
        result = wanted = None
    # A floor is one op, of which nothing is made at first.
    long = effort.slow if subject.kind == "floor" else _SURE
    sure = warm or (taken.seconds > long and not effort.full)
    taken = taken._replace(result=None)
    if subject.compiled or not sure:
        taken = memory.watch(call, device)
    if turns:
        if rows < case.shape["N"]:
            turns = [_shorten(case.op)(other, rows) for other in turns]
        others = [subject.peer.make(*own(case.op, other)) for other in turns]
        call = rotation.in_turns([call, *others])
    return Entry(subject, call, rows, match, taken.memory, taken.seconds, wrong_by, 1 + len(turns))


def _is_judged(case: Case, subject: Subject, effort: Effort) -> bool:
    """Others than mmfast are so in one shape of each op of the registry, and wherever it costs
    little."""
    if subject.kind == "floor" or subject.peer.random:
        return False
    cheap = case.op not in OPS or case.op == "nearest_code"
    return subject.kind == "mmfast" or cheap or case.quick or effort.full


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
) -> tuple[Arguments, int, bool]:
    """The problem, or its first rows where it is too much for the contender; how many; and whether
    the contender is warm from finding that out."""
    rows = fitting = case.shape["N"]
    shorten = getattr(peers.of(case.op), "first_rows", None)
    if shorten is None or rows <= _CUT_LEAST:
        return arguments, rows, False
    needed = subject.peer.workspace(*arguments)
    if needed > _free_memory(device):
        fitting = max(_CUT_LEAST, rows * _free_memory(device) // needed // 64 * 64)
    cut = subject.peer.cut and not case.whole
    if cut:
        # The cost of a vector grows when a product of N x K no longer fits the caches.
        of_new_pages = _NEW_PAGES // (4 * case.shape["K"]) if needed else 0
        least = min(fitting, max(_CUT_LEAST, of_new_pages))
        probed = min(fitting, _CUT_LEAST)
        subject.peer.make(*shorten(arguments, probed))()
        while True:
            probe = subject.peer.make(*shorten(arguments, probed))
            allowed = int(longest * probed / timing.once(probe, device)[0]) // 64 * 64
            if allowed <= max(least, 2 * probed) or probed == fitting:
                fitting = min(fitting, max(least, allowed))
                break
            probed = min(allowed, 8 * probed, fitting)
    return shorten(arguments, fitting), fitting, cut


def _free_memory(device: torch.device) -> int:
    """Bytes that a contender may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        # What files are cached in is there to be taken too.
        with open("/proc/meminfo") as lines:
            available = next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available // 2


def truth_of(case: Case, truth: Any, given: Arguments, rows: int) -> Any:
    """The truth about ``given``, the problem's first rows."""
    if rows == case.judged:
        return truth
    shorten = getattr(peers.of(case.op), "first_results", None)
    return shorten(truth, rows) if shorten else expected(case.op, given)


def failed(case: Case, error: Exception) -> Row:
    """mmfast's row of a case that could not be measured."""
    peer = peers.Peer(lambda: lambda: None)
    reason = _reason(error)
    return _row(case, Subject("mmfast", "mmfast", peer), 1, match=reason, note=reason)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
    case: Case,
    entry: Entry,
    threads: int,
    times: timing.Timing,
    graph: float | None,
    arguments: Arguments,
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
        graph=graph and graph * scale,
        memory=entry.memory,
        match=entry.match,
        errors=entry.errors,
        note=note,
        parts=entry.call.parts() if isinstance(entry.call, Step) and entry.call.parts else None,
        **rates,
    )
