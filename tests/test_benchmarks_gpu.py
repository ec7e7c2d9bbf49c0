"""What is measured on a GPU, as far as that can be told without one.

Meta tensors have shapes and dtypes, and no numbers: with them cases are made and contenders called
at their real sizes, on a device that is not the CPU. With numbers, on the CPU, small ones are.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from cases import normal
from test_benchmarks import row
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode

from benchmarks import __main__ as command
from benchmarks import (
    contest,
    gpu,
    gpu_attention,
    gpu_attention_peers,
    gpu_cases,
    gpu_goals,
    gpu_peers,
    gpu_time,
    loops,
    machine,
    peers,
    report,
    tables,
    timing,
    warm,
    watch,
)
from benchmarks.modules import Step
from benchmarks.peers import kmeans as peer_kmeans
from benchmarks.results import Results, Row
from benchmarks.subjects import expected, judge, own, subjects
from mmfast.registry import OPS

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
CASES = gpu_cases.gpu_cases()
FACTS = {
    "device": "some GPU",
    "device_type": "cuda",
    "versions": {"mmfast": "0", "torch": "2"},
    "platform": {"cores": 2},
    "extension": {"isa": "avx2"},
}


def test_every_op_takes_part_once():
    every = gpu_cases.all_cases()
    assert {c.op for c in every} >= {*OPS, "kmeans", "dit_step", "dit_eval"}
    assert len({c.key for c in every}) == len(every)
    assert {c.op for c in every if not c.full} >= set(OPS)


def test_shapes_of_the_models():
    shapes = {(c.op, c.shape["K"], c.shape["D"]) for c in CASES}
    attention = "scaled_dot_product_attention"
    for op in (attention, f"{attention}_bwd"):
        assert {k for name, k, d in shapes if (name, d) == (op, 72)} == {256, 1024, 4096, 16384}
        assert {d for name, k, d in shapes if (name, k) == (op, 4096)} == {
            64, 72, 80, 88, 96, 112, 128,
        }  # fmt: skip
    joint = {k for name, k, _ in shapes if name == "joint_attention"}
    assert joint == {4096 + 333, 4096 + 512, 32760 + 512}
    codes = {k for name, k, _ in shapes if name == "nearest_code"}
    assert codes >= {1024, 8192, 65536, 262144}
    assert {k for name, k, _ in shapes if name == "kmeans"} == {1024, 65536}
    # Numbers of all kinds meet products of as many codes and dimensions.
    products = [c for c in CASES if c.op == "nearest_code" and c.shape["D"] >= 64]
    assert {c.data.split(",")[0] for c in products} == {
        "Gaussian", "Gaussian + 100", "image patches",
    }  # fmt: skip
    kinds = {c.key.rpartition("_")[2] for c in CASES if c.op == "gated_residual_modulate"}
    assert kinds == {"float32", "bfloat16"}


class WithoutNumbers(TorchFunctionMode):
    """Random numbers are not drawn."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function in (torch.randn, torch.rand) and "device" not in options:
            options.pop("generator", None)
            options["device"] = "meta"
        return function(*arguments, **options)


def metas_of(case):
    arguments = case.make(META)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    assert tensors
    assert all(t.is_meta for t in tensors)
    return arguments


def comparable(op: str) -> list[tuple[str, peers.Peer]]:
    """Contenders whose calls can be traced without numbers."""
    found = list(gpu_peers.of(op).items())
    others = peers.of(op)
    found += [] if others is None else others.PEERS.items()
    untraced = "torch.compile", gpu_attention_peers.FLEX
    return [(name, p) for name, p in found if not name.endswith(untraced)]


# What reads numbers on the host is not traced: the references of searches, samplers' rows.
TRACED = [
    case
    for case in CASES
    if case.op.startswith(
        (
            "scaled_dot",
            "joint",
            "gated",
            "layer_norm",
            "qk_norm",
            "add_noise_bwd",
        )
    )
    and (case.quick or case.name.endswith("bfloat16"))
]


@pytest.mark.parametrize("case", TRACED, ids=lambda c: c.key)
def test_real_sizes_on_a_device_that_is_not_there(case):
    with WithoutNumbers():
        arguments = metas_of(case)
        outputs = OPS[case.op].fake(*arguments)
        wanted = [t.shape for t in outputs] if isinstance(outputs, tuple) else [outputs.shape]
        for name, peer in comparable(case.op):
            if peer.missing() or peer.unsupported(*arguments):
                continue
            result = peer.make(*arguments)()
            first = result[0] if isinstance(result, tuple) else result
            assert first.is_meta, name
            assert peer.floor or first.shape == wanted[0], name


def test_who_takes_part_in_lookups():
    """Those that the goals name, on a GPU without being asked for."""
    names = {s.name for s in subjects("nearest_code")} | set(gpu_peers.of("nearest_code"))
    assert names >= {
        "torch.compile", gpu_peers.COMPILED_TF32, "addmm+argmin", "cdist+argmin", "KeOps",
        "vector-quantize-pytorch", gpu_peers.FLASH_KMEANS, gpu_peers.BF16_PRODUCT,
        gpu_peers.TF32_PRODUCT,
    }  # fmt: skip
    names = {s.name for s in subjects("kmeans")} | set(gpu_peers.of("kmeans"))
    assert names >= {"torch.compile", "plain torch", gpu_peers.FLASH_KMEANS}
    assert all(c.compiled for c in CASES if c.op == "kmeans")


def test_flash_kmeans(monkeypatch):
    """How it is called, by functions of its signatures; its kernels need a GPU."""

    def assign(x, centroids, x_sq):
        assert x_sq.shape == x.shape[:2]
        return torch.cdist(x, centroids).argmin(2).int()

    def kmeans(x, n_clusters, max_iters=100, tol=0.0, init_centroids=None, verbose=False):
        assert (n_clusters, tol) == (init_centroids.shape[1], -1.0)
        found = init_centroids[0].clone()
        init_centroids.zero_()
        return None, peer_kmeans.PLAIN(x[0], found, max_iters)[None], max_iters

    package, assigning = ModuleType("flash_kmeans"), ModuleType("assign_euclid_triton")
    package.batch_kmeans_Euclid, assigning.euclid_assign_triton = kmeans, assign
    monkeypatch.setitem(sys.modules, "flash_kmeans", package)
    monkeypatch.setitem(sys.modules, "flash_kmeans.assign_euclid_triton", assigning)
    x, codebook = normal(50, 8), normal(9, 8, seed=1)
    call = gpu_peers.of("nearest_code")[gpu_peers.FLASH_KMEANS].make(x, codebook, "euclidean")
    arguments = x, codebook, "euclidean"
    assert judge("nearest_code", call(), arguments, expected("nearest_code", arguments)) == ""
    arguments = (x, x[:9].clone(), 3)
    call = gpu_peers.of("kmeans")[gpu_peers.FLASH_KMEANS].make(*arguments)
    for _ in range(2):  # the initial codes are as they were
        assert judge("kmeans", call(), arguments, expected("kmeans", arguments)) == ""


def test_products_of_tf32_leave_the_precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    x, codebook = normal(50, 8), normal(9, 8, seed=1)
    peer = gpu_peers.of("nearest_code")[gpu_peers.TF32_PRODUCT]
    seen = []
    product = torch.mm

    def seeing(*factors):
        seen.append(torch.get_float32_matmul_precision())
        return product(*factors)

    with mock.patch.object(torch, "mm", seeing):
        peer.make(x, codebook, "euclidean")()
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before


def test_lookups_ask_for_products_of_their_dtype():
    with WithoutNumbers():
        for case in CASES:
            if case.op != "nearest_code" or "patches" in case.name:
                continue
            x, codebook, metric = metas_of(case)
            for name, peer in gpu_peers.of(case.op).items():
                if not peer.floor:
                    continue
                if peer.unsupported(x, codebook, metric):
                    assert name == gpu_peers.TF32_PRODUCT
                    assert x.dtype == torch.bfloat16
                    continue
                product = peer.make(x, codebook, metric)()
                assert product.shape == (case.shape["N"], case.shape["K"])
                assert (product.dtype == torch.bfloat16) == (name == gpu_peers.BF16_PRODUCT)
                size = product.numel() * product.element_size()
                assert peer.workspace(x, codebook, metric) == size


SMALL = {c.op: c for c in reversed(gpu_cases.gpu_cases(64)) if "patches" not in c.name}


@pytest.mark.parametrize("op", [op for op in SMALL if not op.startswith(("dit", "sampler", "add"))])
def test_small_ones_with_numbers(op, monkeypatch):
    """mmfast's answers are right, and so are those of peers that are there on a GPU alone."""
    monkeypatch.setattr(gpu_attention_peers, "_compiled_flex", lambda: flex_attention)
    forward = "scaled_dot_product_attention", "joint_attention", "varlen_attention"
    case = SMALL[op]
    arguments = case.make(CPU)
    truth = expected(op, arguments)
    contenders = [s.peer for s in subjects(op) if s.kind == "mmfast"]
    for peer in contenders:
        if not peer.missing() and not peer.unsupported(*arguments):
            assert judge(op, peer.make(*own(op, arguments))(), arguments, truth) == ""
    for name, peer in gpu_peers.of(op).items():
        if peer.floor or "efficient" in name or "cuDNN" in name or peer.missing():
            continue
        # FlexAttention has no gradients on a CPU.
        if op not in forward and name.endswith(gpu_attention_peers.FLEX):
            continue
        if name == "torch.compile" or peer.unsupported(*arguments):
            continue
        result = peer.make(*arguments)()
        first = result[0] if isinstance(result, tuple) else result
        want = truth[0] if isinstance(truth, tuple) else truth
        assert float((first.double() - want.double()).norm() / want.double().norm()) < 0.02, name


def measured(subject: str, kind: str, seconds: float, op: str, case: str, **more) -> Row:
    shape = {"N": 1024, "K": 256, "D": 72, **more.pop("shape", {})}
    fields = {"op": op, "case": case, "shape": shape, "threads": 1, **more}
    return row(subject, kind, seconds, **fields)


def goals_of(*rows: Row) -> dict[str, tuple[str, str, bool]]:
    results = Results(FACTS, {1: {"copy GB/s": 4000.0}}, list(rows))
    return {g.what: (g.wanted, g.reached, g.met) for g in gpu_goals.goals(results)}


def test_goals_of_streams():
    op, case = "gated_residual_modulate", "dit_xl_1_bfloat16"
    found = goals_of(
        measured("mmfast (triton)", "mmfast", 2e-4, op, case, gbps=1800.0, graph=1e-4),
        measured("plain torch", "peer", 5e-4, op, case),
        measured("torch.compile", "peer", 3e-4, op, case),
    )
    what = f"{op}, dit xl 1 bfloat16"
    # Twice as fast without the host.
    assert found[f"{what}: of the copy's bandwidth"] == ("85 %", "90 %", True)
    assert found[f"{what}: against torch.compile"] == ("1x", "1.50x", True)
    assert found[f"{what}: against plain torch"] == ("3x", "2.50x", False)


def test_goals_of_a_steps_host():
    op, case = "sampler_step", "tiny_multistep_1x4x4x4_float32"
    for seconds, met in ((14e-6, True), (16e-6, False)):
        found = goals_of(measured("mmfast (triton)", "mmfast", seconds, op, case, gbps=1.0))
        assert found["sampler_step: the host's time of a step"][2] is met
        assert not any("bandwidth" in what for what in found)


@pytest.mark.parametrize(("kind", "wanted"), [("bfloat16", "75 %"), ("float32", "60 %")])
def test_goals_of_lookups(kind, wanted):
    op, case, shape = "nearest_code", f"n65536_k8192_d64_{kind}", {"K": 8192, "D": 64}
    own_row = measured("mmfast (triton)", "mmfast", 1e-3, op, case, shape=shape, graph=1e-3)
    product = measured(gpu_peers.BF16_PRODUCT, "floor", 7e-4, op, case, shape=shape, graph=7e-4)
    tf32 = measured(gpu_peers.TF32_PRODUCT, "floor", 2e-3, op, case, shape=shape)
    found = goals_of(own_row, product, tf32)
    what = f"{op}, n65536 k8192 d64 {kind}"
    rate = f"{what}: of the rate of {gpu_peers.BF16_PRODUCT}"
    assert found[rate] == (wanted, "70 %", kind == "float32")
    assert found[f"{what}: against {gpu_peers.TF32_PRODUCT}"] == ("1x", "2.00x", True)


def test_goals_of_narrow_lookups_and_quantisers():
    for op, shape, wanted in (
        ("nearest_code", {"K": 1024, "D": 8}, "5x"),
        ("kmeans", {}, "3x"),
        ("residual_quantize", {}, "3x"),
        ("vector_quantize_step", {}, "6x"),
    ):
        found = goals_of(
            measured("mmfast", "mmfast", 1e-3, op, "a", shape=shape),
            measured("slow", "peer", 9e-3, op, "a", shape=shape),
            measured("quick", "peer", 4e-3, op, "a", shape=shape),
        )
        assert found[f"{op}, a: against quick"] == (wanted, "4.00x", wanted == "3x")


@pytest.mark.parametrize(
    ("width", "backward", "best", "wanted"),
    [
        (72, False, "SDPA, flash", "1.25x"),
        (72, True, "SDPA, flash", "1.2x"),
        (88, True, "SDPA, flash", "1.1x"),
        (64, False, "SDPA, cuDNN", "0.95x"),
    ],
)
def test_goals_of_attention(width, backward, best, wanted):
    op = "scaled_dot_product_attention" + "_bwd" * backward
    shape = {"K": 4096, "D": width}
    rows = [
        measured("mmfast (triton)", "mmfast", 1e-3, op, "a", shape=shape),
        measured("SDPA, flash", "peer", 1.15e-3, op, "a", shape=shape),
        measured("SDPA, cuDNN", "peer", 1.3e-3, op, "a", shape=shape),
        measured("plain torch", "peer", 1e-4, op, "a", shape=shape),
    ]
    (goal,) = (g for what, g in goals_of(*rows).items() if "against" in what)
    assert f"{op}, a: against {best}" in goals_of(*rows)
    assert goal[0] == wanted
    assert goal[2] == (wanted in ("1.1x", "0.95x"))


def test_goals_of_training_and_of_numerics():
    op, flash, math = gpu_attention.STEP, "SDPA, flash", gpu_attention_peers.MATH
    found = goals_of(
        measured("mmfast", "mmfast", 3e-3, op, "dit", errors=[1e-3, 4e-3]),
        measured(flash, "peer", 4e-3, op, "dit", errors=[1e-3, 1e-3]),
        measured(math, "peer", 1e-3, op, "dit", errors=[1e-3, 3e-3]),
        measured("mmfast", "mmfast", 3e-3, op, "long", errors=[1e-3], shape={"K": 2048}),
        measured(flash, "peer", 4e-3, op, "long", shape={"K": 2048}),
        measured(math, "peer", 4e-3, op, "long", errors=[4e-4], shape={"K": 2048}),
    )
    assert found[f"{op}, dit: against {flash}"] == ("1.2x", "1.33x", True)
    assert not any(what.startswith(f"{op}, long: against") for what in found)
    error = f"error against float64, of {math}'s at most"
    assert found[f"{op}, dit: {error}"] == ("2x", "1.33x", True)
    assert found[f"{op}, long: {error}"] == ("2x", "2.50x", False)


def test_goals_of_kernels_in_triton():
    op, shape = "scaled_dot_product_attention", {"K": 4096, "D": 128}
    found = goals_of(
        measured("mmfast", "mmfast", 1e-3, op, "a", shape=shape, gflops=6e5),
        measured(gpu_attention_peers.FLEX, "peer", 9e-4, op, "a", shape=shape),
    )
    assert found[f"{op}, a: against {gpu_attention_peers.FLEX}"] == ("1x", "0.90x", False)
    what = f"{op}, a: more than any kernel in Triton"
    assert found[what] == ("579 TFLOP/s", "600 TFLOP/s", True)


def test_goals_of_masks():
    op, flex = "scaled_dot_product_attention", gpu_attention_peers.FLEX
    found = goals_of(
        measured("mmfast (triton)", "mmfast", 1e-3, op, "padded_a", memory=1 << 20),
        measured("SDPA", "peer", 1.4e-3, op, "padded_a"),
        measured(flex, "peer", 1e-4, op, "padded_a"),
        measured("mmfast (triton)", "mmfast", 1e-3, op, "a", memory=1 << 20),
        measured("mmfast (triton)", "mmfast", 1e-3, "joint_attention", "lengths_a", memory=9 << 20),
        measured("mmfast (triton)", "mmfast", 1e-3, "joint_attention", "a", memory=8 << 20),
        measured("mmfast (triton)", "mmfast", 1e-3, "varlen_attention", "images_a"),
        measured("SDPA of padded", "peer", 1.2e-3, "varlen_attention", "images_a"),
        measured("SDPA in a loop", "peer", 2e-3, "varlen_attention", "images_a"),
    )
    assert found[f"{op}, padded a: against SDPA"] == ("1.3x", "1.40x", True)
    assert found[f"{op}, padded a: memory, of that without a mask"] == ("1.0 MiB", "1.0 MiB", True)
    assert not found["joint_attention, lengths a: memory, of that without a mask"][2]
    against = "varlen_attention, images a: against SDPA of padded"
    assert found[against] == ("1.3x", "1.20x", False)


def test_goals_of_loops():
    shape = {"N": 1, "K": 50, "D": 64}
    found = goals_of(
        measured(loops.GRAPH, "mmfast", 1e-4, loops.OP, "tiny_50_steps", shape=shape),
        measured(loops.PATCHED, "mmfast", 1e-3, loops.OP, "tiny_50_steps", shape=shape),
        measured("plain torch", "peer", 5e-4, loops.OP, "tiny_50_steps", shape=shape),
    )
    what = f"{loops.OP}, tiny 50 steps"
    assert found[f"{what}: against plain torch"] == ("1x", "5.00x", True)
    host = f"{what}: the host's time of a step, without a graph"
    assert found[host] == ("15 us", "20.0 us", False)


def test_ops_bound_by_memory_have_the_contenders_of_their_goals():
    for name in gpu_goals.STREAMS:
        for op in {name, f"{name}_bwd"} & {*OPS}:
            names = [s.name for s in subjects(op)]
            assert len(set(names)) == len(names), op
            assert {"plain torch", "torch.compile"} <= {*names}, op
            shapes = {c.key.partition("/")[2].rpartition("_")[::2] for c in CASES if c.op == op}
            assert {kind for _, kind in shapes} == {"float32", "bfloat16"}, op
            if op.startswith(("gated", "layer_norm", "qk_norm", "sampler", "add_noise")):
                keys = {c.name for c in CASES if c.op == op}
                for model in gpu_cases.MODELS:
                    assert any(key.startswith(model.key) for key in keys), (op, model.key)


def test_a_run_fits_its_minutes():
    """What says most in the call that makes the tests too, and the rest in one that goes on."""
    every = gpu_cases.all_cases()
    tests = sum(s.seconds for name, s in gpu.STEPS.items() if name.startswith("tests"))
    of = {when: sum(s.seconds for s in gpu.STEPS.values() if s.when == when) for when in range(3)}
    tests -= of[gpu.AFTER]
    quick = gpu_time.total(c for c in every if c.quick)
    assert of[gpu.BEFORE] + quick + tests < 60 * gpu.MINUTES
    others = gpu_time.total(c for c in every if not (c.quick or c.full))
    assert of[gpu.BETWEEN] - tests + others < 60 * gpu.MINUTES


def test_ops_take_turns():
    """What is cut off has something of each."""
    every = gpu_cases.all_cases()
    kinds = [(c.full, not c.quick) for c in every]
    assert kinds == sorted(kinds)
    own = [c for c in CASES if c.quick]
    first = [c.op for c in own[: len({c.op for c in own})]]
    assert len(set(first)) == len(first)
    # In the dtype that models have; and products against a float32 codebook, as it is trained.
    names = {c.op: c.name for c in reversed(own)}
    assert names["gated_residual_modulate_bwd"].endswith("bfloat16")
    assert names["sampler_step"].endswith("bfloat16")
    assert names["nearest_code"].endswith("float32")


def test_goals_of_whole_models():
    found = goals_of(
        measured("mmfast, patched", "mmfast", 1e-3, "dit_step", "a", memory=1 << 20),
        measured("plain torch", "peer", 2e-3, "dit_step", "a", memory=2 << 20),
        measured("torch.compile", "compile", 5e-4, "dit_step", "a", memory=2 << 20),
    )
    assert found["dit_step, a: against plain torch"][2]
    assert not found["dit_step, a: against torch.compile"][2]
    assert found["dit_step, a: memory, less than plain torch"][2]


def test_what_is_wrong_is_a_goal_missed():
    what = "results within the rule of their op, indices those of float64"
    right = measured("mmfast (triton)", "mmfast", 1e-3, "kmeans", "a")
    wrong = measured("mmfast (triton)", "mmfast", 1e-3, "kmeans", "b", match="3 wrong")
    assert goals_of(right)[what] == ("1 of 1 runs", "1 of 1 runs", True)
    assert goals_of(right, wrong)[what] == ("2 of 2 runs", "1 of 2 runs", False)
    failed = contest.failed(CASES[0], RuntimeError("out of memory\nand more"))
    assert failed.match == "RuntimeError: out of memory"
    titles = [t.title for t in tables.all_tables(Results(FACTS, {}, [right]))]
    assert "Goals" in titles


def test_report_of_a_gpu(tmp_path):
    rows = [
        measured("mmfast (triton)", "mmfast", 2e-4, "add_noise", "a", gbps=3000.0, graph=1e-4),
        measured("plain torch", "peer", 5e-4, "add_noise", "a"),
    ]
    results = Results(FACTS, {1: {"copy GB/s": 4000.0}}, rows, checks={"tests": "done in 3 s: 5"})
    text = report.write(results, tmp_path).read_text()
    assert "| time | as a graph |" in text
    assert "| mmfast (triton) | 200 us | 100 us |" in text
    assert "| plain torch | 500 us | - |" in text
    assert "- tests: done in 3 s: 5" in text
    assert "of the copy's bandwidth" in text


class Clock:
    """Events on a device whose calls take the seconds they say."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, []

    def call(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.done.append(name)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        made = SimpleNamespace(at=None)

        def record() -> None:
            made.at = self.now
            self.done.append("event")

        made.record = record
        made.elapsed_time = lambda other: 1e3 * (other.at - made.at)
        return made


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    amax = torch.amax
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: made.call("wait", 1.0))
    monkeypatch.setattr(timing, "_FLUSH", 1 << 10)

    def flush(*arguments, **options):
        made.call("flush", 0.5)
        return amax(*arguments, **options)

    monkeypatch.setattr(torch, "amax", flush)
    return made


def test_device_times_leave_out_what_makes_the_cache_cold(clock):
    sample = timing._cuda_sampler(CPU)
    assert sample(lambda: clock.call("call", 0.002), 3) == pytest.approx(0.002)
    assert clock.done == ["flush", "event", "call", "event"] * 3 + ["wait"]
    # Calls queue up, but not without end.
    clock.done.clear()
    sample(lambda: clock.call("call", 0.002), 1000)
    assert clock.done.count("call") == timing._QUEUED


def test_a_steps_reset_is_not_timed_on_a_device(clock):
    step = Step(lambda: clock.call("reset", 9.0), lambda: clock.call("step", 0.002))
    assert timing._cuda_sampler(CPU)(step, 2) == pytest.approx(0.002)
    assert clock.done[0] == "reset"


def test_times_without_the_host(clock, monkeypatch):
    graph = SimpleNamespace(replay=lambda: clock.call("replay", 0.001))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(timing, "_cuda_sampler", lambda _: lambda call, n: call() or 0.001)

    class Capture:
        def __init__(self, given) -> None:
            assert given is graph

        def __enter__(self) -> None:
            clock.call("begin", 0)

        def __exit__(self, *_) -> None:
            clock.call("end", 0)

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    taken = timing.without_host(lambda: clock.call("call", 0.002), CUDA)
    assert taken == pytest.approx(0.001)
    assert clock.done[:3] == ["begin", "call", "end"]
    assert clock.done.count("call") == 1

    def refused() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert timing.without_host(refused, CUDA) is None
    assert timing.without_host(Step(lambda: None, lambda: None), CUDA) is None
    assert timing.without_host(lambda: None, CPU) is None


def test_ceilings_ask_for_tf32_and_go_back(monkeypatch):
    asked = []

    def product(device, dtype):
        asked.append(torch.get_float32_matmul_precision())
        return 1.0

    monkeypatch.setattr(machine, "_matmul", product)
    monkeypatch.setattr(machine, "_copy", lambda device: 2.0)
    found = machine.ceilings(CUDA, 1)
    assert found == {
        "float32 GFLOP/s": 1.0,
        "bfloat16 GFLOP/s": 1.0,
        "copy GB/s": 2.0,
        "TF32 GFLOP/s": 1.0,
    }
    assert asked == ["highest", "highest", "high"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_steps_before_times_are_taken_once(tmp_path):
    python = "print('3 passed'); print('the last line'); exec('raise SystemExit(%d)')"
    slow = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; ' + %r])"
    steps = {
        "good": gpu.Step(("timeit", "-n1", "-r1", "pass"), 60.0),
        "bad": gpu.Step(("timeit", "-n1", "-r1", python % 3), 60.0),
        "broken": gpu.Step(("timeit", "-n1", "-r1", "raise SystemExit('no such module')"), 60.0),
        "slow": gpu.Step(("timeit", "-n1", "-r1", slow % "time.sleep(60)"), 0.5),
        "late": gpu.Step(("timeit", "-n1", "-r1", "pass"), 60.0, gpu.AFTER),
        "nothing": gpu.Step(("timeit", "-n1", "-r1", "pass"), 60.0, gpu.AFTER, told=True),
    }
    results, told = Results(FACTS), []

    def taken(**more) -> list[str]:
        return list(gpu.prepare(results, told.append, tmp_path, ["a/b"], steps, **more))

    assert taken() == told == ["good", "bad", "broken", "slow"]
    assert results.checks["good"].startswith("done in ")
    assert results.checks["bad"].startswith("failed with ")
    assert "3 passed" in results.checks["bad"]
    assert "the last line" in (tmp_path / "bad.txt").read_text()
    assert results.checks["slow"].startswith("cut off after 0 s")
    assert [f.partition(":")[0] for f in gpu.failures(results)] == [
        "bad", "broken", "slow",
    ]  # fmt: skip
    # What is done, or has said what failed, need not be done again; the others are, where there is
    # time.
    assert taken() == ["broken", "slow"]
    assert taken(left=20.0) == ["slow"]
    # Cases are not told to whom there are none.
    assert list(gpu.prepare(results, told.append, tmp_path, [], steps, gpu.AFTER)) == ["late"]
    assert told[-1] == "late"
    # What did not come back is not tried again.
    results.checks["broken"] = str(watch.End(None, "broken", 1.0))
    assert taken() == ["slow"]


def test_names_of_cases_for_what_is_told_them(tmp_path):
    copies = "import sys; print('|'.join(sys.stdin.read().split()))"
    step = gpu.Step(("timeit", "-n1", "-r1", copies), 60.0, told=True)
    results = Results(FACTS)
    list(gpu.prepare(results, lambda _: None, tmp_path, ["a/b", "c/d"], {"told": step}))
    assert "a/b|c/d" in (tmp_path / "told.txt").read_text()


def test_numbers_are_drawn_on_the_device():
    def make(device):
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randn(4, generator=generator).to(device)
        return drawn, torch.randn(4, generator=generator).to(device)

    with gpu.Drawn(CPU):
        first, second = make(CPU)
    assert torch.equal(first, make(CPU)[0])
    assert torch.equal(second, make(CPU)[1])
    # Where there is none, or where the CPU's are among them, it is the CPU that draws.
    assert torch.equal(gpu.arguments_of(lambda _: make(CPU)[0], CUDA), first)


def test_compiling_is_shared_among_processes(monkeypatch, capsys):
    told = []

    class Process:
        def __init__(self, command, **_) -> None:
            assert command[-2:] == ["--device", "cpu"]
            self.stdin = SimpleNamespace(write=told.append, close=lambda: None)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(sys, "argv", ["warm", "--processes", "2", "--device", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("a/b\nc/d\ne/f\n"))
    monkeypatch.setattr(warm.subprocess, "Popen", Process)
    assert warm.main() == 0
    assert told == ["a/b\ne/f", "c/d"]
    assert capsys.readouterr().out == "3 cases in 2 processes, 0 of them failed\n"


class Run:
    """The command on a GPU that is not there, in a process."""

    def __init__(self, folder, *words: str, **environment: str) -> None:
        command = [sys.executable, "-m", "tests.fake_gpu", "--device", "cuda", "--seconds", "0.02"]
        self.folder = folder
        self.process = subprocess.Popen(
            [*command, "--out", str(folder), *words],
            cwd=gpu._HERE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(self, status: int = 0) -> str:
        said, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == status, said
        return said

    def cut_off_after(self, rows: int) -> list[Row]:
        """As whoever lends the machine does it, when there are so many."""
        while self.process.poll() is None:
            time.sleep(0.02)
            with contextlib.suppress(FileNotFoundError):
                found = Results.load(self.folder).rows
                if len(found) >= rows:
                    self.process.kill()
                    self.process.communicate()
                    return Results.load(self.folder).rows
        pytest.fail(self.output())


def test_a_run_on_a_gpu_that_is_killed_and_goes_on(tmp_path, monkeypatch):
    """All of it: steps, ceilings, checks, times, goals, report; cut off while a case is measured,
    and losing its device in another."""
    kept = Run(tmp_path, FAKE_SLOW="0.3").cut_off_after(1)
    assert len({r.case for r in kept}) == 1
    said = Run(tmp_path, "--resume", FAKE_LOST="gated_activation").output()
    assert "has lost the device" in said
    results = Results.load(tmp_path)
    assert results.rows[: len(kept)] == kept
    ops = ["sampler_step", "gated_activation", "layer_norm_modulate_bwd", "dit_eval"]
    whole = [gpu_attention.STEP, loops.OP]
    assert list(dict.fromkeys(r.op for r in results.rows)) == [*ops[:3], *whole, ops[3]]
    for op in ops:
        subjects_of = {r.subject: r for r in results.rows if r.op == op}
        names = {"mmfast, patched"} if op == "dit_eval" else {"mmfast (triton)"}
        for name in {*names, "plain torch", "torch.compile"}:
            measured_ = subjects_of[name]
            assert measured_.seconds, measured_
            assert measured_.match == "", measured_
    by_name = {r.subject: r for r in results.rows if r.op == gpu_attention.STEP}
    assert all(len(by_name[name].errors) == 4 for name in ("mmfast", gpu_attention_peers.MATH))
    loop = {r.subject: r for r in results.rows if r.op == loops.OP}
    assert all(loop[name].match == "" for name in (loops.GRAPH, loops.PATCHED, "plain torch"))
    assert all(came.startswith("done") for came in results.checks.values()), results.checks
    assert set(results.checks) == {"tests", "tuning", "compiling", "others"}
    assert results.ceilings[1]["copy GB/s"] > 0
    text = (tmp_path / "report.md").read_text()
    for line in ("## Goals", "of the copy's bandwidth", "the host's time of a step", "- tuning: "):
        assert line in text
    assert (tmp_path / "streams.png").stat().st_size > 1000
    # What came can be reported anywhere.
    for name in ("report.md", "streams.png"):
        (tmp_path / name).unlink()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--report", str(tmp_path)])
    assert command.main() == 0
    assert (tmp_path / "report.md").read_text().partition("All figures")[0].strip() in text
    assert (tmp_path / "streams.png").exists()


def test_what_hangs_or_crashes_is_named_and_the_rest_goes_on(tmp_path):
    """A contender that never ends, and one that takes its process with it."""
    options = {"FAKE_HANG": "float32 torch.compile", "FAKE_CRASH": "float32 mmfast (triton)"}
    said = Run(tmp_path, "--only", "gated_activation", **options).output(status=1)
    results = Results.load(tmp_path)
    (case,) = {f"{r.op}/{r.case}" for r in results.rows}
    crashed = "ended the process by SIGABRT"
    assert results.lost(case) == {
        "mmfast (triton)": crashed, "torch.compile": "hung: not done after 10 s",
    }  # fmt: skip
    by_name = {r.subject: r for r in results.rows}
    assert by_name["mmfast (triton)"].match == by_name["mmfast (triton)"].note == crashed
    assert by_name["torch.compile"].match is None
    assert by_name["torch.compile"].note.startswith("hung")
    assert by_name["plain torch"].seconds
    assert f"WRONG: {case}, mmfast (triton): {crashed}" in said.replace("\n", " ")


def test_cases_that_nobody_can_measure():
    """Where it is unknown who it was, or the same one again."""
    case, results = CASES[0], Results(FACTS)
    results.lose(f"{case.key}: timing", "hung")
    (failed,) = command._measured(case, CUDA, results.lost(case.key))
    assert (failed.case, failed.match) == (case.name, "RuntimeError: hung")
    results = Results(FACTS)
    for _ in range(2):
        results.lose(f"{case.key}: mmfast (triton)", "hung")
    assert results.lost(case.key) == {"mmfast (triton)": "hung", "everybody": "hung"}
    assert command._measured(case, CUDA, results.lost(case.key))[0].seconds is None
    assert results.lost("another/case") == {}


TESTS = """
import ctypes, pytest, torch

torch.cuda.is_available = lambda: True
errors = []

def wait(*_):
    if errors:
        raise RuntimeError("an illegal address")

torch.cuda.synchronize = wait

@pytest.mark.cuda(seconds=0.5)
def test_hangs():
    ctypes.PyDLL(None).sleep(60)

def test_loses():
    errors.append(1)
    raise AssertionError("wrong numbers")

@pytest.mark.parametrize("i", range(4))
def test_others(i):
    assert not errors
"""


def test_tests_on_a_gpu_that_hang_or_lose_it_cost_no_others(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    own = gpu.STEPS["tests, parity"].command
    words = own[: own.index("tests/test_triton.py")]
    words = [w if "numprocesses" not in w else "--numprocesses=2" for w in words]
    ran = subprocess.run(
        [sys.executable, "-m", *words, "-p", "conftest", "test_some.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(gpu._HERE / "tests")},
        capture_output=True,
        text=True,
    )
    passed = set(re.findall(r"PASSED test_some.py::(\S+)", ran.stdout))
    failed = set(re.findall(r"FAILED test_some.py::(\S+)", ran.stdout))
    assert passed == {f"test_others[{i}]" for i in range(4)}, ran.stdout
    assert failed == {"test_hangs", "test_loses"}
    assert "AssertionError: wrong numbers" in ran.stdout


SAYS = "import os, sys, time; from resource import *; from benchmarks import watch; "


@pytest.mark.parametrize(
    ("does", "status", "what", "told"),
    [
        ("watch.say('one', 9); watch.say('two', 9); sys.exit(1)", 1, "two", None),
        (
            "watch.say('one', 9); setrlimit(RLIMIT_CORE, (0, 0)); os.abort()",
            -6,
            "one",
            "ended the process by SIGABRT",
        ),
        ("watch.say('one', 9); os._exit(7)", 7, "one", "ended the process with status 7"),
        ("watch.say('one', 0.3); time.sleep(60)", None, "one", "hung: not done after 0 s"),
        # Others may have what it says things to.
        ("watch.say('one', 9); os.fork() or time.sleep(5)", 0, "one", None),
    ],
)
def test_processes_that_are_watched(does, status, what, told, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(gpu._HERE))
    start = time.perf_counter()
    ended = watch.run([sys.executable, "-c", SAYS + does])
    assert time.perf_counter() - start < 30
    assert (ended.status, ended.what, ended.good) == (status, what, told is None)
    assert told is None or str(ended) == told
    assert not watch.watched()


def test_kernels_are_found_where_nothing_is_installed(tmp_path):
    """As on a machine that has but the checkout: by this process, and those that it starts."""
    for name in ("mmfast", "benchmarks", "kernels"):
        shutil.copytree(
            gpu._HERE / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("*.so", "results", "__pycache__"),
        )
    # The name of the module that lets Python find an installed checkout.
    hidden = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in "
    hidden += "getattr(f, '__module__', '')]; "
    first = "from benchmarks import gpu; gpu.build(); import mmfast.kernels.launching as found; "
    for does in (hidden + first, hidden + "import mmfast.kernels.launching as found; "):
        ran = subprocess.run(
            [sys.executable, "-c", does + "print(found.__file__)"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert ran.stdout.strip() == str(tmp_path / "mmfast" / "kernels" / "launching.py"), (
            ran.stderr
        )


def test_checks_survive_the_disk(tmp_path):
    results = Results(FACTS, checks={"tests": "done in 3 s: 5 passed"})
    results.save(tmp_path)
    assert Results.load(tmp_path).checks == results.checks


def test_the_commands_that_run_before_are_there(monkeypatch, capsys):
    tuned = pytest.importorskip("mmfast.kernels.tuned")
    for step in gpu.STEPS.values():
        for word in step.command:
            assert not word.startswith("tests/") or (gpu._HERE / word.partition("::")[0]).is_file()
    for name, main in (("mmfast.kernels.tuned", tuned.main), ("benchmarks.warm", warm.main)):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            main()
        said = capsys.readouterr().out
        words = [w for s in gpu.STEPS.values() if s.command[0] == name for w in s.command[1:]]
        assert len(words) > 2
        assert all(word in said for word in words if word.startswith("--"))
    # Every kernel that is tuned is so in one of them.
    only = [s.command[-1] for s in gpu.STEPS.values() if s.command[0] == "mmfast.kernels.tuned"]
    from mmfast.kernels import nearest_code, scaled_dot_product_attention

    for kernel, _ in (nearest_code.tuning, *scaled_dot_product_attention.tuning):
        assert sum(bool(re.search(text, kernel.name)) for text in only) == 1, kernel.name
    # They leave time for times.
    before = sum(s.seconds for s in gpu.STEPS.values() if s.when == gpu.BEFORE)
    assert before < 60 * gpu.MINUTES * 0.4


def test_a_run_that_is_cut_off_is_resumed(tmp_path, monkeypatch, capsys):
    """By the clock here; a limit on the CPU is the same."""
    words = ["--only", "^unpatchify/", "--subjects", "mmfast", "--threads", "1", "--quick"]
    words += ["--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words, "--minutes", "1e-9"])
    assert command.main() == 0
    assert "--resume goes on" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words, "--resume"])
    assert command.main() == 0
    assert {r.op for r in Results.load(tmp_path).rows} == {"unpatchify"}
