"""How much the lookup in Triton computes: launches, and the worst case, in the interpreter.

TRITON_INTERPRET=1 python -m pytest tests/test_nearest_code_work.py
"""

from __future__ import annotations

import functools
import math
from collections import Counter

import pytest
import torch
from cases import METRICS, complaints, normal
from test_nearest_code import HARD
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import mmfast
from mmfast import backends
from mmfast.ops import nearest_code

triton = pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
import quick_interpreter  # noqa: F401, E402
from triton.runtime.interpreter import GridExecutor  # noqa: E402

from mmfast.kernels import nearest_code_exact, nearest_code_screen  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# Whole tiles, so that nothing is counted that only fills one.
N, K, D = 32, 128, 16
PAIRS = N * K * D
# Of a Hopper's multiprocessor in a clock: products and sums of float16 in tensor cores,
# instructions of float32, and of float64.
TENSOR, FLOAT32, FLOAT64 = 2048, 128, 64
# Instructions for one dimension of a pair: a difference and its square, or a product.
INSTRUCTIONS = {"euclidean": 2, "cosine": 1, "dot": 1}

HARDEST = {
    "all codes equal": HARD["all codes equal"],
    "codes that differ in the last bit": HARD["codes that differ in the last bit"],
    "each code many times": HARD["each code many times"],
    "all equal": HARD["all equal"],
    "nan": lambda n, k, d: (torch.full((n, d), torch.nan), normal(k, d, seed=1)),
    "a code with nan": lambda n, k, d: (
        normal(n, d),
        torch.where(torch.arange(k)[:, None] == 9, torch.nan, normal(k, d, seed=1)),
    ),
    "infinite": lambda n, k, d: (torch.full((n, d), torch.inf), normal(k, d, seed=1)),
    "overflow": lambda n, k, d: (normal(n, d) * 1e30, normal(k, d, seed=1) * 1e30),
}


@pytest.fixture
def work(monkeypatch) -> Counter[str]:
    """What the launches inside compute: pairs and dimensions, by the arithmetic that is used."""
    counted: Counter[str] = Counter()

    def counting(module, name, count):
        inner = getattr(module, name)

        def call(*arguments):
            count(*arguments)
            return inner(*arguments)

        monkeypatch.setattr(module, name, call)

    def tile(code, row, d, step, padded, codes, *_):
        counted["tiles"] += int(step) * int(codes)

    def summed(p_x, m_x, p_c, m_c, dims, stride_x, stride_c, metric, dtype):
        counted[str(dtype)] += math.prod(int(n) for n in (m_x & m_c).shape) * int(dims)

    def sizes(p_x, mask, dims, *_):
        counted["fp32"] += math.prod(int(n) for n in mask.shape) * int(dims)

    counting(nearest_code_screen, "_tile", tile)
    counting(nearest_code_exact, "_summed", summed)
    counting(nearest_code_exact, "_sizes", sizes)
    return counted


def products(work: Counter[str]) -> float:
    """In float16. Of what a second look loads, codes meet both float16 of the rows, and what their
    rounding left one: three products of two tiles."""
    first = K * D  # in one block of rows
    return N * (first + 1.5 * (work["tiles"] - first))


def run(x, codebook, metric="euclidean"):
    with mmfast.use_backend("triton"):
        return nearest_code.OP.result(
            functools.partial(backends.call, nearest_code.OP), (x, codebook, metric)
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARDEST)
def test_the_worst_case_is_at_most_twice_a_plain_exact_kernel(name, metric, work):
    """Which computes the metric of all pairs in float64."""
    x, codebook = HARDEST[name](N, K, D)
    assert not complaints(run(x, codebook, metric), x, codebook, metric)
    assert products(work) <= 4 * PAIRS
    # And of the group that a row is certain of, if it is.
    assert work["fp64"] <= (1 + 8 / K) * PAIRS
    assert work["fp32"] <= (1 + 1 / 8) * PAIRS
    instructions = INSTRUCTIONS[metric]
    plain = instructions * PAIRS / FLOAT64
    clocks = (
        products(work) / TENSOR
        + instructions * work["fp32"] / FLOAT32
        + instructions * work["fp64"] / FLOAT64
    )
    assert clocks <= 2 * plain


def test_the_worst_case_is_among_these(work):
    """A second look, and all codes in float32 and in float64 after it."""
    run(*HARDEST["each code many times"](N, K, D))
    assert products(work) == 4 * PAIRS
    assert work["fp32"] == PAIRS
    assert work["fp64"] >= PAIRS


def test_what_is_certain_is_not_computed_again(work):
    x, codebook = normal(N, D), normal(K, D, seed=1)
    run(x, codebook)
    assert products(work) <= 4 * PAIRS
    assert work["fp32"] == 0
    assert work["fp64"] < PAIRS / 2


class Recorded(TorchDispatchMode):
    """Which of torch's ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# What launches nothing on a device.
FREE = {"empty", "new_empty", "view", "_unsafe_view", "unsqueeze", "slice", "alias", "select"}


@pytest.mark.parametrize("d", [8, 32, 300])
@pytest.mark.parametrize("metric", METRICS)
def test_launches(metric, d, monkeypatch):
    """Of kernels that take microseconds for few dimensions; none of them is torch's."""
    launched = []
    call = GridExecutor.__call__

    def counting(self, *arguments, **options):
        launched.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter's own copies
            return call(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counting)
    x, codebook = normal(20, d), normal(70, d, seed=1)
    launch = nearest_code.OP.backends["triton"].load()
    with Recorded() as torchs:
        launch(x, codebook, metric)
    steps = ("centre", "pack", "screen", "screen", "exact")
    names = [f"nearest_code_{step}_kernel" for step in steps]
    assert launched == ["nearest_code_norm_kernel"] * (metric == "cosine") + names
    assert torchs.names <= FREE
