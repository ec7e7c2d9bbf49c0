"""Every instruction set that this processor has gives the same results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmfast import backends

pytestmark = pytest.mark.skipif(
    bool(backends.extension_missing()), reason="the compiled extension is absent"
)

HERE = Path(__file__).parent
LEVELS = [] if backends.extension_missing() else backends.extension().supported_isas()


def run(code: str, level: str) -> subprocess.CompletedProcess[str]:
    """Python ``code`` with MMFAST_ISA set to ``level``."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MMFAST_ISA": level},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )


def test_the_highest_is_the_default():
    code = "from mmfast import backends; print(backends.extension().isa())"
    assert run(code, "").stdout.split() == [LEVELS[-1]]


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_used(level):
    code = "from mmfast import backends; print(backends.extension().isa())"
    assert run(code, level).stdout.split() == [level]


def test_unknown_level_is_an_error():
    code = "import torch, mmfast; mmfast.nearest_code(torch.zeros(1, 1), torch.zeros(1, 1))"
    ran = run(code, "fast")
    assert ran.returncode == 1
    told = re.search(r"MMFAST_ISA must be one of (.*), got fast", ran.stderr)
    assert told
    names = {"baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"}
    assert set(told[1].split(", ")) == names


LOOKUPS = ("nearest_code", "vector_quantize", "residual_quantize")
OTHERS = (
    "attention_forward",
    "attention_backward",
    "code_statistics",
    "gated_activation",
    "gated_residual_modulate",
    "linear",
    "qk_norm_rope",
    "randn",
    "sample_code",
)


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_parity(level):
    """The tests of single ops, which have run at the highest level, at a lower one."""
    parts = {"avx512vnni": LOOKUPS, "avx512bf16": OTHERS}
    ops = parts.get(level, (*LOOKUPS, *OTHERS))
    files = [HERE / f"test_{op}.py" for op in ops]
    # Left out is what the instructions have no part in.
    left_out = ("reference", "compile", "gradcheck", "parts", "threads", "samples_of_pytorch")
    chosen = " and ".join(f"not {name}" for name in left_out)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        env={**os.environ, "MMFAST_ISA": level},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]


RESULTS = """
import hashlib, torch, mmfast
from cases import METRICS
from test_determinism import PROBLEMS, bits, problem, step

digest = hashlib.sha256()
for name in PROBLEMS:
    for metric in METRICS:
        x, codebook = problem(name)
        for tensor in mmfast.nearest_code(x, codebook, metric=metric):
            digest.update(bits(tensor).numpy().tobytes())
        for tensor in step(x, codebook, metric):
            digest.update(bits(tensor.nan_to_num()).numpy().tobytes())
    digest.update(mmfast.sample_code(x, codebook, seed=1).numpy().tobytes())
    indices = mmfast.nearest_code(x, codebook)[0]
    for tensor in mmfast.code_statistics(x, indices, len(codebook)):
        digest.update(bits(tensor).numpy().tobytes())
for levels in ((8, 8, 8, 5, 5, 5), (5, 3, 17), (40,), (3,) * 9, (7, 7)):
    z = 2 * torch.randn(77, len(levels), generator=torch.Generator().manual_seed(0))
    for tensor in mmfast.finite_scalar_quantize(z, levels):
        digest.update(bits(tensor).numpy().tobytes())
for tensor in mmfast.lookup_free_quantize(z, group_bits=0)[:2]:
    digest.update(bits(tensor).numpy().tobytes())
print(digest.hexdigest())
random = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    random.update(mmfast.randn((1009,), seed=1, dtype=dtype).float().numpy().tobytes())
print(random.hexdigest())
"""


def test_same_bits_at_every_level():
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n{RESULTS}"
    digests = {level: run(code, level).stdout.split() for level in LEVELS}
    assert all(len(lines) == 2 for lines in digests.values())
    assert len({lines[0] for lines in digests.values()}) == 1, digests
    # Normal numbers take fused multiply-adds, which the baseline has not.
    fused = {lines[1] for level, lines in digests.items() if level != "baseline"}
    assert len(fused) <= 1, digests
