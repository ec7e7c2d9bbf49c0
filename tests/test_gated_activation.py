"""gated_activation: against PyTorch, hard values, layouts, gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from cases import backends_here, device_of, normal, samples_of_pytorch
from test_determinism import assert_same_bits
from torch.nn import functional as F

import mmfast
from mmfast.ops import gated_activation

BACKENDS = backends_here(gated_activation.OP)
OF_TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", gated_activation.ACTIVATIONS)
def test_error_is_at_most_twice_torchs(backend, activation, dtype):
    torchs = OF_TORCH[activation]
    points = torch.linspace(-12, 12, 4000 if backend == "triton" else 100_000)
    x = points.to(device_of(backend), dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    truth = torchs(wide)
    (slope,) = torch.autograd.grad(truth.sum(), wide)

    def errors(run):
        y = run(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return [(got.double() - want).abs() for got, want in ((y, truth), (grad, slope))]

    ours = errors(lambda x: mmfast.gated_activation(x, activation=activation))
    theirs = errors(torchs)
    for our, their in zip(ours, theirs, strict=True):
        for part in (x < -1, x.abs() <= 1, x > 1):
            assert our[part].max() <= 2 * their[part].max() + 1e-9


def test_samples_of_pytorch(backend):
    count = 0
    for (x, *_), options in samples_of_pytorch(
        "nn.functional.gelu", torch.float64, device_of(backend)
    ):
        if x.dim() < 1:
            continue
        leaf = x.detach().requires_grad_()
        name = "gelu_tanh" if options.get("approximate") == "tanh" else "gelu"
        got, want = mmfast.gated_activation(leaf, activation=name), F.gelu(leaf, **options)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(y, leaf, torch.ones_like(y)) for y in (got, want))
        torch.testing.assert_close(*grads)
        count += 1
    assert count > 1


@pytest.mark.parametrize("activation", gated_activation.ACTIVATIONS)
def test_hard_values(backend, activation):
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, math.inf, math.nan, 89, -89, -105])
    x = x.to(device_of(backend)).requires_grad_()
    y = mmfast.gated_activation(x, activation=activation)
    (grad,) = torch.autograd.grad(y.sum(), x)
    # PyTorch's exact GELU of infinity is NaN on the CPU.
    expected = x.where(x.isinf(), OF_TORCH[activation](x))
    torch.testing.assert_close(y, expected, equal_nan=True, atol=1e-30, rtol=1e-6)
    slopes = torch.tensor([0.5] * 4 + [1, 0, 1, math.nan, 1, 0, 0])
    torch.testing.assert_close(grad, slopes.to(grad), equal_nan=True)
    (infinite,) = mmfast.gated_activation(x.new_tensor([-math.inf]), activation=activation)
    assert infinite.isnan()


def test_gated_linear_units(backend):
    x = normal(2, 5, 74).to(device_of(backend))
    first, last = x.chunk(2, -1)
    torch.testing.assert_close(mmfast.geglu(x), first * F.gelu(last))
    tanh = F.gelu(first, approximate="tanh")
    torch.testing.assert_close(mmfast.geglu(x, approximate="tanh", gate="first"), tanh * last)
    torch.testing.assert_close(mmfast.swiglu(x), first * F.silu(last))
    torch.testing.assert_close(mmfast.swiglu(x, gate="first"), F.silu(first) * last)


@pytest.mark.parametrize("activation", gated_activation.ACTIVATIONS)
def test_halves_are_the_same_packed_or_not(backend, activation):
    x = normal(3, 7, 90).to(device_of(backend)).requires_grad_()
    grad = normal(3, 7, 45, seed=1).to(x.device)
    value, gate = x.chunk(2, -1)
    apart = mmfast.gated_activation(gate, value, activation=activation)
    packed = gated_activation._packed(x, activation, "last")
    assert_same_bits([apart], [packed])
    assert_same_bits(torch.autograd.grad(apart, x, grad), torch.autograd.grad(packed, x, grad))


def test_gradients(backend):
    device = device_of(backend)
    gate, value = (normal(3, 19, seed=s, dtype=torch.float64).to(device) for s in range(2))
    for activation in gated_activation.ACTIVATIONS:
        torch.autograd.gradcheck(
            lambda g, v, a=activation: mmfast.gated_activation(g, v, activation=a),
            (gate.requires_grad_(), value.requires_grad_()),
        )
    torch.autograd.gradcheck(
        mmfast.swiglu, (normal(3, 20, dtype=torch.float64).to(device).requires_grad_(),)
    )


def test_only_what_is_asked_for(backend):
    device = device_of(backend)
    gate, value, grad = (normal(3, 19, seed=s).to(device) for s in range(3))
    both = torch.autograd.grad(
        mmfast.gated_activation(gate.requires_grad_(), value.requires_grad_()),
        (gate, value), grad,
    )  # fmt: skip
    alone = torch.autograd.grad(mmfast.gated_activation(gate, value.detach()), gate, grad)
    assert_same_bits(alone, both[:1])
    alone = torch.autograd.grad(mmfast.gated_activation(gate.detach(), value), value, grad)
    assert_same_bits(alone, both[1:])


def test_layouts(backend):
    device = device_of(backend)
    gate, value = (normal(4, 6, 35, seed=s).to(device) for s in range(2))
    expected = mmfast.gated_activation(gate, value)
    for view in (
        torch.cat([gate, value], -1)[..., :35],
        gate.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([gate, value], -1)[..., 0],
    ):
        got = mmfast.gated_activation(view, value)
        assert got.is_contiguous()
        assert_same_bits([got], [expected])
    if backend != "reference":  # whose bits depend on places, as PyTorch's do
        rows = [mmfast.gated_activation(g, v) for g, v in zip(gate, value, strict=True)]
        assert_same_bits([torch.stack(rows)], [expected])


def test_threads_do_not_change_bits():
    x = normal(9, 70, 500)
    expected = mmfast.swiglu(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert_same_bits([mmfast.swiglu(x)], [expected])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mmfast.gated_activation(torch.ones(2, dtype=torch.int32)), TypeError, "float32"),
        (lambda: mmfast.gated_activation(torch.tensor(1.0)), ValueError, r"must be \(\.\.\., C\)"),
        (lambda: mmfast.gated_activation(torch.ones(2), torch.ones(3)), ValueError, r"\(2,\)"),
        (
            lambda: mmfast.gated_activation(torch.ones(2), torch.ones(2).double()),
            TypeError,
            "value must have the gate's dtype",
        ),
        (
            lambda: mmfast.gated_activation(torch.ones(2), torch.ones(2, device="meta")),
            ValueError,
            "on one device",
        ),
        (
            lambda: mmfast.gated_activation(torch.ones(2), activation="relu"),
            ValueError,
            "activation must be one of gelu, gelu_tanh, silu",
        ),
        (lambda: mmfast.swiglu(torch.ones(2, 3)), ValueError, r"must be \(\.\.\., 2 C\)"),
        (lambda: mmfast.swiglu(torch.ones(2), gate="middle"), ValueError, "first, last"),
        (lambda: mmfast.geglu(torch.ones(2), approximate="erf"), ValueError, "none, tanh"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_compile_without_a_break():
    def run(x, gate):
        return mmfast.geglu(x) + mmfast.gated_activation(gate)

    x, gate = normal(2, 5, 24).requires_grad_(), normal(2, 5, 12, seed=1).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = torch.autograd.grad(run(x, gate).sum(), (x, gate))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, gate).sum(), (x, gate)), expected)
