"""``python -m benchmarks --device cuda`` where no GPU is: ``python -m tests.fake_gpu ...``.

Everything asked of a GPU is given by the CPU, kernels by Triton's interpreter; problems are tiny,
nothing is compiled, and the steps before times are small ones of their kind. What comes out says
nothing but that the command does all that it has to do, whenever it is cut off.

    FAKE_LOST=TEXT    the device is lost after the case with TEXT in its name, once
    FAKE_SLOW=SECONDS each case takes so long
    FAKE_HANG=TEXT    a contender of a case never ends, of those with TEXT in "op/case name"
    FAKE_CRASH=TEXT   likewise, and takes the process with it
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
CASES = (
    "sampler_step/tiny",
    "gated_activation/dit",
    "layer_norm_modulate_bwd/dit",
    "attention_step/2x",
    "sampling_loop/tiny",
    "dit_eval",
)
DIVISOR = 128


def there(value: Any) -> Any:
    """A device that is there."""
    on_gpu = str(value).startswith("cuda") if isinstance(value, (str, torch.device)) else False
    return CPU if on_gpu else value


class OnTheCpu(TorchFunctionMode):
    """Tensors for the GPU are the CPU's."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.device:
            return function(*arguments, **(options or {}))
        given = {name: there(value) for name, value in (options or {}).items()}
        return function(*map(there, arguments), **given)


class Event:
    """A time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at) + 1e-6


@contextlib.contextmanager
def capturing(graph: Any):
    yield


def pretend() -> None:
    """From now on there is a GPU."""
    nothing = lambda *_, **__: None  # noqa: E731
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=1 << 37, L2_cache_size=50 << 20
    )
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "Imaginary GPU",
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (1 << 33, 1 << 34),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 20,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "synchronize": nothing,
        "Event": Event,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: time.sleep(1e-5)),
        "graph": capturing,
    }.items():
        setattr(torch.cuda, name, value)

    class Generator(torch.Generator):
        def __new__(cls, device: Any = CPU) -> torch.Generator:
            return torch._C.Generator(there(device))

    torch.Generator = Generator
    torch.compile = lambda function=None, **_: function
    torch.nn.Module.compile = nothing
    OnTheCpu().__enter__()


def main() -> int:
    from benchmarks import __main__ as command
    from benchmarks import contest, gpu, gpu_cases, machine, subjects, timing, warm

    pretend()
    subjects.interpreting = lambda: False
    timing._FLUSH, machine._ROUNDS, command._SAVE_EVERY = 1 << 12, 1, 0.0
    timing._TURNS = timing._BLOCKS = 2
    timing._BLOCK_CALLS = timing._QUEUED = timing._MIN_TINY_ROUNDS = 2
    machine._PRODUCT, machine._COPIED = {"cuda": 64}, {"cuda": 1 << 16}
    small = gpu_cases.gpu_cases(DIVISOR)
    # In float32, where peers are right too.
    few = [
        min(
            (c for c in small if c.key.startswith(name)),
            key=lambda c: not c.key.endswith("float32"),
        )
        for name in CASES
    ]
    gpu_cases.all_cases = lambda: few
    if sys.argv[1:2] == ["warm"]:
        sys.argv = ["warm", "--processes", "1", "--device", "cuda"]
        return warm.main()
    words = ("pytest", "-p", "no:cacheprovider", "--quiet", "tests/test_import.py")
    gpu.STEPS = {
        "tests": gpu.Step((*words, "-k", "everything"), 60.0, gpu.BETWEEN),
        "tuning": gpu.Step(("mmfast.kernels.tuned",), 60.0),
        "compiling": gpu.Step(("tests.fake_gpu", "warm"), 60.0, told=True),
        "others": gpu.Step(("timeit", "-n1", "-r1", "pass"), 60.0, gpu.AFTER),
    }
    lost, slow = os.environ.get("FAKE_LOST"), float(os.environ.get("FAKE_SLOW", "0"))
    measured, last = command._measured, []

    def one(case: Any, *others: Any) -> Any:
        last.append(case.key)
        time.sleep(slow)
        return measured(case, *others)

    def is_lost(_: torch.device) -> bool:
        if not (lost and last and lost in last[-1]):
            return False
        del os.environ["FAKE_LOST"]
        return True

    entered = contest.enter

    def enter(case: Any, subject: Any, *others: Any) -> Any:
        for name, harm in (("FAKE_HANG", signal.pause), ("FAKE_CRASH", os.abort)):
            if os.environ.get(name, "\0") in f"{case.key} {subject.name}":
                harm()
        return entered(case, subject, *others)

    contest.enter = enter
    if "FAKE_CRASH" in os.environ:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def patience(what: str) -> float:
        # Where nothing hangs a machine may be as slow as it is.
        return 10.0 if os.environ.get("FAKE_HANG", "\0").endswith(what) else 120.0

    command._patience = patience
    command._measured, gpu.is_lost = one, is_lost
    return command.main()


if __name__ == "__main__":
    sys.exit(main())
