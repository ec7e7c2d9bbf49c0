"""Blocks of DiT as a single op: the same as by their parts, and only where they are no more."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cases import normal
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmfast
from benchmarks import transformers
from mmfast import backends
from mmfast.integrations import patch
from mmfast.nn import whole_block
from mmfast.ops import dit_block
from mmfast.ops import linear as linear_op

DIM, HEADS, TOKENS = 48, 3, 10


@pytest.fixture
def calls(monkeypatch):
    """Products of this processor count as the faster ones; how many blocks were made, and how."""
    monkeypatch.setattr(linear_op, "pays", lambda *_: True)
    counted = SimpleNamespace(whole=0)
    call = backends.call

    def counting(op, *args):
        if not torch.compiler.is_compiling():
            counted.whole += op is dit_block.OP
        return call(op, *args)

    monkeypatch.setattr(backends, "call", counting)
    return counted


def randomise(block):
    """Weights that hide nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return block


def own(**options):
    return randomise(mmfast.nn.DiTBlock(DIM, HEADS, **options))


def patched():
    model = nn.Sequential(randomise(transformers.DiTBlock(DIM, HEADS)))
    assert not patch(model).left
    return model[0]


KINDS = pytest.mark.parametrize("make", [own, patched])


def given(dtype=torch.float32, frames=0):
    shape = (2, frames, DIM) if frames else (2, DIM)
    x, c = normal(2, TOKENS, DIM).to(dtype), normal(*shape, seed=1).to(dtype)
    return x.requires_grad_(), c.requires_grad_()


def by_parts(block, *inputs):
    """The same without the op."""
    with mock.patch.object(whole_block, "dit_block", return_value=None):
        return block(*inputs)


def step(run, block, inputs, low=False):
    """The result, and gradients of inputs and parameters."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        made = run(block, *inputs)
    grad = normal(*made.shape, seed=5).to(made.dtype)
    wanted = [*inputs, *block.parameters()]
    grads = torch.autograd.grad(made, [t for t in wanted if t.requires_grad], grad)
    return made.detach(), *grads


def whole(block, *inputs):
    return block(*inputs)


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_same_as_by_parts(make, dtype, calls):
    block, inputs = make().to(dtype), given(dtype)
    calls.whole = 0  # patching tries blocks out
    expected = step(by_parts, block, inputs)
    assert calls.whole == 0
    got = step(whole, block, inputs)
    assert calls.whole == 1
    if not backends.extension_missing():
        assert torch.equal(got[0], expected[0])
    exact = step(by_parts, copy.deepcopy(block).double(), [t.double() for t in inputs])
    for a, b, true in zip(got, expected, exact, strict=True):
        assert a.dtype == b.dtype == dtype
        assert a.shape == b.shape
        limit = max(2 * distance(b, true), 4 * torch.finfo(dtype).eps)
        assert distance(a, true) <= limit


@KINDS
def test_autocast(make, calls):
    block, inputs = make(), given()
    calls.whole = 0
    expected = step(by_parts, block, inputs, low=True)
    got = step(whole, block, inputs, low=True)
    assert calls.whole == 1
    exact = step(by_parts, copy.deepcopy(block).double(), [t.double() for t in inputs])
    for a, b, true in zip(got, expected, exact, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert distance(a, true) <= 1.3 * distance(b, true) + 1e-4


def test_frames(calls):
    block, inputs = own(mlp_eps=1e-5, activation="silu"), given(frames=5)
    expected = step(by_parts, block, inputs)
    for a, b in zip(step(whole, block, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert calls.whole == 1


def test_nothing_is_pending(calls):
    block, (x, c) = own(), given()
    y, pending = block(x, c, defer=True)
    assert pending is None
    torch.testing.assert_close(y, by_parts(block, x, c))
    before = by_parts(block, x, c)
    parts, pending = by_parts(block, x, c, None), (c[:, None, :], x)
    assert torch.equal(parts, before)
    assert calls.whole == 1
    torch.testing.assert_close(block(x, c, pending), by_parts(block, x, c, pending))
    assert calls.whole == 1  # with what is pending, its parts add it where they normalise


def replaced(block):
    block.mlp.fc2 = nn.Sequential(block.mlp.fc2)


def quantised(block):
    block.attn.proj.weight = type("Quantised", (nn.Parameter,), {})(block.attn.proj.weight.data)


def overridden(block):
    block.attn.forward = type(block.attn).forward.__get__(block.attn)


OBSTACLES = {
    "a hook of a layer": lambda b: b.mlp.fc1.register_forward_hook(lambda *_: None),
    "a hook of the attention": lambda b: b.attn.register_forward_pre_hook(lambda *_: None),
    "an adapter": replaced,
    "weights of another kind": quantised,
    "a forward of its own": overridden,
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_hangs_on_to_parts_is_called(obstacle, calls):
    block, (x, c) = own(), given()
    expected = block(x, c)
    assert calls.whole == 1
    OBSTACLES[obstacle](block)
    torch.testing.assert_close(block(x, c), expected)
    assert calls.whole == 1


def test_options_that_it_lacks(calls):
    x, c = given()
    for options in ({"qk_norm": "rms"}, {"activation": "swiglu"}):
        own(**options)(x, c)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(own()(x, c, attn_mask=mask), by_parts(own(), x, c))
    own()(x[:, :0], c)
    own()(x, c[:1])  # one modulation for all
    assert calls.whole == 0


def test_dropout_stays(calls):
    block, (x, c) = patched(), given()
    calls.whole = 0
    block.attn.proj_drop.p = 0.5
    block.train()(x, c)
    assert calls.whole == 0
    block.eval()(x, c)
    assert calls.whole == 1


def test_only_where_products_are_faster(calls, monkeypatch):
    monkeypatch.setattr(linear_op, "pays", lambda *_: False)
    own()(*given())
    assert calls.whole == 0


@KINDS
def test_only_what_is_asked_for(make, calls):
    block, (x, c) = make(), given()
    _, *every = step(whole, block, (x, c))
    wanted = [x, c, *block.parameters()]
    for i, tensor in enumerate(wanted):
        for other in wanted:
            other.requires_grad_(other is tensor)
        _, only = step(whole, block, (x, c))
        torch.testing.assert_close(only, every[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_kept_without_gradients(dtype, calls):
    block, (x, c) = own().to(dtype), given(dtype)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.no_grad(), hooks:
        made = block(x, c)
    assert saved == []
    assert torch.equal(block(x, c), made)
    with torch.inference_mode():
        assert torch.equal(block(x, c), made)


def test_what_was_not_kept_is_made_again():
    sample = next(s for s in dit_block.OP.samples() if s.name.endswith("alone"))
    *given, _ = sample.make(torch.device("cpu"), torch.float32, 0)
    wanted = [t.requires_grad_() for t in given if torch.is_tensor(t)]
    grads = []
    for keep in (True, False):
        out, *kept = torch.ops.mmfast.dit_block(*given, keep)
        assert keep or all(t.numel() == 0 for t in kept)
        grads.append(torch.autograd.grad(out.square().sum(), wanted))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@KINDS
def test_what_is_kept(make, calls):
    """Less than the parts keep, and no norm's output."""
    block, inputs = make(), given()
    sizes = []
    for run in (whole, by_parts):
        saved = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        )
        with hooks:
            run(block, *inputs)
        sizes.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
    ours, theirs = sizes
    assert ours <= theirs - 2 * inputs[0].nbytes


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(make, reentrant, calls):
    block, inputs = make(), given()
    expected = step(whole, block, inputs)

    def again(block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=reentrant)

    if reentrant:  # which knows no autograd.grad
        made = again(block, *inputs)
        made.backward(normal(*made.shape, seed=5))
        got = (made.detach(), *(t.grad for t in (*inputs, *block.parameters())))
    else:
        got = step(again, block, inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@KINDS
@pytest.mark.parametrize("low", [False, True])
def test_compiles_whole(make, low, calls):
    block, inputs = make(), given()
    expected = step(whole, block, inputs, low)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")

    def run(block, *inputs):
        return compiled(*inputs)

    for a, b in zip(step(run, block, inputs, low), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradients_of_gradients_are_refused(calls):
    block, (x, c) = own(), given()
    (grad,) = torch.autograd.grad(block(x, c).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), c)


def test_twice_backward_with_the_graph_kept(calls):
    block, (x, c) = own(), given()
    made = block(x, c).square().sum()
    first = torch.autograd.grad(made, (x, c), retain_graph=True)
    for a, b in zip(torch.autograd.grad(made, (x, c)), first, strict=True):
        assert torch.equal(a, b)


def test_bits_do_not_depend_on_threads_or_batch(threads, calls):
    block, (x, c) = own(), given()
    block.adaLN_modulation = nn.Linear(DIM, 6 * DIM)
    with torch.no_grad():
        block.adaLN_modulation.weight.zero_()
        expected = block(x, c)
        torch.set_num_threads(1)
        assert torch.equal(block(x, c), expected)
        parts = [block(a, b) for a, b in zip(x.split(1), c.split(1), strict=True)]
    if not backends.extension_missing():
        assert torch.equal(torch.cat(parts), expected)
