"""Modules in several processes: nn_many_ranks.py and nn_sharded_ranks.py have the checks."""

from __future__ import annotations

import multiprocessing
import signal

import nn_many_ranks
import nn_sharded_ranks
import pytest


@pytest.mark.parametrize("checks", [nn_many_ranks, nn_sharded_ranks], ids=lambda m: m.__name__)
def test_many_ranks(checks, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=checks.work, args=(rank, str(tmp_path)))
        for rank in range(nn_many_ranks.RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
        process.join()
    reports = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    failures = "\n".join(report for report in reports if report != "done")
    assert not failures, failures
    assert [p.exitcode for p in processes] == [0] * (len(processes) - 1) + [-signal.SIGKILL]
    assert len(reports) == len(processes) - 1
