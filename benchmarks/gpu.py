"""What a run on a GPU does before it takes times: the tests there, and the search for tiles."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Results

_HERE = Path(__file__).parent.parent
_GOOD = "done"
MINUTES = 7.5  # of a whole run, by default


@dataclass(frozen=True)
class Step:
    """A command to run, and how many seconds it may take."""

    command: tuple[str, ...]
    seconds: float


STEPS: Mapping[str, Step] = {
    "tests": Step(
        (
            "pytest",
            "--quiet",
            "--numprocesses=8",
            "--maxfail=20",
            "tests/test_gpu.py",
            "tests/test_ops.py",
            "tests/test_triton.py",
            "tests/test_triton_hopper.py",
        ),
        150.0,
    ),
    "tuning": Step(("mmfast.kernels.tuned", "--write"), 60.0),
}


def prepare(
    results: Results, tell: Callable[[str], None], steps: Mapping[str, Step] = STEPS
) -> Iterator[str]:
    """Take the steps that ``results`` do not know as done, and note what came of them there;
    yields the name of each one that was taken."""
    for name, step in steps.items():
        if results.checks.get(name, "").startswith(_GOOD):
            continue
        tell(name)
        results.checks[name] = _run(step)
        yield name


def failures(results: Results) -> list[str]:
    """Steps that were taken and not done, with what came of them."""
    return [
        f"{name}: {came}" for name, came in results.checks.items() if not came.startswith(_GOOD)
    ]


def _run(step: Step) -> str:
    start = time.perf_counter()
    try:
        ran = subprocess.run(
            [sys.executable, "-m", *step.command],
            cwd=_HERE,
            capture_output=True,
            text=True,
            timeout=step.seconds,
        )
    except subprocess.TimeoutExpired:
        return f"cut off after {step.seconds:.0f} s"
    lines = (ran.stdout + ran.stderr).strip().splitlines() or [""]
    how = _GOOD if ran.returncode == 0 else f"failed with {ran.returncode}"
    return f"{how} in {time.perf_counter() - start:.0f} s: {lines[-1]}"
