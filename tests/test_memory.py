"""The workspace is bounded: never an N x K matrix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfast import backends

MEASURE = """
import sys, torch, mmfast

def kib(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

n, k, d = map(int, sys.argv[2:])
x, codebook = torch.randn(n, d), torch.randn(k, d)
outputs = {"nearest_code": n * 12, "code_statistics": k * (d + 1) * 4}
outputs = outputs.get(sys.argv[1], n * (d * 4 + 8) + k * 4)
if sys.argv[1] == "nearest_code":
    call = lambda rows: mmfast.nearest_code(x[:rows], codebook)
elif sys.argv[1] == "vector_quantize":
    mask = torch.rand(n) < 0.9
    call = lambda rows: mmfast.vector_quantize(x[:rows], codebook, mask=mask[:rows])
elif sys.argv[1] == "soft_assignment_statistics":
    call = lambda rows: mmfast.soft_assignment_statistics(x[:rows], codebook)
elif sys.argv[1] == "soft_assignment_statistics_bwd":
    x.requires_grad_(), codebook.requires_grad_()

    def call(rows):
        means, entropy = mmfast.soft_assignment_statistics(x[:rows], codebook)
        torch.autograd.grad((means.square().sum() + entropy), (x, codebook))
else:
    indices = torch.randint(k, (n,))
    call = lambda rows: mmfast.code_statistics(x[:rows], indices[:rows], k)
call(8)  # starts threads
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
before = kib("VmRSS")
result = call(n)
print(kib("VmHWM") - before - outputs // 1024)
"""


def extra_kib(op: str, *sizes: int) -> int:
    """How far a call raises the process's memory, less its outputs."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, op, *map(str, sizes)],
        env=os.environ,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(bool(backends.extension_missing()), reason="the compiled extension is absent")
@pytest.mark.parametrize(
    "sizes",
    [
        ("nearest_code", 65536, 4096, 8),  # N x K float32: 1 GiB
        ("nearest_code", 8192, 16384, 64),
        ("nearest_code", 65536, 1024, 64),
        ("code_statistics", 65536, 4096, 64),
        ("vector_quantize", 65536, 1024, 64),
    ],
    ids=str,
)
def test_peak_memory(sizes):
    assert extra_kib(*sizes) < 16 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(bool(backends.extension_missing()), reason="the compiled extension is absent")
@pytest.mark.parametrize("op", ["soft_assignment_statistics", "soft_assignment_statistics_bwd"])
def test_peak_memory_of_probabilities(op):
    assert extra_kib(op, 16384, 4096, 8) < 40 * 1024  # N x K float32: 256 MiB
