"""vector_quantize and its gradients against plain autograd, and ema_update_."""

from __future__ import annotations

import pytest
import torch
from cases import METRICS, backends_here, device_of, normal

import mmfast
from mmfast.ops import vector_quantize

BACKENDS = backends_here(vector_quantize.OP)
WIDE = torch.float64


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def problem(backend, n=40, k=9, d=6, heads=0, dtype=WIDE):
    lead = (heads,) if heads else ()
    x, codebook = normal(*lead, n, d, dtype=dtype), normal(*lead, k, d, seed=1, dtype=dtype)
    device = device_of(backend)
    return x.to(device).requires_grad_(), codebook.to(device).requires_grad_()


def plain(x, codebook, indices, gradient):
    """Quantised vectors as papers write them, by autograd alone."""
    codes = codebook[indices]
    if gradient == "straight_through":
        return x + (codes - x).detach()
    if gradient == "none":
        return codes
    length_x, length_q = (t.detach().norm(dim=-1, keepdim=True) for t in (x, codes))
    e, q = x.detach() / length_x, codes.detach() / length_q
    r = torch.nn.functional.normalize(e + q, dim=-1)
    rotated = x - 2 * (x * r).sum(-1, keepdim=True) * r + 2 * (x * e).sum(-1, keepdim=True) * q
    return length_q / length_x * rotated


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
def test_gradients(backend, gradient, metric):
    x, codebook = problem(backend)
    result = mmfast.vector_quantize(x, codebook, gradient=gradient, metric=metric)
    indices, _ = mmfast.nearest_code(x, codebook, metric=metric)
    assert torch.equal(result.indices, indices)
    expected = plain(x, codebook, indices, gradient)
    torch.testing.assert_close(result.quantized, expected)
    codes = codebook[indices]
    mse = torch.nn.functional.mse_loss
    weight = normal(*x.shape, seed=2, dtype=WIDE).to(x.device)
    got = (result.quantized * weight).sum() + 3 * result.commitment_loss + 5 * result.codebook_loss
    want = (expected * weight).sum() + 3 * mse(codes.detach(), x) + 5 * mse(codes, x.detach())
    torch.testing.assert_close(got, want)
    gradients = torch.autograd.grad(got, (x, codebook))
    for a, b in zip(gradients, torch.autograd.grad(want, (x, codebook)), strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_is_asked_for(backend):
    x, codebook = problem(backend)
    result = mmfast.vector_quantize(x, codebook.detach())
    assert torch.equal(torch.autograd.grad(result.quantized.sum(), x)[0], torch.ones_like(x))
    result = mmfast.vector_quantize(x.detach(), codebook)
    (gradient,) = torch.autograd.grad(result.codebook_loss, codebook)
    assert gradient.shape == codebook.shape
    with torch.no_grad():
        assert not mmfast.vector_quantize(x, codebook).quantized.requires_grad


@pytest.mark.parametrize("heads", [0, 3])
def test_mask(backend, heads):
    x, codebook = problem(backend, heads=heads)
    mask = (normal(*x.shape[:-1], seed=5) < 0.5).to(x.device)
    result = mmfast.vector_quantize(x, codebook, mask=mask)
    assert torch.equal(result.quantized[~mask], x[~mask])
    assert (result.indices[~mask] == -1).all()
    assert torch.equal(result.counts.sum(-1), mask.sum(-1).to(WIDE))
    for head in range(max(heads, 1)):
        a, c, m = (t[head] if heads else t for t in (x, codebook, mask))
        alone = mmfast.vector_quantize(a[m], c)
        loss = result.commitment_loss[head] if heads else result.commitment_loss
        torch.testing.assert_close(alone.commitment_loss, loss)
    (gradient,) = torch.autograd.grad(
        result.commitment_loss.sum() + result.quantized.sum(), x, retain_graph=True
    )
    assert (gradient[~mask] == 1).all()


def test_nothing_to_quantise(backend):
    x, codebook = problem(backend, n=0)
    result = mmfast.vector_quantize(x, codebook)
    assert result.quantized.shape == (0, 6)
    assert result.commitment_loss == 0
    assert (result.counts == 0).all()
    result = mmfast.vector_quantize(*problem(backend, n=3), mask=torch.zeros(3, dtype=torch.bool))
    assert result.commitment_loss == result.codebook_loss == 0


def test_directional():
    x, codebook = problem("reference")
    noise = normal(40, 6, seed=3, dtype=WIDE)
    result = mmfast.vector_quantize(x, codebook, gradient="directional", noise=noise)
    codes = codebook[result.indices]
    error = codes - x
    direction = (error + 0.005**0.5 * noise).detach()
    expected = x + direction / direction.norm(dim=-1, keepdim=True) * error.norm(
        dim=-1, keepdim=True
    )
    torch.testing.assert_close(result.quantized, expected)
    got = torch.autograd.grad(result.quantized.square().sum(), (x, codebook))
    want = torch.autograd.grad(expected.square().sum(), (x, codebook))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_keeps_its_dtype(backend):
    x, codebook = problem(backend, dtype=torch.bfloat16)
    codebook = codebook.detach().float().requires_grad_()
    result = mmfast.vector_quantize(x, codebook)
    assert result.quantized.dtype == torch.bfloat16
    assert result.commitment_loss.dtype == torch.float32
    (result.quantized.sum() + result.commitment_loss + result.codebook_loss).backward()
    assert x.grad.dtype == torch.bfloat16
    assert codebook.grad.dtype == torch.float32


def test_messages():
    x, codebook = problem("reference")
    with pytest.raises(ValueError, match="gradient must be one of straight_through, rotation"):
        mmfast.vector_quantize(x, codebook, gradient="ste")
    with pytest.raises(ValueError, match=r"mask must have shape \(40,\), got \(39,\)"):
        mmfast.vector_quantize(x, codebook, mask=torch.ones(39, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        mmfast.vector_quantize(x, codebook, mask=torch.ones(40))
    with pytest.raises(ValueError, match="noise is for gradient 'directional'"):
        mmfast.vector_quantize(x, codebook, noise=x)


def test_compiles_with_gradients():
    x, codebook = problem("reference")

    def loss(x, codebook):
        result = mmfast.vector_quantize(x, codebook, gradient="rotation")
        return result.quantized.square().sum() + result.commitment_loss + result.codebook_loss

    want = torch.autograd.grad(loss(x, codebook), (x, codebook))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, codebook), (x, codebook)), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weighted", [False, True])
def test_ema_update(weighted):
    x, codebook = (t.detach() for t in problem("reference"))
    indices, _ = mmfast.nearest_code(x, codebook)
    weights = normal(40, seed=4, dtype=WIDE).abs() if weighted else None
    size, total = torch.ones(9, dtype=WIDE), codebook.clone()
    chosen = torch.nn.functional.one_hot(indices, 9).to(WIDE)
    if weights is not None:
        chosen = chosen * weights[:, None]
    want_size = 0.9 * size + 0.1 * chosen.sum(0)
    want_total = 0.9 * total + 0.1 * chosen.T @ x
    smooth = (want_size + 1e-3) / (want_size.sum() + 9e-3) * want_size.sum()
    mmfast.ema_update_(codebook, size, total, x, indices, decay=0.9, eps=1e-3, weights=weights)
    torch.testing.assert_close(size, want_size)
    torch.testing.assert_close(total, want_total)
    torch.testing.assert_close(codebook, want_total / smooth[:, None])


def test_ema_update_of_nothing_leaves_the_codes():
    codebook = normal(5, 3)
    before, size, total = codebook.clone(), torch.zeros(5), torch.zeros(5, 3)
    mmfast.ema_update_(codebook, size, total, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(codebook, before)


def test_ema_update_messages():
    arguments = [normal(5, 3), torch.ones(5), torch.ones(5, 3), normal(4, 3), torch.arange(4)]
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got 2"):
        mmfast.ema_update_(*arguments, decay=2)
    arguments[1] = torch.ones(4)
    with pytest.raises(ValueError, match=r"cluster_size must have shape \(5,\), got \(4,\)"):
        mmfast.ema_update_(*arguments)
