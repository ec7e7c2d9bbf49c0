"""patchify and unpatchify: conventions, layouts, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from cases import backends_here, device_of, normal
from test_determinism import assert_same_bits
from torch.nn import functional as F

import mmfast
from mmfast.ops import patchify

BACKENDS = backends_here(patchify.OP)
SHAPES = [((2, 3, 12), (4,)), ((2, 3, 4, 6), (2, 3)), ((2, 3, 4, 6, 4), (1, 2, 2))]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_channels_first_is_a_convolution(backend, shape, patch):
    x = normal(*shape).to(device_of(backend))
    weight = normal(5, shape[1], *patch, seed=1).to(x.device)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(patch) - 1]
    expected = convolution(x, weight, stride=patch).flatten(2).transpose(1, 2)
    got = F.linear(mmfast.patchify(x, patch), weight.flatten(1))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_channels_last_is_dits(backend):
    tokens = normal(2, 6, 20).to(device_of(backend))
    expected = torch.einsum("nhwpqc->nchpwq", tokens.reshape(2, 2, 3, 2, 2, 5)).reshape(2, 5, 4, 6)
    got = mmfast.unpatchify(tokens, 2, (4, 6), order="channels_last")
    assert_same_bits([got], [expected])


@pytest.mark.parametrize("order", patchify.ORDERS)
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_inverse_and_gradients(backend, shape, patch, order):
    x = normal(*shape, dtype=torch.float64).to(device_of(backend)).requires_grad_()
    tokens = mmfast.patchify(x, patch, order=order)
    back = mmfast.unpatchify(tokens, patch, shape[2:], order=order)
    assert_same_bits([back], [x])
    grad = normal(*tokens.shape, seed=1, dtype=torch.float64).to(x.device)
    (of_x,) = torch.autograd.grad(tokens, x, grad)
    assert_same_bits([mmfast.patchify(of_x, patch, order=order)], [grad])
    (of_x,) = torch.autograd.grad(back, x, x.detach())
    assert_same_bits([of_x], [x])


@pytest.mark.parametrize("order", patchify.ORDERS)
def test_layouts(backend, order):
    x = normal(2, 3, 4, 6).to(device_of(backend))
    expected = mmfast.patchify(x, 2, order=order)
    views = (x.to(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 1])
    for view in (*views, torch.cat([x, x], 3)[..., 6:]):
        assert_same_bits([mmfast.patchify(view, 2, order=order)], [expected])
    for view in (torch.cat([expected, expected], 2)[..., 12:], expected.mT.contiguous().mT):
        assert_same_bits([mmfast.unpatchify(view, 2, (4, 6), order=order)], [x])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mmfast.patchify(x[0, 0], 2), r"x must be \(B, C, W\)"),
        (lambda x: mmfast.patchify(x, 3), r"multiples of patch_size \(3, 3\), got \(4, 6\)"),
        (lambda x: mmfast.patchify(x, (2, 2, 2)), "patch_size must be a number or 2 numbers"),
        (lambda x: mmfast.patchify(x, 0), "at least 1"),
        (lambda x: mmfast.patchify(x, 2, order="last"), "one of channels_first, channels_last"),
        (lambda x: mmfast.unpatchify(x[0], 2, (4, 6)), r"tokens must be \(B, 6, C \* 4\)"),
        (lambda x: mmfast.unpatchify(x[0], 2, (5, 6)), "sizes must be multiples"),
        (lambda x: mmfast.unpatchify(x[0], 2, ()), r"sizes must be \(W,\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(2, 3, 4, 6))
    with pytest.raises(TypeError, match="must be float32"):
        mmfast.patchify(torch.ones(2, 3, 4, 6, dtype=torch.int32), 2)


def test_compile_without_a_break():
    def run(x):
        tokens = mmfast.patchify(x, 2)
        return mmfast.unpatchify(tokens.sin(), 2, x.shape[2:])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (4, 8):
        x = normal(2, 3, size, 6).requires_grad_()
        expected = torch.autograd.grad(run(x).sum(), x)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), expected)
