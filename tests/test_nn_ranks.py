"""Modules in several processes: nn_many_ranks.py has the checks."""

from __future__ import annotations

import multiprocessing
import signal

import nn_many_ranks


def test_many_ranks(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=nn_many_ranks.work, args=(rank, str(tmp_path)))
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
