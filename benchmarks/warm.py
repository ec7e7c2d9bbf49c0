"""Compile what will be timed, in many processes: ``python -m benchmarks.warm`` reads cases' names.

Nothing is timed or judged, and what fails is passed over: the run itself will say why. Code is kept
by Triton and by torch.compile where the run finds it; which of several kernels of torch.compile are
the fastest is not, for here they disturb each other.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence

import torch

_LARGE = 4 << 30  # bytes that a contender needs beside its inputs


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    names = sys.stdin.read().split()
    if options.processes == 1:
        return _compile(names, torch.device(options.device))
    command = [sys.executable, "-m", "benchmarks.warm", "--device", options.device]
    # Each is one of many.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    started = []
    for i in range(min(options.processes, len(names))):
        one = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
        assert one.stdin is not None
        one.stdin.write("\n".join(names[i :: options.processes]))
        one.stdin.close()
        started.append(one)
    failed = sum(one.wait() != 0 for one in started)
    print(f"{len(names)} cases in {len(started)} processes, {failed} of them failed")
    return int(failed > 0)


def _compile(names: Sequence[str], device: torch.device) -> int:
    from benchmarks import contest, gpu
    from benchmarks.__main__ import _all_cases
    from benchmarks.subjects import own

    _keep_no_choices()
    by_name = {case.key: case for case in _all_cases(device.type)}
    for name in names:
        case = by_name[name]
        try:
            arguments = gpu.arguments_of(case.make, device)
        except Exception as error:
            print(f"{name}: {error!r}".splitlines()[0])
            continue
        for subject in contest.contenders(case):
            if not (subject.compiled or subject.kind == "mmfast"):
                continue
            try:
                if subject.reasons(arguments) or subject.peer.workspace(*arguments) > _LARGE:
                    continue
                subject.peer.make(*own(case.op, arguments))()
                print(f"{name}: {subject.name}", flush=True)
            except Exception as error:
                print(f"{name}: {subject.name}: {error!r}".splitlines()[0], flush=True)
        del arguments
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def _keep_no_choices() -> None:
    """Of torch.compile's, which it makes by times."""
    import torch._inductor.config as config

    config.autotune_local_cache = False


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
