"""What only a GPU can show: streams, several devices, graphs, and that its results are the CPU's.

Where there is none, each of these tests that makes sense on the CPU compares two backends there
instead, so that what it calls is known to work. ``tests/test_triton.py`` has what only Triton
kernels must keep to: that they do not synchronise, and can be captured one by one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_ops
import torch
from cases import normal
from test_determinism import assert_same_bits
from test_scaled_dot_product_attention import with_gradients
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmfast
from mmfast import backends
from mmfast import schedule as S
from mmfast.registry import OPS, Arguments, Op

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parent.parent
CHECKED = "45"  # seconds under the memory checker, under which all takes far longer

each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def sample_of(op: Op, device: torch.device = DEVICE) -> Arguments:
    """The first small sample that has numbers."""
    samples = [s for s in op.samples() if not s.bench and all(s.shape.values())]
    return samples[0].make(device, op.dtypes[0], 0)


def moved(value, device):
    return value.to(device) if isinstance(value, Tensor) else value


def result(op: Op, arguments: Arguments) -> tuple[Tensor, ...]:
    """Of the backend that is chosen where the arguments are."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    backend, _ = backends.automatic(op, device.type)
    found = op.result(backends.select(op, backend, *arguments), arguments)
    return found if isinstance(found, tuple) else (found,)


@contextlib.contextmanager
def another_stream():
    """Work inside goes to a stream that is not the default one, in order with it."""
    if DEVICE.type == "cpu":
        yield
        return
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


@each_op
def test_another_stream(op):
    """Inputs are made on the stream that the op runs on, behind work that takes a while."""
    wanted = result(op, sample_of(op))
    with another_stream():
        size = 1024 if DEVICE.type == "cuda" else 8
        busy = torch.randn(size, size, device=DEVICE)
        for _ in range(5):
            busy = busy @ busy
        arguments = sample_of(op)
        for a in arguments:
            if isinstance(a, Tensor):
                a.copy_(a.clone())
        found = result(op, arguments)
    assert_same_bits(found, wanted)


@each_op
def test_integers_are_the_cpus(op):
    """Indices, counts and packed bits, whatever the device; on the CPU, whatever the backend."""
    arguments = sample_of(op, CPU)
    wanted = result(op, arguments)
    if DEVICE.type == "cpu":
        found = op.result(op.reference, arguments)
        found = found if isinstance(found, tuple) else (found,)
    else:
        found = result(op, tuple(moved(a, DEVICE) for a in arguments))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if not a.is_floating_point():
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [0, -5, 2**62 + 1])
def test_noise_is_the_cpus(seed, dtype):
    """Normal numbers, to what their dtype holds of those in float64."""
    options = {"seed": torch.tensor(seed), "offset": 7}
    wide = mmfast.randn((3, 40), **options, dtype=torch.float64)
    for device in (CPU, DEVICE):
        options["seed"] = options["seed"].to(device)
        found = mmfast.randn((3, 40), **options, dtype=dtype).cpu().double()
        assert torch.allclose(found, wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_choices_by_noise_are_the_cpus():
    """Of codes, and of what dropout leaves: both are decided by the same bits everywhere."""
    x, codes = normal(50, 8), normal(20, 8, seed=1)
    drawn = [mmfast.sample_code(x.to(d), codes.to(d), seed=3).cpu() for d in (CPU, DEVICE)]
    assert torch.equal(*drawn)
    # With one key and value, what is left of the value says whether it was dropped.
    tensors = torch.zeros(1, 2, 40, 8), torch.zeros(1, 2, 1, 8), torch.ones(1, 2, 1, 8)
    stream = torch.tensor(5), torch.tensor(7)
    left = []
    for device in (CPU, DEVICE):
        q, k, v, *drawing = (t.to(device) for t in (*tensors, *stream))
        out, _ = torch.ops.mmfast.scaled_dot_product_attention(
            q, k, v, None, 0.5, False, 1.0, *drawing
        )
        left.append(out.cpu())
    assert set(left[0].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(*left)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_op
def test_every_device(op):
    """Whatever device is the current one."""
    wanted = result(op, sample_of(op, torch.device("cuda:0")))
    for index in range(1, torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for current in (0, index):
            with torch.cuda.device(current):
                found = result(op, sample_of(op, device))
            assert all(t.device == device for t in found)
            assert_same_bits([t.cpu() for t in found], [t.cpu() for t in wanted])


def looped(graph: str | bool) -> tuple[S.SampleLoop, Tensor]:
    """A sampler with a model that is a matrix product."""
    schedule = S.NoiseSchedule.from_betas()
    table = S.sa_solver(schedule.grid(8, skip_last=True))
    weights = normal(6, 6, seed=2).div(4).to(DEVICE)
    x = normal(3, 6).to(DEVICE)
    loop = S.SampleLoop(lambda x, t: torch.tanh(x @ weights), x, table, cuda_graph=graph)
    return loop, x


def test_a_loop_on_another_stream():
    loop, x = looped(False)
    wanted = loop.run(x, seed=4)
    with another_stream():
        found = loop.run(x, seed=4)
    assert torch.equal(found, wanted)


@pytest.mark.cuda
def test_a_loop_is_one_launch_and_waits_for_nothing():
    loop, x = looped("loop")
    plain, _ = looped(False)
    wanted = plain.run(x, seed=4)
    seed = torch.tensor(4, device=DEVICE)
    loop.run(x, seed=seed)  # captures
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = loop.run(x, seed=seed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)
    launches = sum(e.count for e in profile.key_averages() if e.key == "cudaGraphLaunch")
    assert launches == 1


@pytest.mark.cuda
@each_op
def test_captured_on_another_stream(op):
    """A graph that is captured on one stream and replayed on another, of every op with a kernel."""
    if "triton" not in op.backends:
        pytest.skip("has no kernel for GPUs")
    arguments = sample_of(op)
    run = backends.select(op, "triton", *arguments)
    wanted = op.result(run, arguments)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    own = op.own(arguments)
    with another_stream():
        run(*op.own(arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*own)
    with another_stream():
        graph.replay()
    found = op.changed(own) if op.mutates else outputs
    assert_same_bits(found if isinstance(found, tuple) else (found,), wanted)


@pytest.mark.parametrize("num_dims", [64, 72, 80, 88, 96, 112, 128])
@pytest.mark.parametrize("length", [256, 2048])
def test_attention_errs_at_most_twice_as_much_as_pytorchs_definition(length, num_dims):
    """In bfloat16, against float64: outputs and gradients."""
    length = length if DEVICE.type == "cuda" else length // 16
    shape = 2, 2, length, num_dims
    tensors = [normal(*shape, seed=i, dtype=torch.bfloat16).to(DEVICE) for i in range(3)]
    got = with_gradients(mmfast.scaled_dot_product_attention, tensors)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = with_gradients(functional.scaled_dot_product_attention, tensors)
        exact = with_gradients(
            functional.scaled_dot_product_attention, [t.double() for t in tensors]
        )
    for a, b, want in zip(got, theirs, exact, strict=True):
        errors = [(t.double() - want).norm().item() for t in (a, b)]
        assert errors[0] <= 2 * errors[1]


def test_small_ops_are_right():
    """What is run under the memory checker, without it."""
    # Other tests call all of them.
    calls, wrong = small_ops.run(DEVICE, 2 if DEVICE.type == "cuda" else 1)
    assert calls >= len(OPS)
    assert wrong == []
    assert small_ops.run(DEVICE, 100, seconds=-1.0) == (0, [])


@pytest.mark.cuda(seconds=900)
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not here")
def test_memory_checker():
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    ran = subprocess.run(
        [*command, sys.executable, "tests/small_ops.py", "cuda", CHECKED],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    print(ran.stdout[-300:])  # how many calls it was
