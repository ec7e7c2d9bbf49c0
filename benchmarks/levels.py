"""Lower instruction sets than the processor has, each in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.results import Results, Row
from mmfast import backends

CASES = ("n65536_k1024_d64", "n65536_k16384_d8", "n65536_k512_d64", "patches_k1024")
# What makes faiss and its OpenBLAS do without the instructions that mmfast does without.
_PEERS = {
    "baseline": {"FAISS_SIMD_LEVEL": "NONE", "OPENBLAS_CORETYPE": "Prescott"},
    "avx2": {"FAISS_SIMD_LEVEL": "AVX2", "OPENBLAS_CORETYPE": "Haswell"},
    "avx512": {"FAISS_SIMD_LEVEL": "AVX512", "OPENBLAS_CORETYPE": "SkylakeX"},
    "avx512vnni": {"FAISS_SIMD_LEVEL": "AVX512", "OPENBLAS_CORETYPE": "SkylakeX"},
}
ALL = len(_PEERS)
_SAME = {"avx512bf16": "avx512vnni"}  # level: another that compiles to the same lookup
_SUBJECTS = r"mmfast \(cpp\)|faiss flat"


def run(cases: int, levels: int, truths: Path, tell: Callable[[str], None]) -> list[Row]:
    """Rows of kind ``"level"``, the instruction set in their notes.

    Args:
        cases: how many of ``CASES``.
        levels: how many instruction sets, from the highest on.
        truths: see ``contest.run``.

    Raises:
        RuntimeError: a process failed; its output is in the message.
    """
    if backends.extension_missing():
        return []
    module = backends.extension()
    lower = module.supported_isas()
    lower = lower[: lower.index(module.isa())]
    lower = [level for level in lower if level in _PEERS and level != _SAME.get(module.isa())]
    rows = []
    for level in lower[-levels:]:
        tell(level)
        rows += _measure(level, CASES[:cases], truths)
    return rows


def _measure(level: str, cases: tuple[str, ...], truths: Path) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "--only",
            f"^nearest_code/({'|'.join(cases)})$",
        ]
        command += ["--subjects", _SUBJECTS, "--out", folder, "--seconds", "0.2", "--bare"]
        command += ["--truths", str(truths)]
        command += ["--threads", str(torch.get_num_threads())]
        ran = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "MMFAST_ISA": level, **_PEERS[level]},
            capture_output=True,
            text=True,
        )
        if ran.returncode:
            raise RuntimeError(f"the benchmark of {level} failed:\n{ran.stdout}{ran.stderr}")
        found = Results.load(Path(folder)).rows
    return [
        dataclasses.replace(r, kind="level", case=f"{r.case}@{level}", note=level) for r in found
    ]
