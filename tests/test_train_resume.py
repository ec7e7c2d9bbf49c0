"""Runs that are killed or stopped, and go on."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import training
from training import CONFIG, data, task, train

from mmfast.data import InMemory
from mmfast.train import Stopped, fit, read_log
from mmfast.train.checkpoint import (
    checkpoints,
    newest_checkpoint,
    path_of,
    read_checkpoint,
    write_checkpoint,
)

load_file = pytest.importorskip("safetensors.torch").load_file
pytest.importorskip("PIL")
pytestmark = pytest.mark.usefixtures("one_thread")
LONGER = {"steps": 16, "checkpoint_every": 4, "keep": 9}


def start(target, *arguments, **options):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=target, args=arguments, kwargs=options)
    process.start()
    return process


def ended_by_kill(process):
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def same_bits(one: Path, other: Path) -> None:
    """Two runs end with the same bits."""
    got, want = (read_checkpoint(newest_checkpoint(folder)) for folder in (one, other))
    assert got.tensors.keys() == want.tensors.keys() == {"model", "ema", "optimizer", "random"}
    for file, tensors in want.tensors.items():
        assert got.tensors[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(got.tensors[file][name], tensor), f"{file}: {name}"
    assert got.state == want.state
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    rows = [read_log(folder / "log.csv") for folder in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert rows[0][-1]["loss"] == rows[1][-1]["loss"]


def test_killed(tmp_path):
    """SIGKILL from outside, somewhere after the first checkpoint."""
    process = start(train, "dit", tmp_path / "killed", wait=0.1, **LONGER)
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path / "killed"):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    ended_by_kill(process)
    left = newest_checkpoint(tmp_path / "killed")
    assert 0 < read_checkpoint(left).state["step"] < LONGER["steps"]
    for folder in ("killed", "alone"):
        assert train("dit", tmp_path / folder, **LONGER).step == LONGER["steps"]
    same_bits(tmp_path / "killed", tmp_path / "alone")


def test_killed_while_writing(tmp_path):
    """SIGKILL inside of a checkpoint: what is half written counts for nothing, and goes away."""
    folder = tmp_path / "killed"
    ended_by_kill(start(training.killed_while_writing, folder, 12, **LONGER))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names[1:] == ["step-00000004", "step-00000008"]
    assert names[0].startswith(".step-00000012.")
    assert [row["step"] for row in read_log(folder / "log.csv")][-1] == 12
    train("vqvae", folder, **LONGER)
    train("vqvae", tmp_path / "alone", **LONGER)
    same_bits(folder, tmp_path / "alone")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (4, 8, 12, 16)]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_stopped(kind, tmp_path):
    """Ctrl-C and termination: a checkpoint of the step that was being made, then the error."""
    made = task("vqvae")
    loss = made.loss

    def interrupting(batch, step):
        if step.number == 4:
            signal.raise_signal(kind)
        return loss(batch, step)

    made.loss = interrupting
    before = signal.getsignal(kind)
    config = dataclasses.replace(CONFIG, **LONGER)
    with pytest.raises(Stopped, match=r"after step 5, kept in .*step-00000005") as stopped:
        fit(made, config, data(), out=tmp_path / "stopped", progress=False)
    assert stopped.value.checkpoint == newest_checkpoint(tmp_path / "stopped")
    assert signal.getsignal(kind) == before
    train("vqvae", tmp_path / "stopped", **LONGER)
    train("vqvae", tmp_path / "alone", **LONGER)
    same_bits(tmp_path / "stopped", tmp_path / "alone")
    assert task("vqvae").model.training


def test_stopped_with_readers(tmp_path):
    """Ctrl-C reaches the processes that read data, too: they stay until the step is done."""
    made, config = task("dit"), dataclasses.replace(CONFIG, **LONGER, workers=2, accumulate=2)
    loss = made.loss

    def interrupting(batch, step):
        if step == (4, 0, 2):
            readers = multiprocessing.active_children()
            assert len(readers) == 2
            for reader in readers:
                os.kill(reader.pid, signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss(batch, step)

    made.loss = interrupting
    with pytest.raises(Stopped, match="after step 5, kept in"):
        fit(made, config, data(), out=tmp_path / "stopped", progress=False)
    for folder in ("stopped", "alone"):
        train("dit", tmp_path / folder, **LONGER)
    same_bits(tmp_path / "stopped", tmp_path / "alone")


def test_stopped_while_reading(tmp_path):
    """Readers that end by Ctrl-C, in the middle of a step's data: it is read again."""

    class Interrupted(InMemory):
        left = 4 * 2 + 1

        def __getitems__(self, indices):
            self.left -= 1
            if self.left < 0:
                signal.raise_signal(signal.SIGINT)
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
            return super().__getitems__(indices)

    config = dataclasses.replace(CONFIG, **LONGER, accumulate=2)
    with pytest.raises(Stopped, match=r"after step 4, kept in .*step-00000004"):
        fit(task("dit"), config, Interrupted(**data()), out=tmp_path / "stopped", progress=False)
    for folder in ("stopped", "alone"):
        train("dit", tmp_path / folder, **LONGER)
    same_bits(tmp_path / "stopped", tmp_path / "alone")


def test_broken_checkpoints_are_passed_over(tmp_path):
    """What misses a file or is cut off is left out with a warning that names it."""
    train("dit", tmp_path, keep=9)
    newest = checkpoints(tmp_path)
    (newest[-1] / "ema.safetensors").unlink()
    (newest[-2] / "model.safetensors").write_bytes(b"cut off")
    with (
        pytest.warns(UserWarning, match=r"step-00000006 is not complete.*ema"),
        pytest.warns(UserWarning, match=r"step-00000004 .*model.safetensors should have"),
    ):
        assert newest_checkpoint(tmp_path) == newest[0]
    with pytest.raises(ValueError, match=r"step-00000006: no complete checkpoint"):
        read_checkpoint(newest[-1])
    state = json.loads((newest[0] / "state.json").read_text())
    (newest[0] / "state.json").write_text(json.dumps({**state, "format": 9}))
    for broken in newest[1:]:
        shutil.rmtree(broken)
    with pytest.warns(UserWarning, match="format 9, this version reads 1"):
        assert newest_checkpoint(tmp_path) is None


def test_keeps_the_newest(tmp_path):
    train("dit", tmp_path, keep=2, checkpoint_every=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints", "config.json", "log.csv", "model.safetensors", "samples",
    }  # fmt: skip


def test_a_broken_checkpoint_does_not_push_out_a_good_one(tmp_path):
    """Of a later step, which the resumed run has not made again yet."""
    train("dit", tmp_path, keep=1, checkpoint_every=2)
    (newest,) = checkpoints(tmp_path)
    (newest / "state.json").unlink()
    write_checkpoint(tmp_path, 4, {"model": {"a": torch.zeros(1)}}, {}, 1)
    assert newest_checkpoint(tmp_path) == path_of(tmp_path, 4)
    assert checkpoints(tmp_path) == [path_of(tmp_path, 4)]


def test_a_checkpoint_of_another_version_stays(tmp_path):
    write_checkpoint(tmp_path, 6, {"model": {"a": torch.zeros(1)}}, {}, 1)
    file = path_of(tmp_path, 6) / "state.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    write_checkpoint(tmp_path, 4, {"model": {"a": torch.zeros(1)}}, {}, 1)
    assert checkpoints(tmp_path) == [path_of(tmp_path, 4), path_of(tmp_path, 6)]
    with pytest.warns(UserWarning, match="it is of format 2, this version reads 1"):
        assert newest_checkpoint(tmp_path) == path_of(tmp_path, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, "resumed has batch_size 8, got 4"),
        ({"seed": 1}, "had seed 0, this one 1"),
        ({"steps": 1}, "has made 2 steps, got steps = 1"),
    ],
)
def test_other_settings(change, message, tmp_path):
    train("dit", tmp_path, steps=2)
    with pytest.raises(ValueError, match=message):
        train("dit", tmp_path, **change)


def test_other_data_or_model(tmp_path):
    train("dit", tmp_path / "dit", steps=2)
    fewer = {name: tensor[:-1] for name, tensor in data().items()}
    with pytest.raises(ValueError, match="had length 40, this one 39"):
        fit(task("dit"), CONFIG, fewer, out=tmp_path / "dit", resume=True, progress=False)
    shutil.copytree(tmp_path / "dit", tmp_path / "vqvae")
    with pytest.raises(ValueError, match=r"the checkpoint (lacks|has, but the model has not,) "):
        train("vqvae", tmp_path / "vqvae")
    other = task("dit")
    other.model = training.dit(hidden_size=48).double()
    with pytest.raises(
        ValueError, match=r"has pos_embed of shape \(1, 16, 24\), the model of shape"
    ):
        fit(other, CONFIG, data(), out=tmp_path / "dit", resume=True, progress=False)
