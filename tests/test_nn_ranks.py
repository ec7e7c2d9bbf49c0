"""Modules in several processes: nn_*_ranks.py have the checks."""

from __future__ import annotations

import multiprocessing

import nn_killed_ranks
import nn_many_ranks
import nn_sharded_ranks
import nn_wrapped_ranks
import pytest

CHECKS = {
    "whole": nn_many_ranks.CHECKS + nn_wrapped_ranks.CHECKS,
    "sharded": nn_sharded_ranks.CHECKS,
}


def run(processes):
    """Start them, and end what does not end by itself."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
        process.join()


@pytest.mark.parametrize("codebooks", CHECKS)
def test_many_ranks(codebooks, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=nn_many_ranks.work, args=(rank, str(tmp_path), CHECKS[codebooks]))
        for rank in range(nn_many_ranks.RANKS)
    ]
    run(processes)
    reports = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    failures = "\n".join(report for report in reports if report != "done")
    assert not failures, failures
    assert [p.exitcode for p in processes] == [0] * len(processes)
    assert len(reports) == len(processes)


def test_a_killed_rank_is_reported(tmp_path):
    """The others raise soon, and say at what, wherever it was."""
    process = multiprocessing.get_context("spawn").Process(
        target=nn_killed_ranks.work, args=(str(tmp_path),)
    )
    run([process])
    assert process.exitcode == 0
    report = (tmp_path / "report.txt").read_text()
    assert report == "done", report
