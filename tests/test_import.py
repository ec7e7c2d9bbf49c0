"""``import mmfast`` registers the ops and brings little else."""

from __future__ import annotations

import json
import subprocess
import sys

import mmfast.schedule

ASK = """
import json, sys
import torch
before = {*sys.modules}
import mmfast
ops = [name for name in mmfast.__all__ if hasattr(torch.ops.mmfast, name)]
new = [name for name in sys.modules if name not in before]
lazy = mmfast.schedule.ddim, mmfast.schedule.samplers.euler, mmfast.schedule.betas.make_betas
assert all(map(callable, lazy))
from mmfast.schedule.sampling import sample
assert mmfast.schedule.sample is sample
print(json.dumps([ops, new]))
"""


def test_what_is_imported():
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    ops, new = json.loads(done.stdout)
    assert {"nearest_code", "vector_quantize", "sampler_step"} <= {*ops}
    for name in ("rich", "numpy.random", "triton", "PIL", "mmfast.nn", "mmfast.models"):
        assert name not in new
    schedules = {name for name in new if name.startswith("mmfast.schedule")}
    assert schedules == {f"mmfast.schedule{end}" for end in ("", ".layout", ".table")}


def test_everything_is_there():
    for name in mmfast.schedule.__all__:
        assert getattr(mmfast.schedule, name) is not None
    assert {*mmfast.schedule.__all__} <= {*dir(mmfast.schedule)}
    assert not hasattr(mmfast.schedule, "absent")
