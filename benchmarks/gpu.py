"""What a run on a GPU does beside taking times: the tests there, the search for tiles, compiling.

A GPU may be there for minutes only: what says most comes first, everything is kept as it comes,
and what was cut off is taken up by ``--resume``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import watch
from benchmarks.results import Results

_HERE = Path(__file__).parent.parent
_GOOD, _FAILED = "done", "failed with"
MINUTES = 7.5  # of a whole run, by default
_PROCESSES = min(16, os.cpu_count() or 1)
_GRACE = 8.0  # seconds for what is cut off to say how far it came
_TALLY = re.compile(r"\d+ (?:passed|failed|error)")
# What must agree with what a folder has for a run to go on there: other machines of the kind may.
SAME = ("device", "device_type", "versions", "gpu")


BEFORE, BETWEEN, AFTER = range(3)


@dataclass(frozen=True)
class Step:
    """A command to run, and how many seconds it may take.

    Attributes:
        when: BEFORE any times are taken, BETWEEN those of ``--quick`` and the others, or AFTER all.
        told: it reads the names of the cases to come, a line for each.
    """

    command: tuple[str, ...]
    seconds: float
    when: int = BEFORE
    told: bool = False


def _tests(*what: str, seconds: float, when: int) -> Step:
    """Each is told as it comes: what is cut off has said how far it came. A kernel that fails in
    all of its tests does not keep others from theirs."""
    words = (
        "pytest",
        "-p",
        "no:cacheprovider",
        "--verbose",
        "--tb=short",
        "--maxfail=400",
        "--limit=60",
    )
    return Step((*words, f"--numprocesses={_PROCESSES}", *what), seconds, when)


def _tuning(kernels: str, seconds: float, when: int) -> Step:
    words = ("mmfast.kernels.tuned", "--write", "--processes", str(_PROCESSES), "--only", kernels)
    return Step(words, seconds, when)


def _compiling(when: int) -> Step:
    words = ("benchmarks.warm", "--processes", str(_PROCESSES))
    return Step(words, 60.0, when, told=True)


_ON_THE_GPU = ("tests/test_triton.py::TestOnTheGpu", "tests/test_gpu.py")
STEPS: Mapping[str, Step] = {
    "tuning": _tuning("screen|forward|query|key", 75.0, BEFORE),
    "compiling": _compiling(BEFORE),
    "tests, parity": _tests(
        "tests/test_triton.py", "-k", "test_samples", seconds=85.0, when=BETWEEN
    ),
    "tests, device": _tests(*_ON_THE_GPU, "-k", "not memory_checker", seconds=45.0, when=BETWEEN),
    # By itself: it is the kernel whose programs wait for each other.
    "tuning, one pass": _tuning("fused", 40.0, BETWEEN),
    "compiling, others": _compiling(BETWEEN),
    "tests, memory": _tests("tests/test_gpu.py", "-k", "memory_checker", seconds=90.0, when=AFTER),
    "tests, others": _tests(
        "tests/test_triton.py",
        "tests/test_triton_hopper.py",
        "tests/test_ops.py",
        "-k",
        "not test_samples and not TestOnTheGpu",
        seconds=150.0,
        when=AFTER,
    ),
}


def build() -> None:
    """Let Python find the kernels as they lie here, where the package is not installed.

    Without the C++ kernels, which no GPU runs and which take minutes: ``make`` builds them.
    """
    if importlib.util.find_spec("mmfast.kernels") is None:
        (_HERE / "mmfast" / "kernels").symlink_to(_HERE / "kernels", target_is_directory=True)
        importlib.invalidate_caches()


def again(environment: Mapping[str, str], *words: str) -> None:
    """This command from its beginning, with ``words`` more."""
    sys.stdout.flush()
    watch.say("the beginning", watch.BEGIN)
    os.execve(sys.executable, [*sys.orig_argv, *words], {**os.environ, **environment})


def prepare(
    results: Results,
    tell: Callable[[str], None],
    folder: Path,
    cases: Sequence[str],
    steps: Mapping[str, Step] = STEPS,
    when: int = BEFORE,
    left: float = 1e9,
) -> Iterator[str]:
    """Take the steps that ``results`` do not know as done, and note what came of them there;
    yields the name of each one that was taken. What they print is in the folder.

    Args:
        cases: names of those that will be timed next.
        when: take those of this time.
        left: seconds; steps that would not have half of their time are left out.
    """
    end = time.perf_counter() + left
    for name, step in steps.items():
        if step.when != when or (step.told and not cases):
            continue
        if _is_over(results.checks.get(name, "")):
            continue
        seconds = min(step.seconds, end - time.perf_counter())
        if seconds < step.seconds / 2:
            continue
        tell(name)
        watch.say(name, seconds + 5 * _GRACE)
        log = folder / (re.sub(r"\W+", "_", name) + ".txt")
        results.checks[name] = _run(step, seconds, log, "\n".join(cases) if step.told else "")
        yield name


def _is_over(came: str) -> bool:
    """Whether a step need not be taken again: it is done, or has told what of it failed, or did not
    come back."""
    told = came.startswith(_FAILED) and _TALLY.search(came)
    return came.startswith((_GOOD, *watch.LOST)) or bool(told)


def failures(results: Results) -> list[str]:
    """Steps that were taken and not done, with what came of them."""
    return [
        f"{name}: {came}" for name, came in results.checks.items() if not came.startswith(_GOOD)
    ]


def _run(step: Step, seconds: float, log: Path, told: str) -> str:
    start = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    cut = ""
    with open(log, "w") as file:
        # A group of its own, of which nothing is left that would disturb what is timed.
        ran = subprocess.Popen(
            [sys.executable, "-m", *step.command],
            cwd=_HERE,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            ran.communicate(told, timeout=seconds)
        except subprocess.TimeoutExpired:
            cut = f"cut off after {seconds:.0f} s"
            ran.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                ran.wait(_GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ran.pid, signal.SIGKILL)
            ran.wait()
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    said = next((line for line in reversed(lines) if _TALLY.search(line)), lines[-1])
    how = _GOOD if ran.returncode == 0 else f"{_FAILED} {ran.returncode}"
    return f"{cut or how + f' in {time.perf_counter() - start:.0f} s'}: {said}"


def is_lost(device: torch.device) -> bool:
    """Whether an error has made the device useless to this process."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Drawn(TorchFunctionMode):
    """Random numbers are drawn where they are needed: a CPU takes seconds for those of one case."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._generators: dict[int, torch.Generator] = {}

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = dict(options or {})
        if function in (torch.randn, torch.rand) and options.get("device") is None:
            options["device"] = self._device
            given = options.pop("generator", None)
            if given is not None:
                seed = given.initial_seed()
                if seed not in self._generators:
                    made = torch.Generator(self._device).manual_seed(seed)
                    self._generators[seed] = made
                options["generator"] = self._generators[seed]
        return function(*arguments, **options)


def arguments_of(make: Callable[[torch.device], Any], device: torch.device) -> Any:
    """Those of a case, made on its device where that can be."""
    if device.type != "cuda":
        return make(device)
    try:
        with Drawn(device):
            return make(device)
    except (RuntimeError, TypeError):
        return make(device)  # it puts them together with some of the CPU's
