"""The words of ``csrc/cpu/philox.h`` where counters pass 32 bits, which no tensor here reaches."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mmfast import backends, philox

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>

#include "cpu/philox.h"

using namespace mmfast::MMFAST_ISA;

int main(int, char** given) {
  const long long seed = atoll(given[1]), offset = atoll(given[2]), first = atoll(given[3]);
  static uint32_t made[1000];
  const int count = atoi(given[4]);
  fill_words(Random(seed, offset), first, made, count);
  for (int i = 0; i < count; ++i) printf("%u\n", made[i]);
}
"""
FLAGS = {f"avx{kind}": [f"-march=x86-64-v{v}"] for kind, v in ((2, 3), (512, 4))} | {"baseline": []}
MISSING = backends.extension_missing()


@pytest.mark.skipif(
    bool(MISSING) or not shutil.which(COMPILER[0]), reason="no kernels here, or no compiler"
)
@pytest.mark.parametrize("level", FLAGS)
def test_words_beyond_32_bits_of_blocks(level: str, tmp_path: Path) -> None:
    if level not in backends.extension().supported_isas():
        pytest.skip(f"this processor has no {level}")
    source, program = tmp_path / "words.cpp", tmp_path / "words"
    source.write_text(PROGRAM)
    options = ["-std=c++20", "-O1", "-w", f"-DMMFAST_ISA={level}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*COMPILER, *options, *FLAGS[level], source, "-o", program], check=True)
    for seed, offset in ((0, 0), (-5, 2**40 + 3)):
        for first, count in ((2**34 - 130, 500), (2**34 - 3, 7), (5 * 2**34 - 40, 41), (2**62, 9)):
            arguments = map(str, (program, seed, offset, first, count))
            done = subprocess.run([*arguments], check=True, capture_output=True, text=True)
            elements = first + torch.arange(count)
            want = philox.words(torch.tensor(seed), torch.tensor(offset), elements // 4)
            want = want.gather(-1, (elements % 4)[:, None])[:, 0]
            assert [*map(int, done.stdout.split())] == want.tolist(), (seed, offset, first)
