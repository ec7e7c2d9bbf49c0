"""linear: against PyTorch, autocast, layouts, gradients, where its kernels are used, refusals."""

from __future__ import annotations

import pytest
import torch
from cases import backends_here, device_of, normal, samples_of_pytorch
from test_determinism import assert_same_bits
from test_gated_activation import OF_TORCH
from torch.nn import functional as F

import mmfast
from mmfast import backends
from mmfast.nn import MLP
from mmfast.ops import linear

BACKENDS = backends_here(linear.OP)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def leaves(backend, rows=(2, 37), inputs=70, outputs=66, dtype=torch.float32):
    """x, weight and bias that require gradients, and the gradient of the result."""
    device = device_of(backend)
    shapes = (*rows, inputs), (outputs, inputs), (outputs,), (*rows, outputs)
    tensors = [normal(*s, seed=i, dtype=dtype).to(device) for i, s in enumerate(shapes)]
    return [t.requires_grad_() for t in tensors[:3]], tensors[3]


def step(given, grad, activation="gelu_tanh"):
    """The result and all gradients."""
    y = mmfast.linear(*given, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, [t for t in given if t is not None], grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", linear.ACTIVATIONS)
def test_error_is_at_most_twice_torchs(backend, activation, dtype):
    given, grad = leaves(backend, (150,), 1100, 130, dtype)

    def run(act, tensors):
        y = F.linear(act(tensors[0]), *tensors[1:])
        return [y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))]

    of_torch = OF_TORCH.get(activation, lambda x: x)
    truth = run(of_torch, [t.detach().double().requires_grad_() for t in given])
    theirs, ours = run(of_torch, given), step(given, grad, activation)
    for want, their, our in zip(truth, theirs, ours, strict=True):
        errors = [(got.double() - want).norm() / want.norm() for got in (our, their)]
        assert errors[0] <= 2 * errors[1] + 1e-7


def test_samples_of_pytorch(backend):
    count = 0
    for (x, *rest), _ in samples_of_pytorch(
        "nn.functional.linear", torch.float64, device_of(backend)
    ):
        if rest[0].dim() != 2 or (len(rest) > 1 and rest[1] is not None and rest[1].dim() != 1):
            continue
        torch.testing.assert_close(mmfast.linear(x, *rest), F.linear(x, *rest))
        count += 1
    assert count > 1


def test_gradients(backend):
    given, _ = leaves(backend, (2, 3), 5, 4, torch.float64)
    for activation in linear.ACTIVATIONS:
        torch.autograd.gradcheck(
            lambda *tensors, a=activation: mmfast.linear(*tensors, activation=a), tuple(given)
        )
    torch.autograd.gradcheck(mmfast.linear, tuple(given[:2]))


def test_only_what_is_asked_for(backend):
    given, grad = leaves(backend)
    _, *together = step(given, grad)
    for i in range(3):
        alone = [t if i == j else t.detach() for j, t in enumerate(given)]
        y = mmfast.linear(*alone, activation="gelu_tanh")
        assert_same_bits(torch.autograd.grad(y, alone[i], grad), together[i : i + 1])


def test_the_activation_is_not_saved(backend):
    given, _ = leaves(backend)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mmfast.linear(*given, activation="gelu_tanh")
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in given[:2]}


def test_layouts(backend):
    (x, weight, bias), grad = leaves(backend)
    expected = step([x, weight, bias], grad)
    views = {
        "rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "columns": lambda t: t.detach().mT.contiguous().mT,
        "steps": lambda t: torch.stack([t, t], -1)[..., 0],
    }
    for view in views.values():
        given = [view(t.detach()).requires_grad_() for t in (x, weight)]
        got = step([*given, bias], view(grad))
        assert got[0].is_contiguous()
        if backend == "reference":  # whose bits depend on places, as PyTorch's do
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        else:
            assert_same_bits(got, expected)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the compiled extension is absent")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_batch(dtype, threads):
    given, grad = leaves("cpp", (1500,), 200, 330, dtype)
    with mmfast.use_backend("cpp"):
        expected = step(given, grad)
        torch.set_num_threads(1)
        assert_same_bits(step(given, grad), expected)
        x, weight, bias = given
        parts = [step([p, weight, bias], g) for p, g in zip(x.split(37), grad.split(37), strict=1)]
    for i in range(2):
        assert_same_bits([torch.cat([part[i] for part in parts])], expected[i : i + 1])


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_has_the_dtypes_of_torchs(backend, wide):
    (x, weight, bias), grad = leaves(backend)
    given = [x.detach().to(wide).requires_grad_(), weight, bias]
    with torch.autocast("cpu", torch.bfloat16):
        ours = mmfast.linear(*given, activation="silu")
        theirs = F.linear(F.silu(given[0]), *given[1:])
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)
    grads = [torch.autograd.grad(y, given, grad.bfloat16()) for y in (ours, theirs)]
    for our, their in zip(*grads, strict=True):
        assert our.dtype == their.dtype
        assert (our.double() - their.double()).norm() <= 0.02 * their.double().norm()


def test_kernels_serve_where_they_are_faster(monkeypatch):
    x, weight = normal(3, 8), normal(5, 8, seed=1)
    calls = []
    monkeypatch.setattr(linear.backends, "call", lambda op, *a: calls.append(op.name) or a[0])
    for level in ("", "baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"):
        monkeypatch.setattr(linear.backends, "isa", lambda level=level: level)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            faster = level in ("avx512vnni", "avx512bf16") and dtype == torch.float32
            faster |= level[:3] == "avx" and dtype == torch.bfloat16
            calls.clear()
            mmfast.linear(x.to(dtype), weight.to(dtype))
            assert calls == ["linear"] * faster
    calls.clear()
    mmfast.linear(x.to("meta"), weight.to("meta"))
    assert calls == []


def test_a_fallback_is_torchs(monkeypatch):
    given, grad = leaves("reference")
    monkeypatch.setattr(backends, "isa", lambda: "avx2")
    expected = F.linear(mmfast.gated_activation(given[0]), *given[1:])
    ours = mmfast.linear(*given, activation="gelu_tanh")
    assert_same_bits([ours], [expected])
    grads = [torch.autograd.grad(y, given, grad) for y in (ours, expected)]
    assert_same_bits(*grads)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mmfast.linear(torch.ones(2, dtype=torch.int32), torch.ones(3, 2)), TypeError, "x"),
        (lambda: mmfast.linear(torch.ones(2), torch.ones(3, 4)), ValueError, r"\(3, 4\)"),
        (lambda: mmfast.linear(torch.ones(2), torch.ones(2)), ValueError, r"weight \(N, K\)"),
        (lambda: mmfast.linear(torch.tensor(1.0), torch.ones(1, 1)), ValueError, r"\(\.\.\., K\)"),
        (
            lambda: mmfast.linear(torch.ones(2), torch.ones(3, 2).double()),
            TypeError,
            "weight must",
        ),
        (
            lambda: mmfast.linear(torch.ones(2), torch.ones(3, 2), torch.ones(2)),
            ValueError,
            r"bias must be \(3,\), got \(2,\)",
        ),
        (
            lambda: mmfast.linear(torch.ones(2), torch.ones(3, 2, device="meta")),
            ValueError,
            "on one device",
        ),
        (
            lambda: mmfast.linear(torch.ones(2), torch.ones(3, 2), activation="relu"),
            ValueError,
            "activation must be one of none, gelu, gelu_tanh, silu",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_float64_is_not_mixed():
    x, weight = normal(2, 3), normal(4, 3).double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="weight must"):
        mmfast.linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert mmfast.linear(x.double(), weight).dtype == torch.float64
    if "cpp" in BACKENDS:
        with pytest.raises(RuntimeError, match="float64 with float64 only"):
            torch.ops.mmfast.linear(x.double(), weight, None, "none", "bfloat16")


def test_modules_call_what_is_more_than_a_layer():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp, x = MLP(6), normal(3, 6)
    expected = mlp(x)
    torch.testing.assert_close(expected, mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))
    handle = mlp.fc2.register_forward_hook(lambda module, given, y: 2 * y)
    torch.testing.assert_close(mlp(x), 2 * expected)
    handle.remove()
    mlp.fc2.__class__ = Doubled
    torch.testing.assert_close(mlp(x), 2 * expected)


@pytest.mark.parametrize("level", ["avx512bf16", "avx2"])
def test_compile_without_a_break(monkeypatch, level):
    if not backends.isa():
        pytest.skip("the compiled extension is absent")
    given, grad = leaves("cpp")
    monkeypatch.setitem(linear._FASTER, torch.float32, (backends.isa(),) * (level != "avx2"))

    def run(x, weight, bias):
        return mmfast.linear(x, weight, bias, activation="gelu_tanh")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = torch.autograd.grad(run(*given), given, grad)
    torch.testing.assert_close(torch.autograd.grad(compiled(*given), given, grad), expected)
