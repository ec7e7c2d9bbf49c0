"""The ops inside torch: opcheck, compile, export, vmap, autograd, meta tensors."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from cases import METRICS, backends_here, device_of, normal
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import mmfast
from mmfast import backends, library
from mmfast.ops import nearest_code
from mmfast.registry import OPS

# A dtype for gradients and one without, which the samples of an op take in turns.
SAMPLES = [
    pytest.param(
        op,
        sample,
        {True: op.dtypes[i % len(op.dtypes)], False: op.dtypes[(i + 1) % len(op.dtypes)]},
        id=f"{op.name}-{sample.name}",
    )
    for op in OPS.values()
    for i, sample in enumerate(s for s in op.samples() if not s.bench)
]


def overload(name: str) -> Any:
    return getattr(torch.ops.mmfast, name).default


def same(got: Any, expected: Any) -> bool:
    pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No compiled code of another test."""
    torch.compiler.reset()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("op", "sample", "dtypes"), SAMPLES)
def test_opcheck(op, sample, dtypes, gradients):
    arguments = sample.make(torch.device("cpu"), dtypes[gradients], 0)
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            argument.requires_grad_(gradients)
    torch.library.opcheck(overload(op.name), arguments)


DIFFERENTIABLE = pytest.mark.parametrize(
    ("op", "sample"),
    [s.values[:2] for s in SAMPLES if s.values[0].backward],
    ids=lambda value: value.name,
)


@DIFFERENTIABLE
def test_gradients_by_the_short_way(op, sample, monkeypatch):
    """They and the outputs are the dispatcher's, bit for bit."""
    calls = []
    short = library._functions[op.name]
    monkeypatch.setitem(library._functions, op.name, lambda *a: calls.append(1) or short(*a))
    arguments = sample.make(torch.device("cpu"), op.dtypes[0], 0)
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for tensor in inputs:
        tensor.requires_grad_()
    found = []
    for run in (overload(op.name), functools.partial(backends.call, op)):
        outputs = tree_leaves(run(*arguments))
        tracked = [o for o in outputs if o.requires_grad]
        names = [o.grad_fn and o.grad_fn.name() for o in outputs]
        grads = [o.detach().cos() for o in tracked]
        wanted = torch.autograd.grad(tracked, inputs, grads, allow_unused=True) if inputs else ()
        found.append(([o.detach() for o in outputs], [w is None for w in wanted], names))
        found[-1][0].extend(w for w in wanted if w is not None)
    assert len(calls) == bool(inputs)
    assert found[0][1:] == found[1][1:]
    assert same(found[0][0], found[1][0])


FEW = pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, sample, id=f"{op.name}-{sample.name}")
        for op in OPS.values()
        if op.backward
        for sample in [s for s in op.samples() if not s.bench][1:6:2]
    ],
)


def with_inputs(op, sample):
    """A call of ``op`` with its floating tensors as arguments, and these; it returns a sum of its
    differentiable outputs, alike for the same numbers."""
    arguments = sample.make(torch.device("cpu"), op.dtypes[0], 0)
    places = [
        i
        for i, a in enumerate(arguments)
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()
    ]
    inputs = [arguments[i].detach().requires_grad_() for i in places]
    tracked = [o.requires_grad for o in tree_leaves(run_on(op, arguments, places, inputs))]

    def total(*inputs):
        outputs = tree_leaves(run_on(op, arguments, places, inputs))
        return sum(o.cos().sum() for o, wanted in zip(outputs, tracked, strict=True) if wanted)

    return total, inputs


def run_on(op, arguments, places, inputs):
    given = list(arguments)
    for place, tensor in zip(places, inputs, strict=True):
        given[place] = tensor
    return backends.call(op, *given)


@pytest.mark.parametrize("forced", [None, "reference"])
@FEW
def test_gradients_of_gradients_raise(op, sample, forced):
    """None is left out in silence, also of a loss that nothing comes after."""
    total, inputs = with_inputs(op, sample)
    if not inputs:
        return
    with mmfast.use_backend(forced) if forced else contextlib.nullcontext():
        grads = torch.autograd.grad(total(*inputs), inputs, create_graph=True, allow_unused=True)
    for i, grad in enumerate(grads):
        if grad is None or (op.name == "gated_residual" and i == 0):  # which is passed on
            continue
        assert grad.requires_grad
        if not op.backward.differentiable:
            with pytest.raises(
                NotImplementedError, match=f"twice: the gradients of mmfast.{op.name} "
            ):
                torch.autograd.grad(grad.sum(), inputs, allow_unused=True, retain_graph=True)


def test_a_penalty_is_not_left_out():
    x = normal(7, 3).requires_grad_()
    loss = mmfast.vector_quantize(x, normal(5, 3)).commitment_loss
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiate twice"):
        (loss + grad.square().sum()).backward()


MODULATION = normal(2, 16)


def _normed(x: torch.Tensor) -> torch.Tensor:
    return mmfast.layer_norm_modulate(x[None], MODULATION[:1], MODULATION[1:])[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_graph_of_gradients_that_nobody_uses(reentrant):
    """Checkpoints give what was saved once."""
    x = normal(3, 16).requires_grad_()
    (want,) = torch.autograd.grad(_normed(x).square().sum(), x)
    y = checkpoint(lambda x: _normed(x).square(), x, use_reentrant=reentrant).sum()
    y.backward(create_graph=not reentrant)
    torch.testing.assert_close(x.grad, want)
    x.grad = None


def test_batched_gradients_with_a_graph():
    x = normal(3, 16).requires_grad_()
    y, grads = _normed(x), normal(4, 3, 16)
    found = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
    for grad, got in zip(grads, found, strict=True):
        want = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
        torch.testing.assert_close(got, want)
    with pytest.raises(NotImplementedError, match="differentiate twice"):
        torch.autograd.grad(y, x, grads, is_grads_batched=True, create_graph=True)


def test_a_gradient_that_is_passed_on_has_its_own():
    x = normal(2, 3, 8).requires_grad_()
    y = mmfast.gated_residual(x, normal(2, 8), normal(2, 3, 8)).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))


def test_transforms_around_mapped_ops():
    x = normal(5, 3, 16)
    want = torch.func.vmap(torch.func.grad(lambda x: _normed(x).square().sum()))(x)
    got = torch.func.grad(lambda x: torch.func.vmap(_normed)(x).square().sum())(x)
    torch.testing.assert_close(got, want)
    t = torch.tensor(2.0)
    value, tangent = torch.func.jvp(lambda s: (s * torch.func.vmap(_normed)(x)).sum(), (t,), (t,))
    torch.testing.assert_close(tangent, value)
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(torch.func.vmap(_normed), (x,), (x,))


@pytest.mark.skipif(bool(mmfast.backends.extension_missing()), reason="the extension is absent")
def test_forced_backends_drop_no_tangent():
    x = normal(3, 16)
    refused = pytest.raises(NotImplementedError, match="no forward-mode")
    with (
        mmfast.use_backend("cpp"),
        torch.no_grad(),
        torch.autograd.forward_ad.dual_level(),
        refused,
    ):
        _normed(torch.autograd.forward_ad.make_dual(x, x))


@FEW
def test_transforms(op, sample):
    """torch.func's gradients are autograd's, alone and mapped; there is no forward mode."""
    total, inputs = with_inputs(op, sample)
    if not inputs:
        return
    wanted = torch.autograd.grad(total(*inputs), inputs, allow_unused=True)
    plain = tuple(t.detach() for t in inputs)
    places = tuple(range(len(plain)))
    got = torch.func.grad(total, places)(*plain)
    stacked = tuple(torch.stack([t, t]) for t in plain)
    mapped = torch.func.vmap(torch.func.grad(total, places))(*stacked)
    for want, one, two in zip(wanted, got, mapped, strict=True):
        expected = torch.zeros_like(one) if want is None else want
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(two[1], expected)
    with pytest.raises(NotImplementedError, match=f"mmfast.{op.name} has no forward-mode"):
        torch.func.jvp(total, plain, plain)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(t, t) for t in plain]
        with pytest.raises(NotImplementedError, match=f"mmfast.{op.name} has no forward-mode"):
            total(*dual)


def test_tracers_and_modes_get_the_op_itself(monkeypatch):
    """Nothing that looks at calls is passed by."""
    monkeypatch.setitem(library._functions, "gated_activation", None)

    def run(x):
        return mmfast.gated_activation(x, activation="silu")

    class Wrapped(torch.Tensor):
        pass

    def step(x):
        return torch.autograd.grad(run(x).sum(), x)[0]

    x = normal(3, 8).requires_grad_()
    expected = torch.ops.mmfast.gated_activation_bwd(
        torch.ones(3, 8), x.detach(), None, "silu", "gate", True, False
    )[0]
    graph = make_fx(step, tracing_mode="fake")(x)
    assert "mmfast.gated_activation" in graph.code
    assert same(graph(x), expected)
    assert same(torch.jit.trace(run, x)(x.detach()), run(x.detach()))
    with torch.device("cpu"):
        assert same(step(x), expected)
    assert type(run(x.detach().as_subclass(Wrapped).requires_grad_())) is Wrapped
    with FakeTensorMode() as mode:
        assert run(mode.from_tensor(x)).requires_grad
    with pytest.raises(TypeError):
        run(x)  # has no short way any more


def quantise(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Both ops, among others: the quantised vectors, how full the codes are, their mean."""
    indices, distances = mmfast.nearest_code(x * 2, codebook)
    counts, sums = mmfast.code_statistics(x, indices, codebook.shape[0])
    return codebook[indices], distances.sqrt(), counts, sums / counts.clamp_min(1)[:, None]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_break(compiler, dynamic):
    compiled = torch.compile(quantise, fullgraph=True, dynamic=dynamic, backend=compiler)
    for n in (33, 50, 7) if dynamic else (33,):
        x, codebook = normal(n, 8), normal(20, 8, seed=1)
        torch.testing.assert_close(compiled(x, codebook), quantise(x, codebook))


@pytest.mark.parametrize("metric", METRICS)
def test_compile_each_metric(metric):
    def nearest(x, codebook):
        return mmfast.nearest_code(x, codebook, metric=metric)

    compiled = torch.compile(nearest, fullgraph=True, backend="aot_eager")
    for x, codebook in (
        (normal(2, 3, 8), normal(20, 8, seed=1)),
        (normal(3, 2, 8), normal(3, 20, 8, seed=1)),
    ):
        assert same(compiled(x, codebook), nearest(x, codebook))


def test_one_compilation_serves_every_batch_size():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(quantise, fullgraph=True, dynamic=True, backend=count)
    for n in (40, 33, 2, 70):
        compiled(normal(n, 8), normal(20, 8, seed=1))
    assert len(graphs) == 1


class Quantiser(torch.nn.Module):
    """A codebook as a module, as models hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", normal(20, 8, seed=1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantise(x, self.codebook)


def test_export_with_any_batch_size():
    module = Quantiser()
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(module, (normal(33, 8),), dynamic_shapes=batch)
    assert "mmfast.nearest_code" in str(program.graph)
    for n in (33, 5, 64):
        assert same(program.module()(normal(n, 8)), module(normal(n, 8)))


def test_export_survives_a_file(tmp_path):
    module = Quantiser()
    path = tmp_path / "quantiser.pt2"
    torch.export.save(torch.export.export(module, (normal(33, 8),)), path)
    assert same(torch.export.load(path).module()(normal(33, 8)), module(normal(33, 8)))


# in_dims of x and codebook, and their shapes: 4 is the batch, 3 the heads.
VMAPS = [
    ((0, None), (4, 10, 5), (20, 5)),
    ((1, None), (10, 4, 5), (20, 5)),
    ((2, None), (10, 5, 4), (20, 5)),
    ((None, 0), (10, 5), (4, 20, 5)),
    ((0, 0), (4, 10, 5), (4, 20, 5)),
    ((1, 2), (10, 4, 5), (20, 5, 4)),
    ((0, None), (4, 5), (20, 5)),
    ((0, None), (4, 3, 10, 5), (3, 20, 5)),
    ((2, None), (3, 10, 4, 5), (3, 20, 5)),
    ((None, 0), (3, 10, 5), (4, 3, 20, 5)),
    ((0, 0), (4, 3, 10, 5), (4, 3, 20, 5)),
    ((1, 1), (3, 4, 10, 5), (3, 4, 20, 5)),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("in_dims", "x_shape", "codebook_shape"), VMAPS, ids=str)
@pytest.mark.parametrize("backend", backends_here(nearest_code.OP))
def test_vmap_of_nearest_code(backend, in_dims, x_shape, codebook_shape, metric):
    device = device_of(backend)
    x, codebook = normal(*x_shape).to(device), normal(*codebook_shape, seed=1).to(device)

    def nearest(x, codebook):
        return overload("nearest_code")(x, codebook, metric)

    got = torch.func.vmap(nearest, in_dims=in_dims)(x, codebook)
    for i in range(4):
        one = [
            t if dim is None else t.select(dim, i)
            for t, dim in zip((x, codebook), in_dims, strict=True)
        ]
        assert same([t[i] for t in got], nearest(*one))


def test_vmap_of_the_public_function():
    x, codebook = normal(4, 10, 5), normal(20, 5, seed=1)
    got = torch.func.vmap(mmfast.nearest_code, in_dims=(0, None))(x, codebook)
    assert same(got, mmfast.nearest_code(x, codebook))


def test_nested_vmap():
    x, codebook = normal(4, 6, 10, 5), normal(6, 20, 5, seed=1)
    inner = torch.func.vmap(mmfast.nearest_code)
    got = torch.func.vmap(inner, in_dims=(0, None))(x, codebook)
    expected = [mmfast.nearest_code(x[:, i], codebook[i]) for i in range(6)]
    assert same(got, [torch.stack(tensors, 1) for tensors in zip(*expected, strict=True)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(mode):
    x, codebook = normal(10, 5), normal(20, 5, seed=1)
    expected = quantise(x, codebook)
    with mode():
        assert same(quantise(normal(10, 5), normal(20, 5, seed=1)), expected)


@pytest.mark.parametrize("forced", [None, *backends_here(nearest_code.OP)])
def test_outputs_require_no_gradient(forced):
    device = torch.device("cpu") if forced is None else device_of(forced)
    x = normal(10, 5).to(device).requires_grad_()
    codebook = normal(20, 5, seed=1).to(device).requires_grad_()
    weights = normal(10).to(device).requires_grad_()
    before, mmfast.backends._forced = mmfast.backends._forced, forced
    try:
        indices, distances = mmfast.nearest_code(x, codebook)
        counts, sums = mmfast.code_statistics(x, indices, 20, weights=weights)
    finally:
        mmfast.backends._forced = before
    assert not any(t.requires_grad for t in (indices, distances, counts, sums))
    with pytest.raises(RuntimeError, match="does not require grad"):
        distances.sum().backward()


def test_gradients_pass_by_the_lookup():
    """The straight-through estimator: only what torch computed has a gradient."""
    x, codebook = normal(10, 5).requires_grad_(), normal(20, 5, seed=1).requires_grad_()
    quantised = codebook[mmfast.nearest_code(x, codebook)[0]]
    (x + (quantised - x).detach()).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert codebook.grad is None


@pytest.mark.parametrize(("op", "sample", "dtypes"), SAMPLES)
def test_meta_tensors(op, sample, dtypes):
    arguments = sample.make(torch.device("cpu"), dtypes[False], 0)
    result = op.result(overload(op.name), arguments)
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    for meta, real in zip(op.result(overload(op.name), on_meta), result, strict=True):
        assert meta.device.type == "meta"
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)])
def test_no_vectors(shape):
    indices, distances = mmfast.nearest_code(torch.zeros(shape), normal(4, 5))
    assert indices.shape == distances.shape == shape[:-1]
    counts, sums = mmfast.code_statistics(torch.zeros(0, 5), indices.flatten(), 4)
    assert torch.equal(counts, torch.zeros(4))
    assert torch.equal(sums, torch.zeros(4, 5))
