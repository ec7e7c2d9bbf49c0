"""Every op once on every small sample, for a tool that watches: ``python tests/small_ops.py cuda``;
a number of seconds behind it, and what is not begun by then is left out.

``make memcheck`` runs it under NVIDIA's compute-sanitizer, without the allocator's blocks, so that
every tensor ends where its memory does.
"""

from __future__ import annotations

import math
import sys
import time

import torch

import mmfast  # noqa: F401  (registers the ops)
from mmfast import backends
from mmfast.registry import OPS


def run(device: torch.device, most: int, seconds: float = math.inf) -> tuple[int, list[str]]:
    """How many calls were made, and what is wrong with their results: of every op the first sample,
    then the second, and so on.

    Args:
        most: samples of an op.
        seconds: after which none is begun.
    """
    calls, wrong = 0, []
    end = time.monotonic() + seconds
    for i in range(most):
        for op in OPS.values():
            backend, _ = backends.automatic(op, device.type)
            for sample in [s for s in op.samples() if not s.bench][i : i + 1]:
                if time.monotonic() > end:
                    return calls, wrong
                arguments = sample.make(device, torch.float32, 0)
                result = op.result(backends.select(op, backend, *arguments), arguments)
                calls += 1
                wrong += [f"{op.name}, {sample.name}: {c}" for c in op.compare(result, arguments)]
    return calls, wrong


def main() -> int:
    """The command; status 1 if a result is wrong."""
    device, *seconds = sys.argv[1:]
    calls, wrong = run(torch.device(device), 100, *map(float, seconds))
    print(*wrong, f"{calls} calls", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
