"""Two processes train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import CASES, CONFIG, train

from mmfast.models import describe_model
from mmfast.train import read_log
from mmfast.train.checkpoint import newest_checkpoint, read_checkpoint

for module in ("safetensors", "PIL"):
    pytest.importorskip(module)
pytestmark = pytest.mark.usefixtures("one_thread")
WORKER = Path(__file__).with_name("training.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the runs of all cases, each by two processes that torchrun has started."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, WORKER, folder, *CASES],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case, two, tmp_path):
    """Weights, averages, codebooks, the optimiser's moments and the log are those of one process
    with the joined batches."""
    result = train(case, tmp_path / case, distributed="ddp")
    got = read_checkpoint(newest_checkpoint(two / case))
    want = read_checkpoint(newest_checkpoint(tmp_path / case))
    assert got.state["step"] == want.state["step"] == CONFIG.steps
    assert got.state["data"] == want.state["data"]
    for file in ("model", "ema", "optimizer"):
        assert got.tensors[file].keys() == want.tensors[file].keys()
        for name, tensor in want.tensors[file].items():
            close = {"rtol": 1e-9, "atol": 1e-9, "msg": f"{file}: {name}"}
            torch.testing.assert_close(got.tensors[file][name], tensor, **close)
    rows = [read_log(folder / case / "log.csv") for folder in (two, tmp_path)]
    assert len(rows[0]) == 3
    for mine, one in zip(*rows, strict=True):
        assert mine.keys() == one.keys()
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(one[name], rel=1e-6), name
    assert result.row["step"] == CONFIG.steps
    files = [folder / case / "model.safetensors" for folder in (two, tmp_path)]
    assert describe_model(files[0]) == describe_model(files[1])


def test_one_process_goes_on(two):
    """A run of two processes, sharded, is taken up by one."""
    result = train("dit_fsdp", two / "dit_fsdp", distributed="ddp", steps=CONFIG.steps + 2)
    assert result.step == CONFIG.steps + 2
    steps = [row["step"] for row in read_log(two / "dit_fsdp" / "log.csv")]
    assert steps == [2, 4, 6, 8]
