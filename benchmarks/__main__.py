"""``python -m benchmarks``: check every op against its reference, time it against everybody."""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    cases,
    contest,
    gpu,
    gpu_attention_peers,
    gpu_cases,
    gpu_time,
    levels,
    machine,
    ratios,
    report,
    tables,
    timing,
    training,
    watch,
)
from benchmarks.cases import Case
from benchmarks.results import FILE, Results, letters_of
from benchmarks.spent import ROUNDS, Spent
from mmfast.files import check_writable

_HERE = Path(__file__).parent
_CURVE_SHARE = 0.1  # of a table's case's time
_LEVEL_CASES = 2  # of lower instruction sets, without --full
_LEVELS = 1  # lower instruction sets, likewise
_SAVE_EVERY = 5.0  # seconds, which are lost at most
# Seconds that a contender's part of a case may take on a GPU before it counts as one that hangs:
# one of mmfast, another, one that is compiled meanwhile; and that whatever is no case may take.
_PATIENCE, _PATIENCE_OTHERS, _PATIENCE_COMPILED, _PATIENCE_REST = 45.0, 75.0, 180.0, 120.0
_MOST_PROCESSES = 20  # that follow each other


def main() -> int:
    """The command; returns its exit status: 1 if a result of mmfast was wrong."""
    options = _parse()
    device = torch.device(options.device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.report:
        written = report.write(Results.load(options.report), options.report)
        console.print(f"{written}: the report")
        return 0
    if device.type == "cuda":
        gpu.build()
    folder = options.out or _HERE / "results" / machine.slug(device)
    if device.type == "cuda" and not watch.watched():
        return _watch(folder, options.minutes)
    watch.follow()
    results = _start(device, folder, options.resume)
    if watch.watched():
        results.save(folder)  # for who watches to note in it what goes wrong
    spent = Spent()
    with _truths(options.truths) as truths:
        _measure(options, results, folder, device, console, spent, truths)
    watch.say("report", _PATIENCE_REST)
    if not options.bare:
        for table in [*tables.all_tables(results), *spent.tables()]:
            console.print(table.rich())
        written = report.write(results, folder, spent.tables())
        console.print(f"{written}: the report; {FILE} and plots beside it")
        if options.readme:
            report.update_readme(results, _HERE.parent / "README.md")
    wrong = [
        f"{r.op}/{r.case}, {r.subject}: {r.match}"
        for r in results.rows
        if r.kind == "mmfast" and r.match
    ]
    wrong += gpu.failures(results)
    for what in wrong:
        console.print(f"WRONG: {what}", style="bold red")
    return 1 if wrong else 0


def _watch(folder: Path, minutes: float | None) -> int:
    """The same command in processes of its own: what hangs, or takes its process with it, is noted
    in the results, and the next process does the rest."""
    begun = time.perf_counter()
    more: list[str] = []
    for _ in range(_MOST_PROCESSES):
        ended = watch.run([sys.executable, *sys.orig_argv[1:], *more])
        if ended.good:
            return ended.status or 0
        print(f"{ended.what or 'the beginning'} {ended}", flush=True)
        if not ended.what or not (folder / FILE).exists():
            return 1
        results = Results.load(folder)
        if ": " not in ended.what and ended.what in results.checks:
            return 1  # the next one would do so as well
        results.lose(ended.what, str(ended))
        results.save(folder)
        more = ["--resume"]
        if minutes is not None:
            left = minutes - (time.perf_counter() - begun) / 60
            more += ["--minutes", f"{max(left, 0.01):.3f}"]
    return 1


@contextmanager
def _truths(given: Path | None) -> Iterator[Path]:
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _measure(
    options: argparse.Namespace,
    results: Results,
    folder: Path,
    device: torch.device,
    console: Console,
    spent: Spent,
    truths: Path,
) -> None:
    """Fill ``results``, which the folder keeps as they come."""
    chosen, counts = _choose(options), _thread_counts(device, options.threads)
    saved = begun = time.perf_counter()
    everything = not (options.bare or options.only or options.subjects)
    done = {f"{r.op}/{r.case}" for r in results.rows}

    def left() -> float:
        """Seconds."""
        return 60 * (options.minutes or math.inf) + begun - time.perf_counter()

    prepared: set[int] = set()

    def prepare(when: int) -> None:
        if device.type != "cuda" or not everything or when in prepared:
            return
        prepared.add(when)
        coming = [c.key for c in chosen if c.key not in done and c.quick == (when == gpu.BEFORE)]
        for _ in gpu.prepare(
            results, lambda what: tell(what, 0), folder, coming, gpu.STEPS, when, left()
        ):
            results.save(folder)

    if not options.bare:
        console.print(report.summary(results), highlight=False)
    with _progress(console, len(chosen) + 3) as tell:
        prepare(gpu.BEFORE)
        for count in counts if not options.bare else ():
            if device.type == "cuda" and count in results.ceilings:
                continue
            tell("ceilings", 0)
            watch.say("ceilings", _PATIENCE_REST)
            with timing.threads(count), spent.on("ceilings", ROUNDS):
                results.ceilings[count] = machine.ceilings(device, count)
        tell("", 1)
        for case in chosen:
            if case.key in done:
                tell("", 1)
                continue
            if not case.quick:
                prepare(gpu.BETWEEN)
            if left() < 0:
                rest = sum(c.key not in done for c in chosen[chosen.index(case) :])
                console.print(f"{rest} cases are left: the same with --resume goes on with them")
                break
            # Libraries stay: looking through all of them again before each case's rounds would take
            # a fifth of a second.
            gc.collect()
            gc.freeze()
            lost = results.lost(case.key)
            results.replace(_measured(case, device, counts, options, tell, spent, truths, lost))
            if device.type == "cuda" and gpu.is_lost(device):
                # Every call of this process would fail from now on.
                results.save(folder)
                console.print(f"{case.key} has lost the device: the rest is for a new process")
                gpu.again({}, "--resume", "--minutes", f"{max(left() / 60, 0.01):.3f}")
            if time.perf_counter() - saved > _SAVE_EVERY:
                results.save(folder)
                saved = time.perf_counter()
            tell("", 1)
        if any(case.key not in done for case in chosen):
            results.save(folder)
        prepare(gpu.BETWEEN)
        prepare(gpu.AFTER)
        if device.type == "cpu" and everything:
            with spent.on("lower instruction sets", ROUNDS):
                of = 1 if options.quick else len(levels.CASES) if options.full else _LEVEL_CASES
                most = levels.ALL if options.full else _LEVELS
                rows = levels.run(of, most, truths, lambda what: tell(f"level {what}", 0))
            results.replace(rows)
            results.save(folder)
        tell("", 1)
        if device.type == "cpu" and everything and not training.missing():
            steps = training.QUICK_STEPS if options.quick else training.STEPS
            with spent.on("training", ROUNDS):
                results.curves = training.run(steps, lambda what: tell(f"training {what}", 0))
            results.save(folder)
        tell("", 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer cases, less time for each")
    parser.add_argument(
        "--full",
        action="store_true",
        help="all cases, torch.compile of everything, and slow contenders on all vectors",
    )
    parser.add_argument(
        "--scale", action="store_true", help="everything that has a goal, and with one thread too"
    )
    parser.add_argument("--only", metavar="REGEX", help="cases, as op/name")
    parser.add_argument("--subjects", metavar="REGEX", help="contenders, by their names")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all")
    parser.add_argument("--seconds", type=float, help="per case and number of threads")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"no case begins after so many; default: {gpu.MINUTES:g} on a GPU, else no limit",
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--resume", action="store_true", help="keep what the folder has already")
    parser.add_argument("--readme", action="store_true", help="put the table into the README")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help=f"only write the report and plots of the {FILE} that is there, of whatever machine",
    )
    parser.add_argument("--bare", action="store_true", help=f"write {FILE}, no report or tables")
    parser.add_argument("--truths", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args()
    if options.list:
        for case in _all_cases(options.device):
            of = letters_of(case.op)
            told = f"{case.key}: {f'{of} = ' if of else ''}{case.title}, {case.data}"
            if torch.device(options.device).type == "cuda":
                told += f"; {gpu_time.allowed(case):.1f} s are allowed"
            print(told)
        parser.exit()
    for name in ("only", "subjects"):
        try:
            re.compile(getattr(options, name) or "")
        except re.error as error:
            parser.error(f"--{name} is no regular expression: {error}")
    if options.threads and min(options.threads) < 1:
        parser.error(f"--threads must be at least 1, got {min(options.threads)}")
    if options.seconds is None:
        options.seconds = 2.0 if options.full else 0.25
    if options.minutes is None and options.device != "cpu" and not options.full:
        options.minutes = gpu.MINUTES
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    if options.quick and options.full:
        parser.error("--quick and --full exclude each other")
    if options.out is not None:
        try:
            check_writable(options.out)
        except OSError as error:
            parser.error(f"--out {error}")
    if not _choose(options):
        parser.error(f"no case matches --only {options.only!r}; --list shows them")
    return options


def _all_cases(device: str) -> list[Case]:
    on_gpu = torch.device(device).type == "cuda"
    return gpu_cases.all_cases() if on_gpu else cases.all_cases()


def _choose(options: argparse.Namespace) -> list[Case]:
    def takes_part(case: Case) -> bool:
        scaled = options.scale and (case.op, case.name) in ratios.RATIOS
        return options.full or scaled or (case.quick if options.quick else not case.full)

    found = [c for c in _all_cases(options.device) if takes_part(c)]
    return [c for c in found if re.search(options.only or "", c.key)]


def _thread_counts(device: torch.device, wanted: list[int] | None) -> list[int]:
    if device.type != "cpu":
        return [torch.get_num_threads()]
    return sorted(set(wanted or [1, torch.get_num_threads()]))


def _start(device: torch.device, folder: Path, resume: bool) -> Results:
    facts = machine.facts(device)
    if resume and (folder / FILE).exists():
        found = Results.load(folder)
        # Of GPUs others of the kind go on where one was taken away.
        names = gpu.SAME if device.type == "cuda" else {**found.facts, **facts}
        if any(found.facts.get(name) != facts.get(name) for name in names):
            raise SystemExit(f"error: {folder / FILE} is of another machine or other versions")
        return found
    return Results(facts)


def _measured(case: Case, device: torch.device, *others: Any) -> list[contest.Row]:
    """On a GPU a case that fails is one that is wrong, and the others follow."""
    if device.type != "cuda":
        return _run(case, device, *others)
    *_, lost = others
    whole = [came for name, came in lost.items() if name not in contest.names(case)]
    if whole:
        # It was nobody's part.
        return [contest.failed(case, RuntimeError(whole[-1]))]
    try:
        return _run(case, device, *others)
    except Exception as error:
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
        return [contest.failed(case, error)]


def _run(
    case: Case,
    device: torch.device,
    counts: list[int],
    options: argparse.Namespace,
    tell: Callable[[str, int], None],
    spent: Spent,
    truths: Path,
    lost: Mapping[str, str],
) -> list[contest.Row]:
    def about(what: str) -> None:
        watch.say(f"{case.key}: {what}", _patience(what))
        tell(f"{case.key} {what}", 0)

    seconds = options.seconds * (_CURVE_SHARE if case.sweep else case.share)
    effort = contest.Effort(seconds)
    if options.full:
        effort = contest.Effort(seconds, call=60.0, slow=1.0, full=True)
    return contest.run(
        case,
        device,
        counts if case.scales(options.scale or options.full) else counts[-1:],
        effort,
        lambda name: bool(re.search(options.subjects or "", name)),
        about,
        spent,
        truths,
        lost,
    )


def _patience(what: str) -> float:
    if what.startswith("mmfast"):
        return _PATIENCE
    compiled = "compile" in what or gpu_attention_peers.FLEX in what
    return _PATIENCE_COMPILED if compiled else _PATIENCE_OTHERS


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, steps: bar.update(task, advance=steps, description=what)


if __name__ == "__main__":
    # Libraries of contenders warn about each other; nothing of it concerns the results.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("KEOPS_VERBOSE", "0")
    # The processor's flags say what it has; torch.compile would build programs to find out.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's
    sys.exit(main())
