"""``mmfast bench``: answers are checked before they are timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import normal
from command_models import refused, run

from mmfast import comparison
from mmfast.commands import bench
from mmfast.comparison import Case

SHORT = {
    "nearest_code": lambda x, codes: (x[:100], codes[:50]),
    "scaled_dot_product_attention": lambda *qkv: tuple(t[:1, :2, :33] for t in qkv),
    "layer_norm_modulate": lambda x, c: (x[:, :5], c),
    "geglu": lambda x: (x[:1, :3],),
    "sampler_step": lambda *tensors: tuple(t.narrow(-1, 0, 8) for t in tensors),
}


@pytest.fixture
def short(monkeypatch):
    """The same problems, smaller."""
    cases = [
        case._replace(arguments=SHORT[case.op](*case.arguments))
        for case in comparison.cases(torch.device("cpu"))
    ]
    monkeypatch.setattr(comparison, "cases", lambda device: cases)
    return cases


def test_both_sides_of_every_case_are_right(short):
    """The plain formulation is the same problem: in float64 it gives the truth."""
    assert len(short) == comparison.COUNT
    assert {case.op for case in short} == set(SHORT)
    for case in short:
        measured = comparison.measure(case, 0)
        assert (measured.own_match, measured.plain_match) == ("", "")
        assert measured.own > 0
        assert measured.plain > 0


def test_table_and_json(short, capsys):
    status, out, _ = run(capsys, "bench", "--seconds", 0, "--device", "cpu")
    assert status == 0
    for word in (*SHORT, "float32", "Match", "yes", "mmfast bench --all"):
        assert word in out
    status, out, _ = run(capsys, "bench", "--seconds", 0, "--device", "cpu", "--json")
    assert [row["op"] for row in json.loads(out)] == [case.op for case in short]


def test_a_wrong_answer_is_told(capsys, monkeypatch):
    x, wrong = normal(4, 3), torch.tensor([0, 1, 2, 2])
    cases = [
        Case("even", "4", lambda x: x + 1e-3, torch.clone, torch.clone, (x,)),
        Case("odd", "4", lambda x: x[:3], torch.clone, torch.clone, (x,)),
        Case("index", "4", lambda x: wrong, lambda x: wrong, lambda x: torch.arange(4), (x,)),
    ]
    monkeypatch.setattr(comparison, "cases", lambda device: cases)
    status, out, _ = run(capsys, "bench", "--seconds", 0, "--device", "cpu", "--json")
    assert status == 1
    even, odd, index = json.loads(out)
    assert even["own_match"].startswith("off by ")
    assert even["plain_match"] == ""
    assert odd["own_match"] == "shape (3, 3), expected (4, 3)"
    assert index["own_match"] == index["plain_match"] == "1 of 4 wrong"


def test_the_benchmarks_of_a_checkout(capsys, monkeypatch, tmp_path):
    """What follows --all is for them; without a checkout it says where they are."""
    called = []

    def fake(command, **options):
        called.append((command, options))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(bench.subprocess, "run", fake)
    assert run(capsys, "bench", "--all", "--quick", "--only", "nearest")[0] == 3
    words = [sys.executable, "-m", "benchmarks", "--quick", "--only", "nearest"]
    assert called == [(words, {"cwd": Path(__file__).parent.parent})]
    monkeypatch.setattr(bench, "_CHECKOUT", tmp_path)
    said = refused(capsys, "bench", "--all")
    assert "in a checkout of its repository run python -m benchmarks" in said


def test_what_is_refused(capsys):
    assert "--device must be cpu or cuda" in refused(capsys, "bench", "--device", "meta")
    with pytest.raises(SystemExit) as stop:
        run(capsys, "bench", "--seconds", "long")
    with pytest.raises(SystemExit):
        run(capsys, "bench", "--seconds", "-1")
    assert stop.value.code == 2
