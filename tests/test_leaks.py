"""A call of a C++ kernel leaves nothing behind on the heap."""

from __future__ import annotations

import ctypes

import pytest
import torch

from mmfast import backends
from mmfast.registry import OPS

CALLS = 100
FIELDS = [
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
]


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


@pytest.fixture
def used():
    """How many bytes are allocated."""
    try:
        ask = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        pytest.skip("only glibc from 2.33 on counts its memory")
    ask.restype = Heap
    return lambda: ask().uordblks


@pytest.mark.skipif(bool(backends.extension_missing()), reason="the compiled extension is absent")
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "cpp" in op.backends])
def test_nothing_is_left_of_a_call(name, used):
    op = OPS[name]
    sample = min(op.samples(), key=lambda s: s.shape["N"] * s.shape["K"] * s.shape["D"])
    arguments = sample.make(torch.device("cpu"), torch.float32, 0)
    run = backends.select(op, "cpp", *arguments)
    grown = []
    with torch.no_grad():
        # What Python allocates once, it may allocate in the first rounds.
        for _ in range(4):
            before = used()
            for _ in range(CALLS):
                run(*arguments)
            grown.append((used() - before) / CALLS)
    # A pointer's worth of each call, on the average, would be less than the least allocation.
    assert min(grown) < 8, grown
