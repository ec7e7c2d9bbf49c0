"""The benchmark suite: what it measures, keeps and says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmfast
from benchmarks import (
    cases,
    contest,
    goals,
    levels,
    memory,
    peers,
    plots,
    report,
    subjects,
    tables,
    timing,
)
from benchmarks.composites import COMPOSITES
from benchmarks.results import FILE, Results, Row
from mmfast import backends
from mmfast.registry import OPS

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FACTS = {
    "device": "some processor",
    "device_type": "cpu",
    "versions": {"mmfast": "0", "torch": "2"},
    "platform": {"cores": 2},
    "extension": {"isa": "avx2"},
}


def row(subject: str, kind: str, seconds: float | None, **more) -> Row:
    fields = {
        "op": "nearest_code",
        "case": "n65536_k1024_d64",
        "shape": {"N": 65536, "K": 1024, "D": 64},
        "data": "Gaussian",
        "sweep": None,
        "threads": 2,
        "low": seconds,
        "high": seconds,
        "rounds": 3,
        "measured": 65536,
        "match": "",
    }
    return Row(subject=subject, kind=kind, seconds=seconds, **{**fields, **more})


@pytest.fixture
def results() -> Results:
    rows = [
        row("mmfast (cpp)", "mmfast", 0.01, memory=1 << 20, gflops=800.0),
        row("torch.mm", "floor", 0.1, match=None, memory=1 << 28),
        row("faiss flat", "peer", 0.04, match="3 of 65536 wrong", memory=1 << 24),
        row("absent", "peer", None, note="not installed"),
        row("mmfast (cpp)", "mmfast", 0.02, case="s", sweep="K, image patches"),
        row("faiss flat", "peer", 0.04, case="s", sweep="K, image patches"),
    ]
    return Results(FACTS, {2: {"bfloat16 GFLOP/s": 1000.0}}, rows)


def test_every_op_has_cases_and_contenders():
    assert {c.op for c in cases.all_cases() if c.quick} >= {*OPS, "kmeans"}
    assert {c.op for c in cases.all_cases()} == {*OPS, *COMPOSITES}
    for op in [*OPS, *COMPOSITES]:
        kinds = {s.kind for s in subjects.subjects(op)}
        # An op without kernels is its reference.
        own = "reference" if op in OPS and not OPS[op].backends else "mmfast"
        assert {own, "peer"} <= kinds, op


def test_peers_are_held_to_every_lower_level():
    if backends.extension_missing():
        pytest.skip("the compiled extension is absent")
    assert set(backends.extension().supported_isas()[:-1]) <= set(levels._PEERS)


def test_case_names_are_unique():
    keys = [c.key for c in cases.all_cases()]
    assert len(set(keys)) == len(keys)


def test_judge_counts_wrong_indices():
    arguments = (torch.randn(50, 4), torch.randn(9, 4), "euclidean")
    truth = subjects.expected("nearest_code", arguments)
    indices = truth[0].clone()
    assert subjects.judge("nearest_code", indices, arguments, truth) == ""
    indices[7] += 1
    assert subjects.judge("nearest_code", indices, arguments, truth) == "1 of 50 wrong"
    assert "1 of 50" in subjects.judge("nearest_code", (indices, truth[1]), arguments, truth)


def test_judge_finds_a_worse_codebook():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    init, iterations = x[:5].clone(), 2
    arguments = (x, init, iterations)
    truth = subjects.expected("kmeans", arguments)
    codes = mmfast.kmeans(x, 5, init=init, iterations=iterations, tolerance=0).codebook
    assert subjects.judge("kmeans", codes, arguments, truth) == ""
    codes[2] *= 1.1
    assert subjects.judge("kmeans", codes, arguments, truth).startswith("inertia +")


def test_judge_finds_a_wrong_step():
    x, codebook, gradient = (torch.randn(n, 3) for n in (50, 5, 50))
    arguments = (x, codebook, gradient)
    truth = subjects.expected("vector_quantize_step", arguments)
    to_x, codes = COMPOSITES["vector_quantize_step"].make(*arguments)()
    assert subjects.judge("vector_quantize_step", (to_x, codes), arguments, truth) == ""
    to_x[7] += 1
    wrong = subjects.judge("vector_quantize_step", (to_x, codes), arguments, truth)
    assert wrong == "1 of 50 gradients wrong"


def test_results_of_fewer_rows():
    x, codebook = torch.randn(50, 4), torch.randn(9, 4)
    for op, arguments in (
        ("nearest_code", (x, codebook, "euclidean")),
        ("vector_quantize", (x, codebook, "euclidean", "none", None)),
    ):
        case = cases.Case(op, "", {"N": 50}, "", lambda _: ())
        given = peers.of(op).first_rows(arguments, 20)
        truth = contest.truth_of(case, subjects.expected(op, arguments), given, 20)
        assert subjects.judge(op, OPS[op].reference(*given), given, truth) == ""


def test_contenders_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.interleave(calls, CPU, seconds=0)
    assert set(times) == {"a", "b"}
    for taken in times.values():
        assert taken.rounds == 2
        assert 0 < taken.low <= taken.median <= taken.high
    turns = [a for a, b in zip(order, [*order[1:], ""], strict=True) if a != b]
    assert len(turns) >= 4


def test_threads_are_limited():
    before = torch.get_num_threads()
    with timing.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_memory_of_a_call():
    size = 64 << 20
    taken = memory.peak(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if taken is None:
        pytest.skip("this system does not tell")
    assert 0.9 * size < taken < 1.5 * size


def test_results_survive_the_disk(results, tmp_path):
    results.save(tmp_path)
    assert Results.load(tmp_path) == results
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"facts": {}, "ceilings": {}, "rows": [{"op": 1}]}']
)
def test_foreign_results_are_refused(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match="does not hold results of this version"):
        Results.load(tmp_path)


def test_measured_again_replaces(results):
    again = dataclasses.replace(results.rows[0], seconds=0.5)
    before = len(results.rows)
    results.replace([again])
    assert len(results.rows) == before
    assert again in results.rows


def test_goals(results):
    reached = {g.what: g for g in goals.goals(results)}
    against_mm = reached["65536 x 1024 x 64, Gaussian: against torch.mm"]
    assert (against_mm.reached, against_mm.met) == ("10.0x", True)
    results.replace([row("mmfast (cpp)", "mmfast", 0.039, memory=17 << 20, match="2 wrong")])
    reached = {g.what: g.met for g in goals.goals(results)}
    assert not reached["65536 x 1024 x 64, Gaussian: against faiss flat"]
    assert not reached["every index the float64 argmin"]
    assert not reached["memory of nearest_code at most, outputs included (65536 x 1024 x 64)"]


def test_tables_show_what_is_wrong_and_slower(results):
    results.rows.append(row("quick", "peer", 0.005))
    text = tables.all_tables(results)[0].markdown()
    assert "| mmfast (cpp) | 10 ms | ±0 % | - | 800 | 80 % | - | 1.0 MiB | ✓ |" in text
    assert "| 4x faster |" in text
    assert "| 2x slower |" in text
    assert "3 of 65536 wrong" in text
    assert "no result" in text
    assert "absent" not in text


def test_report(results, tmp_path):
    pytest.importorskip("matplotlib")
    text = report.write(results, tmp_path).read_text()
    assert "absent did not run: not installed" in text
    for picture in ("speedup", "memory", "patches"):
        assert f"({picture}.png)" in text
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000


def test_no_plots_without_rows(tmp_path):
    assert plots.draw(Results(FACTS), tmp_path) == []


def test_readme_keeps_the_rest(results, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    report.update_readme(results, path)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "**10 ms** | 40 ms (faiss flat), 4.0x | 100 ms, 10.0x |" in text
    path.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        report.update_readme(results, path)


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command(tmp_path):
    options = ["--device", "cpu", "--only", "tiny", "--subjects", "mmfast|addmm"]
    options += ["--seconds", "0.01", "--threads", "1", "--out", str(tmp_path)]
    ran = benchmarks(*options)
    assert ran.returncode == 0, ran.stderr
    assert "addmm+argmin" in ran.stdout
    assert "report.md" in ran.stdout
    written = json.loads((tmp_path / FILE).read_text())["rows"]
    assert {r["subject"] for r in written if r["seconds"]} >= {"addmm+argmin"}
    assert all(r["match"] in ("", None) for r in written)
    before = (tmp_path / FILE).stat().st_mtime_ns
    assert benchmarks(*options, "--resume").returncode == 0
    assert (tmp_path / FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nothing_like_it"], "no case matches --only 'nothing_like_it'"),
        (["--only", "("], "--only is no regular expression"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    ran = benchmarks(*options)
    assert ran.returncode == 2
    assert message in ran.stderr
