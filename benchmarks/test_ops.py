"""The cases as pytest-benchmark tests: ``pytest benchmarks -k "n65536_k1024_d64 and mmfast"``.

For work on one kernel, with ``--benchmark-compare`` and the like. They run one after another; for
comparisons between contenders ``python -m benchmarks`` lets them take turns.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks import contest
from benchmarks.cases import Case, all_cases
from benchmarks.subjects import Subject, expected, subjects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = [(c, s) for c in all_cases() if c.sweep is None for s in subjects(c.op)]


@functools.lru_cache(maxsize=1)
def _problem(case: Case) -> tuple[tuple[Any, ...], Any]:
    arguments = case.make(DEVICE)
    return arguments, expected(case.op, arguments)


@pytest.mark.parametrize(
    ("case", "subject"), PAIRS, ids=[f"{c.key}-{s.name.replace(' ', '_')}" for c, s in PAIRS]
)
def test_speed(benchmark: Any, case: Case, subject: Subject) -> None:
    arguments, truth = _problem(case)
    entry = contest.enter(case, subject, arguments, truth, DEVICE, contest.Effort(0.0))
    if isinstance(entry, str):
        pytest.skip(entry)
    if subject.kind == "mmfast":
        assert entry.match == ""
    benchmark.group = case.key
    benchmark.extra_info.update(
        shape=dict(case.shape), measured=entry.rows, match=entry.match, memory=entry.memory
    )

    def call() -> None:
        entry.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark(call)
