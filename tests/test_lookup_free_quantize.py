"""lookup_free_quantize against tables of all codes, autograd and the peer."""

from __future__ import annotations

import math

import pytest
import torch
from cases import VIEWS, backends_here, device_of, normal
from torch.nn import functional

import mmfast
from mmfast.ops import lookup_free_quantize

BACKENDS = backends_here(lookup_free_quantize.OP)
WIDE = torch.float64


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def problem(backend, n=30, bits=5, codebooks=1, dtype=WIDE):
    z = normal(n, codebooks * bits, dtype=dtype)
    return z.to(device_of(backend)).requires_grad_()


def plain(z, bits, scale, spherical, inv_temperature, mask=None):
    """The losses as the papers write them, with a table of all vectors and codes."""
    x = z.unflatten(-1, (-1, bits))  # [N, C, B]
    numbers = torch.arange(1 << bits, device=z.device)
    digits = numbers[:, None] >> torch.arange(bits - 1, -1, -1, device=z.device) & 1
    codes = (2 * digits - 1).to(z.dtype) * scale  # [K, B]
    if spherical:
        x = functional.normalize(x, dim=-1) * scale
        codes = functional.normalize(codes, dim=-1) * scale
    indices = torch.einsum("ncb,kb->nck", x.detach(), codes).argmax(-1)  # [N, C]
    chosen = codes[indices]
    quantized = (x + (chosen - x).detach()).flatten(-2)
    if mask is not None:
        x, chosen = x[mask], chosen[mask]
    logits = 2 * inv_temperature * torch.einsum("ncb,kb->nck", x, codes)
    log = logits.log_softmax(-1)
    entropy = -(log.exp() * log).sum(-1).mean()
    mean = log.exp().mean(0)  # [C, K]
    batch = -(mean * mean.log()).sum(-1).mean()
    return quantized, indices, functional.mse_loss(x, chosen), entropy, batch


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("bits", "codebooks"), [(1, 1), (5, 1), (4, 3), (9, 1)])
def test_losses_and_gradients(backend, bits, codebooks, spherical, masked):
    z = problem(backend, 30, bits, codebooks)
    mask = (normal(30, seed=3) < 0.5).to(z.device) if masked else None
    got = mmfast.lookup_free_quantize(
        z, num_codebooks=codebooks, scale=0.7, spherical=spherical, inv_temperature=1.5, mask=mask
    )
    want = plain(z, bits, 0.7, spherical, 1.5, mask)
    losses = (got.commitment_loss, got.sample_entropy, got.batch_entropy)
    for a, b in zip((got.quantized, got.indices, *losses), want, strict=True):
        torch.testing.assert_close(a, b)
    weight = normal(*z.shape, seed=2, dtype=WIDE).to(z.device)

    def total(quantized, commitment, entropy, batch):
        return (quantized * weight).sum() + 3 * commitment + 5 * entropy - 7 * batch

    (gradient,) = torch.autograd.grad(total(got.quantized, *losses), z, retain_graph=True)
    (expected,) = torch.autograd.grad(total(want[0], *want[2:]), z, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    for i in range(3):  # each by itself
        (gradient,) = torch.autograd.grad(losses[i], z, retain_graph=True)
        (expected,) = torch.autograd.grad(want[2 + i], z, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("spherical", [False, True])
def test_groups_count_as_independent(backend, spherical):
    z = problem(backend, 30, 6)
    options = {"spherical": spherical, "inv_temperature": 1.5}
    got = mmfast.lookup_free_quantize(z, group_bits=2, **options)
    exact = mmfast.lookup_free_quantize(z, **options)
    assert got.mean_probabilities.shape == (1, 3, 4)
    joint = exact.mean_probabilities.view(4, 4, 4)
    parts = [joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1))]
    torch.testing.assert_close(got.mean_probabilities[0], torch.stack(parts))
    expected = sum(-(p * p.log()).sum() for p in parts)
    torch.testing.assert_close(got.batch_entropy, expected)
    assert got.batch_entropy >= exact.batch_entropy
    (gradient,) = torch.autograd.grad(got.batch_entropy, z)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])


def test_without_losses(backend):
    z = problem(backend)
    got = mmfast.lookup_free_quantize(z, group_bits=0)
    assert got.commitment_loss == got.sample_entropy == got.batch_entropy == 0
    assert torch.equal(got.indices, mmfast.lookup_free_quantize(z).indices)
    assert torch.equal(torch.autograd.grad(got.quantized.sum(), z)[0], torch.ones_like(z))
    (loss,) = torch.autograd.grad(mmfast.lookup_free_quantize(z, group_bits=0).commitment_loss, z)
    assert torch.equal(loss, torch.zeros_like(z))


@pytest.mark.parametrize("codebooks", [1, 3])
@pytest.mark.parametrize("bits", [1, 7, 16, 57, 58, 63])
def test_indices_of_any_width(backend, bits, codebooks):
    for dtype in (WIDE, torch.float32, torch.bfloat16):
        z = problem(backend, 29, bits, codebooks, dtype)
        got = mmfast.lookup_free_quantize(z, num_codebooks=codebooks, group_bits=0)
        digits = (z > 0).long().unflatten(-1, (codebooks, bits))
        place = torch.arange(bits - 1, -1, -1, device=z.device)
        assert torch.equal(got.indices, (digits << place).sum(-1))


@pytest.mark.parametrize("spherical", [False, True])
def test_as_the_peer(backend, spherical):
    peer = pytest.importorskip("vector_quantize_pytorch")
    z = normal(2, 40, 5).requires_grad_()
    quantiser = peer.LFQ(dim=5, spherical=spherical, commitment_loss_weight=0.3)
    (quantized, indices, loss), parts = quantiser(z, 0.8, return_loss_breakdown=True)
    mine = z.detach().to(device_of(backend)).requires_grad_()
    got = mmfast.lookup_free_quantize(mine, spherical=spherical, inv_temperature=0.8)
    torch.testing.assert_close(got.quantized.cpu(), quantized)
    assert torch.equal(got.indices.cpu()[..., 0], indices)
    losses = (got.sample_entropy, got.batch_entropy, got.commitment_loss)
    for a, b in zip(losses, parts, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)
    total = 0.1 * (losses[0] - losses[1]) + 0.3 * losses[2]
    weight = normal(*z.shape, seed=1)
    (expected,) = torch.autograd.grad((quantized * weight).sum() + loss, z)
    (gradient,) = torch.autograd.grad((got.quantized * weight.to(mine.device)).sum() + total, mine)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inv_temperature", [1e-3, 100.0, 1e6])
def test_extreme_temperatures(backend, inv_temperature):
    for dtype in (torch.float32, WIDE):
        z = (normal(40, 8, dtype=dtype) * 10 ** normal(40, 1, seed=2, dtype=dtype)).requires_grad_()
        z.data[3] = 0
        z.data[4, :3] = 1e-30
        z = z.detach().to(device_of(backend)).requires_grad_()
        for spherical in (False, True):
            got = mmfast.lookup_free_quantize(
                z, inv_temperature=inv_temperature, spherical=spherical
            )
            total = got.sample_entropy + got.batch_entropy + got.commitment_loss
            assert torch.autograd.grad(total, z)[0].isfinite().all()
            torch.testing.assert_close(got.mean_probabilities.sum().item(), 1.0, rtol=1e-5, atol=0)
            assert 0 <= got.sample_entropy <= got.batch_entropy * (1 + 1e-5)
            assert got.batch_entropy <= 8 * math.log(2) * (1 + 1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_signs(backend, value):
    z = normal(20, 7).to(device_of(backend))
    z[[2, 19], 3] = value
    for spherical in (False, True):
        got = mmfast.lookup_free_quantize(z, spherical=spherical)
        bits = z > 0
        place = 2 ** torch.arange(6, -1, -1, device=z.device)
        assert torch.equal(got.indices[:, 0], (bits * place).sum(1))
        assert got.quantized.isfinite().all()
        assert torch.equal(got.quantized > 0, bits)


def test_masked_vectors_may_be_anything(backend):
    z = problem(backend, dtype=torch.float32)
    mask = torch.ones(30, dtype=torch.bool, device=z.device)
    mask[4] = False
    z.data[4] = math.nan
    got = mmfast.lookup_free_quantize(z, mask=mask)
    rest = mmfast.lookup_free_quantize(z[mask])
    torch.testing.assert_close(got.sample_entropy, rest.sample_entropy)
    torch.testing.assert_close(got.commitment_loss, rest.commitment_loss)
    torch.testing.assert_close(got.mean_probabilities, rest.mean_probabilities)
    total = got.sample_entropy + got.batch_entropy + got.commitment_loss
    (gradient,) = torch.autograd.grad(total, z)
    assert gradient.isfinite().all()
    assert (gradient[4] == 0).all()


@pytest.mark.parametrize("view", VIEWS)
def test_strides(backend, view):
    for dtype in (torch.float32, torch.bfloat16):
        z = VIEWS[view](normal(70, 6, dtype=dtype).to(device_of(backend)))
        mask = (normal(70, 2, seed=1) < 0.7)[:, 1].to(z.device)
        got = mmfast.lookup_free_quantize(z, num_codebooks=2, mask=mask)
        want = mmfast.lookup_free_quantize(z.contiguous(), num_codebooks=2, mask=mask.contiguous())
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_many_bits(backend):
    z = problem(backend, 9, 63)
    got = mmfast.lookup_free_quantize(z, group_bits=9)
    place = 2 ** torch.arange(62, -1, -1, device=z.device)
    assert torch.equal(got.indices[:, 0], ((z > 0) * place).sum(1))


def test_many_vectors(backend):
    """More than one block of them."""
    z = normal(9000, 12, dtype=torch.float32).to(device_of(backend))
    arguments = (z, 1, 1.0, False, 0.5, 12, None)
    got = mmfast.lookup_free_quantize(z, inv_temperature=0.5)
    assert lookup_free_quantize.compare(got[:5], arguments) == []


def test_large_outputs(backend):
    if backend != "cpp":
        return  # its kernels write them past the cache
    z = normal((1 << 19) + 3, 8)
    got = mmfast.lookup_free_quantize(z, group_bits=0)
    assert torch.equal(got.quantized, torch.where(z > 0, 1.0, -1.0))
    place = 2 ** torch.arange(7, -1, -1)
    assert torch.equal(got.indices[:, 0], ((z > 0) * place).sum(1))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,)])
def test_few_vectors(backend, shape):
    z = torch.ones(shape, device=device_of(backend), requires_grad=True)
    got = mmfast.lookup_free_quantize(z)
    assert got.quantized.shape == shape
    assert got.indices.shape == (*shape[:-1], 1)
    total = got.quantized.sum() + got.sample_entropy + got.batch_entropy + got.commitment_loss
    assert torch.autograd.grad(total, z)[0].shape == shape
    none = torch.zeros(shape[:-1], dtype=torch.bool, device=z.device)
    got = mmfast.lookup_free_quantize(z, mask=none)
    assert got.commitment_loss == got.sample_entropy == got.batch_entropy == 0


def test_threads(backend, threads):
    z = normal(6000, 9).to(device_of(backend)).requires_grad_()

    def everything():
        got = mmfast.lookup_free_quantize(z, inv_temperature=0.5)
        total = got.sample_entropy - got.batch_entropy + got.commitment_loss
        return *got, *torch.autograd.grad(total, z)

    if backend == "reference":
        return  # torch's own sums depend on the threads
    many = everything()
    torch.set_num_threads(1)
    for a, b in zip(many, everything(), strict=True):
        assert torch.equal(a, b)


def test_messages():
    z = normal(4, 6)
    call = mmfast.lookup_free_quantize
    with pytest.raises(ValueError, match=r"z must be \(..., C B\) with C = 4 codebooks, got shape"):
        call(z, num_codebooks=4)
    with pytest.raises(ValueError, match="num_codebooks must be at least 1, got 0"):
        call(z, num_codebooks=0)
    with pytest.raises(ValueError, match=r"group_bits must divide the 6 bits .* got 4"):
        call(z, group_bits=4)
    with pytest.raises(ValueError, match="be at most 24, or be 0, got None"):
        call(normal(4, 25))
    with pytest.raises(ValueError, match="at most 63 bits, got 64"):
        call(normal(4, 64), group_bits=0)
    with pytest.raises(ValueError, match="scale must be above 0 and finite, got 0"):
        call(z, scale=0)
    with pytest.raises(ValueError, match="inv_temperature must be above 0 and finite, got inf"):
        call(z, inv_temperature=math.inf)
    with pytest.raises(ValueError, match=r"mask must have shape \(4,\), got \(3,\)"):
        call(z, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        call(z, mask=torch.ones(4))


def test_compiles_with_gradients():
    z = problem("reference")

    def loss(z):
        got = mmfast.lookup_free_quantize(z, inv_temperature=0.5, spherical=True)
        return (got.quantized * got.indices).sum() + got.sample_entropy - got.batch_entropy

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(loss(z), z)
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z)[0], want)
