"""Benchmarks of whole training steps, and of their parts."""

from __future__ import annotations

import time

import pytest
import torch
from test_benchmarks import FACTS, modules_problem, row

import mmfast
from benchmarks import goals, parts, report, subjects, transformers, vqvae
from benchmarks.results import Results, Row

CPU = torch.device("cpu")


def test_parts_of_a_step():
    marks = parts.Marks()
    for part in ("a", "b", "a"):
        time.sleep(0.01)
        marks(part)
    assert list(marks.seconds) == ["a", "b"]
    assert marks.seconds["a"] > marks.seconds["b"] >= 0.01
    assert parts.medians([{"a": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 2.0}]) == {"a": 2.0, "b": 0.0}


def test_parts_of_a_transformer():
    """Every op of its step that takes time has a part, and the parts are all of it."""
    setting = transformers.Setting("small", 32, 2, 2, 2, 64)
    for prepare in (transformers.plain, transformers.patched):
        step = transformers.step(prepare, *transformers.arguments(setting, CPU))
        step()
        found = step.parts()
        assert list(found)[-1] == parts.OTHER
        assert min(found.values()) > 0
        inside = {parts.ATTENTION, parts.NORMS, parts.ACTIVATION}  # of a block
        assert parts.PRODUCTS in found
        assert (inside <= found.keys()) != (parts.BLOCKS in found)
    kinds = {"aten::mm": parts.PRODUCTS, "mmfast::layer_norm_modulate": parts.NORMS}
    kinds |= {"aten::gelu": parts.ACTIVATION, "aten::copy_": parts.OTHER}
    kinds |= {"mmfast::scaled_dot_product_attention": parts.ATTENTION, "aten::mul": parts.NORMS}
    kinds |= {"mmfast::dit_block_bwd": parts.BLOCKS}
    tracked = "GeneratedBackwardFor_mmfast_linear_default"
    kinds |= {tracked: parts.PRODUCTS, f"{tracked}Backward": parts.OTHER}
    assert {op: parts.kind(op) for op in kinds} == kinds


def test_parts_of_a_vqvae():
    step = vqvae.step(vqvae.quantiser(mmfast.nn), *modules_problem(vqvae.OP))
    step()
    names = ["encoder", vqvae.QUANTISER, "decoder", "backward", "optimiser"]
    assert list(step.parts()) == names
    assert min(step.parts().values()) > 0


def test_a_vqvaes_wrong_step_is_found():
    arguments = modules_problem(vqvae.OP)
    truth = subjects.expected(vqvae.OP, arguments)
    loss, indices, first, *others = vqvae.step(vqvae.quantiser(mmfast.nn), *arguments)()
    assert vqvae.judge((loss, indices, first, *others), arguments, truth) == ""
    assert "loss" in vqvae.judge((2 * loss, indices, first, *others), arguments, truth)
    assert "indices" in vqvae.judge((loss, indices + 1, first, *others), arguments, truth)
    assert "gradients" in vqvae.judge((loss, indices, first + 1, *others), arguments, truth)


def steps() -> list[Row]:
    own, other = {"encoder": 0.1, vqvae.QUANTISER: 0.1}, {"encoder": 0.1, vqvae.QUANTISER: 0.2}
    shared = {"op": vqvae.OP, "case": "k8192"}
    return [
        row("mmfast.nn", "mmfast", 0.2, parts=own, memory=2 << 20, **shared),
        row("plain torch", "peer", 0.3, parts=other, memory=3 << 20, **shared),
    ]


def test_goals_of_steps():
    reached = [(g.reached, g.met) for g in goals.goals(Results(FACTS, {}, steps()))]
    assert reached == [("1.50x", True), ("2.0x", False), ("2.0 MiB", True)]


def test_parts_are_in_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    text = report.write(Results(FACTS, {}, steps()), tmp_path).read_text()
    assert "| plain torch | 100 ms | 200 ms | 300 ms | 3.0 MiB |" in text
    assert (tmp_path / "steps.png").stat().st_size > 1000
