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
from benchmarks import __main__ as command
from benchmarks import (
    cases,
    contest,
    goals,
    gpu_attention,
    levels,
    loops,
    peers,
    plots,
    ratios,
    report,
    schedulers,
    subjects,
    tables,
    training,
    transformers,
    vqvae,
)
from benchmarks.composites import COMPOSITES
from benchmarks.results import FILE, Curve, Results, Row
from benchmarks.spent import Spent
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
    curves = [Curve("mmfast", [2.0], [2], [0.5], ["1"], 1.0)]
    return Results(FACTS, {2: {"bfloat16 GFLOP/s": 1000.0}}, rows, curves)


def test_every_op_has_cases_and_contenders():
    assert {c.op for c in cases.all_cases() if c.quick} >= {*OPS, "kmeans"}
    of_gpus = {gpu_attention.STEP, loops.OP}
    assert {c.op for c in cases.all_cases()} == {*OPS, *COMPOSITES} - of_gpus
    for op in [*OPS, *COMPOSITES]:
        kinds = {s.kind for s in subjects.subjects(op)}
        # An op without kernels is its reference.
        own = "reference" if op in OPS and not OPS[op].backends else "mmfast"
        assert {own, "peer"} <= kinds, op


def test_peers_are_held_to_every_lower_level():
    if backends.extension_missing():
        pytest.skip("the compiled extension is absent")
    lower = set(backends.extension().supported_isas()[:-1])
    assert lower - levels._SAME.keys() <= levels._PEERS.keys()


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
    for make in COMPOSITES["vector_quantize_step"].makes.values():
        to_x, codes = make(*arguments)()
        assert subjects.judge("vector_quantize_step", (to_x, codes), arguments, truth) == ""
        to_x[7] += 1
        wrong = subjects.judge("vector_quantize_step", (to_x, codes), arguments, truth)
        assert wrong == "1 of 50 gradients wrong"


def modules_problem(op: str) -> tuple:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    if op == "fsq_step":
        return normal(40, 3), normal(41, 3)[1:], [8, 5, 5]
    if op in schedulers.OPS:
        setting = schedulers.SETTINGS[1]  # without noise of its own
        return schedulers.arguments(setting, (2, 3, 4, 5), CPU)
    if op == vqvae.OP:
        pytest.importorskip("skimage")
        return vqvae.arguments(vqvae.Setting(2, 32, 50, 6, (4, 8)), CPU)
    if op.startswith("lfq"):
        return normal(40, 6), normal(41, 6)[1:]
    if op == gpu_attention.STEP:
        return gpu_attention.arguments((2, 3, 20, 8), CPU)
    if op in (*transformers.OPS, loops.OP):
        setting = transformers.Setting("small", 8, 2, 2, 2, 5)
        if op == loops.OP:
            return loops.arguments(loops.Setting(setting, 3, (2, 5, 16)), CPU)
        return transformers.arguments(setting, CPU)
    codes = normal(2, 9, 4) if op.startswith("residual") else normal(9, 4)
    return normal(50, 4), codes, *([normal(51, 4)[1:]] if op.endswith("step") else [])


@pytest.mark.parametrize("op", [op for op in COMPOSITES if op != "kmeans"])
def test_modules_and_their_peers_do_the_same(op):
    arguments = modules_problem(op)
    truth = subjects.expected(op, arguments)
    for subject in subjects.subjects(op):
        if subject.reasons(arguments) or subject.kind == "compile":
            continue
        call = subject.peer.make(*arguments)
        result = call()
        if subject.kind == "floor":
            continue
        # The library's LFQ has another gradient where a probability is tiny.
        if (op, subject.name) == ("lfq_step", goals.LIBRARY):
            result = (truth[0], result[1])
        assert subjects.judge(op, result, arguments, truth) == "", subject.name
        if op == "scheduler_step":  # the next call is the next step
            continue
        again = call()
        assert all(torch.equal(a, b) for a, b in zip(again[1:], result[1:], strict=True))


def test_points_of_curves_are_judged_in_part():
    case = cases._gaussian(5000, 4, 3, "x", "N")
    assert case.judged < 5000
    arguments = case.make(CPU)
    truth, reference = contest._truth(case, arguments, CPU, None)
    assert len(truth[0]) == case.judged
    assert reference is None  # only a part of the problem
    own = subjects.subjects("nearest_code")[0]
    entry = contest.enter(case, own, arguments, truth, CPU, contest.Effort(0.0))
    assert (entry.rows, entry.match) == (5000, "")


def test_truths_are_shared(tmp_path):
    case = cases._gaussian(50, 4, 3, "x")
    truth, _ = contest._truth(case, case.make(CPU), CPU, tmp_path)
    again, _ = contest._truth(case, (), CPU, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(truth, again, strict=True))


def test_compiling_can_be_left_out():
    case = next(c for c in cases.all_cases() if c.op == "code_statistics")
    assert case.op not in contest.COMPILED
    (compiled,) = (s for s in subjects.subjects(case.op) if s.kind == "compile")
    entry = contest.enter(case, compiled, (), None, CPU, contest.Effort(0.0))
    assert entry == contest.ABSENT
    row_ = row("torch.compile", "compile", None, note=entry)
    others = [row("mmfast (cpp)", "mmfast", 0.01), row_]
    assert contest.ABSENT in tables.all_tables(Results(FACTS, {}, others))[0].markdown()


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


def test_the_truth_is_the_references_sample(monkeypatch):
    monkeypatch.setattr(contest, "_QUICK", 0.0)
    case = cases._gaussian(50, 4, 3, "x")
    rows = contest.run(
        case, CPU, [1], contest.Effort(0.0), lambda name: "ref" in name, lambda _: None, Spent()
    )
    assert [(r.rounds, r.match, r.measured) for r in rows] == [(1, "", 50)]


def test_others_are_judged_in_one_shape_of_an_op():
    of_an_op = [c for c in cases.all_cases() if c.op == "sampler_step" and not c.full]
    others = [s for s in subjects.subjects("sampler_step") if s.kind == "peer"]
    own = subjects.subjects("sampler_step")[0]
    for effort, wanted in ((contest.Effort(0.0), 1), (contest.Effort(0.0, full=True), 5)):
        assert sum(contest._is_judged(c, others[0], effort) for c in of_an_op) == wanted
        assert all(contest._is_judged(c, own, effort) for c in of_an_op)


def test_a_cut_problem_needs_new_pages_like_the_whole(monkeypatch):
    op, n = "vector_quantize_eval", 60_000
    case = cases.Case(op, "", {"N": n, "K": 2048, "D": 2}, "", lambda _: ())
    (library,) = (s for s in subjects.subjects(op) if s.name == goals.LIBRARY)
    seen = []
    peer = dataclasses.replace(library.peer, make=lambda x, _: lambda: seen.append(len(x)))
    contender = dataclasses.replace(library, peer=peer)
    monkeypatch.setattr(contest.timing, "once", lambda *_: (1.0, None))  # too slow for more
    monkeypatch.setattr(contest, "_free_memory", lambda _: 1 << 40)
    arguments = (torch.zeros(n, 2), torch.zeros(2048, 2))
    given, rows, warm = contest._cut(case, contender, arguments, CPU, 0.05)
    assert len(given[0]) == rows == contest._NEW_PAGES // (4 * 2048)
    assert set(seen) == {contest._CUT_LEAST}
    assert warm


def test_training_is_the_same_with_every_backend(monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(training, "CODES", 16)
    monkeypatch.setattr(training, "_BATCH", 2)
    curves = training.run(3, lambda _: None)
    own, reference = curves[:2]
    assert own.subject == training.KERNELS
    assert reference.subject == training.REFERENCE
    assert own.agrees(reference) == len(own.digests) == 3
    assert own.used == reference.used
    assert own.perplexity == reference.perplexity
    assert all(1 <= p <= used for p, used in zip(own.perplexity, own.used, strict=True))


def test_curves_that_part():
    a, b = Curve("a", digests=["1", "2", "3"]), Curve("b", digests=["1", "0", "3"])
    assert (a.agrees(a), a.agrees(b)) == (3, 1)
    text = tables._training_table(
        [dataclasses.replace(c, error=[0.1], used=[2], perplexity=[1.5]) for c in (a, a, b)]
    ).markdown()
    assert "| a | 0 us | 0.1 | 2 | 1.5 | identical in all 3 steps |" in text
    assert "differ at step 1" in text


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


def test_goals_of_modules():
    def step(subject: str, kind: str, seconds: float, **more) -> Row:
        return row(subject, kind, seconds, op="vector_quantize_step", **more)

    results = 65536 * (2 * 4 * 64 + 8)  # quantised vectors, gradients and indices
    rows = [
        step("mmfast.nn", "mmfast", 0.02, memory=results + (1 << 20)),
        step("mmfast, functions", "mmfast", 0.01),
        step("torch.compile", "compile", 0.01),
        step("lookup alone", "floor", 0.015),
        step(goals.LIBRARY, "peer", 0.32, memory=results + (10 << 20)),
        step(goals.LIBRARY, "peer", 0.64, memory=results + (10 << 20), threads=1),
        step("mmfast.nn", "mmfast", 0.04, memory=results + (1 << 20), threads=1),
    ]
    prefix = "vector_quantize_step, 65536 x 1024 x 64: "
    found = goals.goals(Results(FACTS, {}, rows))
    reached = {g.what.removeprefix(prefix): (g.reached, g.met) for g in found if g.threads == 2}
    assert [(g.threads, g.reached) for g in found if g.threads == 1] == [(1, "16.0x")]
    assert reached == {
        "against torch.compile": ("0.50x", False),
        "of lookup alone, at most": ("1.33x", True),
        f"against {goals.LIBRARY}": ("16.0x", True),
        f"memory beside its results, of {goals.LIBRARY}'s at most": ("1.0 of 10.0 MiB", False),
    }
    rows = [dataclasses.replace(r, op="residual_vq_step") for r in rows]
    (memory_goal,) = (g for g in goals.goals(Results(FACTS, {}, rows)) if "memory" in g.what)
    assert (memory_goal.wanted, memory_goal.met) == ("less", True)


def test_goals_of_ops():
    of = {"op": "scaled_dot_product_attention", "case": "2x16x256x72_bfloat16"}
    rows = [
        row("mmfast (cpp)", "mmfast", 0.01, **of),
        row("SDPA", "peer", 0.019, **of),
        row("torch.mm", "floor", 0.006, **of),
        row("plain torch", "peer", 0.001, **of),
    ]
    prefix = "scaled_dot_product_attention, 2x16x256x72_bfloat16: against "
    assert {
        g.what.removeprefix(prefix): (g.wanted, g.reached, g.met)
        for g in goals.goals(Results(FACTS, {}, rows))
    } == {"SDPA": ("2x", "1.9x", False), "torch.mm": ("0.55x", "0.60x", True)}


def test_goals_are_of_cases():
    known = {(case.op, case.name) for case in cases.all_cases()}
    assert set(ratios.RATIOS) <= known


def test_tables_show_what_is_wrong_and_slower(results):
    results.rows.append(row("quick", "peer", 0.005))
    text = tables.all_tables(results)[0].markdown()
    assert "| mmfast (cpp) | 10 ms | ±0 % | - | 800 | 80 % | - | 1.0 MiB | ✓ |" in text
    assert "| 4x faster |" in text
    assert "| 2x slower |" in text
    assert "3 of 65536 wrong" in text
    assert "absent" not in text


def test_report(results, tmp_path):
    pytest.importorskip("matplotlib")
    more = tables.Table("More", ("", "a"))
    more.add("", ["b", "c"])
    text = report.write(results, tmp_path, [more]).read_text()
    assert "## More" in text
    assert "absent did not run: not installed" in text
    for picture in ("speedup", "memory", "patches", "training"):
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
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
