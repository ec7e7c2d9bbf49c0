"""vector_quantize and its gradients against plain autograd, and ema_update_."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from cases import METRICS, VIEWS, backends_here, device_of, normal
from hypothesis import given, settings
from test_determinism import assert_same_bits

import mmfast
from mmfast.checks import FLOATING
from mmfast.ops import ema_update, vector_quantize

BACKENDS = backends_here(vector_quantize.OP)
KERNELS = BACKENDS[1:]  # what is compared with the reference
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


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("heads", [0, 2])
def test_gradcheck(backend, heads, metric):
    """Of what has a gradient by definition: the losses, and the codes without an estimator."""
    x, codebook = problem(backend, n=7, k=5, d=3, heads=heads)
    mask = (normal(*x.shape[:-1], seed=5) < 0.5).to(x.device)

    def of(name, x, codebook):
        result = mmfast.vector_quantize(x, codebook, metric=metric, gradient="none", mask=mask)
        return getattr(result, name)

    check = torch.autograd.gradcheck
    assert check(lambda x: of("commitment_loss", x, codebook.detach()), x)
    assert check(lambda codes: of("codebook_loss", x.detach(), codes), codebook)
    assert check(lambda codes: of("quantized", x.detach(), codes), codebook)


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


def both_ways(backend, x, codebook, metric="euclidean", gradient="rotation", mask=None):
    """What the forward's and the backward's comparisons have against the backend."""
    run, run_back = (
        mmfast.backends.select(op, backend, x)
        for op in (vector_quantize.OP, vector_quantize.BACKWARD)
    )
    forward = (x, codebook, metric, gradient, mask)
    output = run(*forward)
    complaints = vector_quantize.compare(output, forward)
    losses = [torch.full_like(output[2], value) for value in (3.0, -5.0)]
    for grads in ((torch.ones_like(x), *losses), (None, losses[0], None), (x, None, losses[1])):
        backward = (*grads, x, codebook, output[1], output[4], gradient, True, True)
        complaints += vector_quantize.compare_bwd(run_back(*backward), backward)
    return complaints


@settings(max_examples=30)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 20),
    d=st.integers(1, 20),
    heads=st.integers(0, 2),
    metric=st.sampled_from(METRICS),
    gradient=st.sampled_from(["straight_through", "rotation", "none"]),
    dtypes=st.tuples(*[st.sampled_from(FLOATING)] * 2),
    masked=st.floats(0, 1),
)
@pytest.mark.parametrize("name", KERNELS)
def test_any_arguments(name, n, k, d, heads, metric, gradient, dtypes, masked):
    x, codebook = (t.detach() for t in problem(name, n, k, d, heads))
    x, codebook = x.to(dtypes[0]), codebook.to(dtypes[1])
    mask = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(0)) < masked
    mask = mask.to(x.device) if masked < 1 else None
    assert both_ways(name, x, codebook, metric, gradient, mask) == []


@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", KERNELS)
def test_not_finite(name, metric, gradient):
    for value in (torch.nan, torch.inf, -torch.inf, 1e20):
        x, codebook = (t.detach().float() for t in problem(name, d=19))
        x[3, 5] = x[17] = value
        assert both_ways(name, x, codebook, metric, gradient) == [], value
        mask = torch.ones_like(x[:, 0], dtype=torch.bool)
        mask[3] = mask[17] = False
        result = mmfast.vector_quantize(x, codebook, metric=metric, mask=mask)
        assert result.commitment_loss.isfinite()
        codebook[2] = value
        assert both_ways(name, x, codebook, metric, gradient) == [], value


def test_strides(backend):
    device = device_of(backend)
    image = normal(2, 7, 3, 5).to(device)  # [B, D, H, W]
    deep = normal(*[2, 1] * 4, 3, 7).to(device).transpose(0, 8)  # 9 leading dimensions
    codes = normal(7, 9, seed=1).to(device).T
    for x in (image.permute(0, 2, 3, 1), deep, image[:, :, 1:, ::2].permute(3, 2, 0, 1)):
        mask = normal(*x.shape[:-1], seed=2).to(device) < 0.5
        results = []
        for vectors, codebook, inside in (
            (x, codes, mask.mT.contiguous().mT if mask.dim() > 1 else mask),
            (x.contiguous(), codes.contiguous(), mask),
        ):
            a, b = (t.detach().requires_grad_() for t in (vectors, codebook))
            result = mmfast.vector_quantize(a, b, gradient="rotation", mask=inside)
            loss = result.quantized.square().sum() + result.commitment_loss + result.codebook_loss
            gradients = torch.autograd.grad(loss, (a, b))
            results.append((result.quantized, result.indices, result.counts, *gradients))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_codes_are_rounded_as_torch_rounds_them(name, dtype):
    # All halves, the numbers half way between two of them, and their neighbours in float32.
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()].sort().values
    between = (halves[1:] + halves[:-1]) / 2
    edge = torch.tensor([torch.finfo(dtype).max * (1 + 2**-9), 1e-44, torch.inf, -torch.inf])
    above, below = (between.nextafter(torch.tensor(side)) for side in (torch.inf, -torch.inf))
    code = torch.cat([halves, between, above, below, edge])[None].to(device_of(name))
    for codebook in (code, code.double()):
        x = torch.zeros_like(code, dtype=dtype)
        with mmfast.use_backend(name):
            result = mmfast.vector_quantize(x, codebook)
        assert torch.equal(result.quantized, code.to(dtype))


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


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the compiled extension is absent")
def test_messages_of_cpp():
    x, codebook = normal(3, 2), normal(4, 2)
    with pytest.raises(RuntimeError, match="metric must be one of euclidean, cosine, dot, got 'l"):
        torch.ops.mmfast.vector_quantize(x, codebook, "l2", "none", None)


@settings(max_examples=25)
@given(
    k=st.integers(1, 300),
    d=st.integers(1, 20),
    heads=st.integers(0, 2),
    dtypes=st.tuples(*[st.sampled_from(FLOATING)] * 5),
    decay=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    normalize=st.booleans(),
    value=st.sampled_from([0.5, 0.0, torch.nan, torch.inf]),
)
@pytest.mark.parametrize("name", backends_here(ema_update.OP)[1:])
def test_ema_update_of_any_arguments(name, k, d, heads, dtypes, decay, normalize, value):
    lead = (heads,) if heads else ()
    vectors = [normal(*lead, d, k, seed=seed).mT for seed in range(3)]
    sizes = [normal(*lead, k, 2, seed=seed).abs()[..., 0] for seed in range(2)]
    sizes[0].view(-1)[-1] = vectors[1].reshape(-1)[0] = value
    if value == 0:
        sizes = [size * 0 for size in sizes]
    tensors = (vectors[0], sizes[0], vectors[1], sizes[1], vectors[2])
    given = [t.to(device_of(name), dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    arguments = (*given, decay, 1e-5, normalize)
    result = ema_update.OP.result(
        mmfast.backends.select(ema_update.OP, name, *arguments), arguments
    )
    assert ema_update.compare(result, arguments) == []


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("view", ["transposed", "padded", "stepped"])
@pytest.mark.parametrize("name", backends_here(ema_update.OP))
def test_ema_update_in_place_of_any_strides(name, view, normalize):
    device = device_of(name)
    codes, total, sums = (VIEWS[view](normal(40, 19, seed=i).to(device)) for i in range(3))
    size, counts = (normal(40, 3, seed=i).abs().to(device)[:, 1] for i in range(2))
    beside = [t._base.isnan() for t in (codes, total)]
    strided = [codes, size, total, counts, sums]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in strided]
    with mmfast.use_backend(name):
        for tensors in (strided, dense):
            mmfast.ema_update_from_statistics_(*tensors, decay=0.9, normalize=normalize)
    assert_same_bits(strided, dense)
    assert all(torch.equal(t._base.isnan(), b) for t, b in zip((codes, total), beside, strict=True))


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


@pytest.mark.parametrize("name", backends_here(ema_update.OP))
def test_ema_update_tells_autograd_what_changed(name):
    codebook, size, total = (
        t.to(device_of(name)) for t in (normal(5, 3), torch.ones(5), normal(5, 3))
    )
    before = [t._version for t in (codebook, size, total)]
    x = normal(4, 3).to(codebook).requires_grad_()
    scores = x @ codebook.T  # saves the codebook
    with mmfast.use_backend(name):
        mmfast.ema_update_from_statistics_(codebook, size, total, size.clone(), total.clone())
    assert all(t._version > v for t, v in zip((codebook, size, total), before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_ema_update_compiles_in_one_graph():
    tensors = [normal(5, 3), torch.ones(5), normal(5, 3), torch.ones(5), normal(5, 3, seed=1)]
    eager, traced = ([t.clone() for t in tensors] for _ in range(2))
    mmfast.ema_update_from_statistics_(*eager, decay=0.7)
    compiled = torch.compile(
        mmfast.ema_update_from_statistics_, fullgraph=True, backend="aot_eager"
    )
    before = traced[0]._version
    compiled(*traced, decay=0.7)
    assert_same_bits(traced, eager)
    assert traced[0]._version > before


def test_ema_update_messages():
    arguments = [normal(5, 3), torch.ones(5), torch.ones(5, 3), normal(4, 3), torch.arange(4)]
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got 2"):
        mmfast.ema_update_(*arguments, decay=2)
    arguments[1] = torch.ones(4)
    with pytest.raises(ValueError, match=r"cluster_size must have shape \(5,\), got \(4,\)"):
        mmfast.ema_update_(*arguments)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_a_second_derivative_is_refused(gradient):
    x = normal(6, 4).requires_grad_()
    quantized = mmfast.vector_quantize(x, normal(5, 4, seed=1), gradient=gradient).quantized
    (first,) = torch.autograd.grad(quantized.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()
