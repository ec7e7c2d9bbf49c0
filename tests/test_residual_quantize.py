"""residual_quantize on every backend against a plain loop over nearest_code, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from cases import METRICS, VIEWS, backends_here, brute_force, device_of, normal
from test_determinism import assert_same_bits
from torch import Tensor

import mmfast
from mmfast.checks import FLOATING
from mmfast.ops import residual_quantize

BACKENDS = backends_here(residual_quantize.OP)
WIDE = torch.float64


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def problem(backend, n=40, sizes=(9, 9, 9), d=6, dtype=WIDE, codes_dtype=None):
    """Vectors, and the codebooks of the stages in a list; later ones are finer."""
    device = device_of(backend)
    books = [
        (normal(k, d, seed=1 + q, dtype=WIDE) * 0.7**q).to(device, codes_dtype or dtype)
        for q, k in enumerate(sizes)
    ]
    return normal(n, d, dtype=dtype).to(device), books


def check(x: Tensor, books: list[Tensor], codebooks, metric="euclidean", **options):
    """The result is the definition's, whose lookup is made in numpy over all pairs."""
    got = mmfast.residual_quantize(x, codebooks, metric=metric, **options)
    wide = torch.float64 in (x.dtype, books[0].dtype)
    dtype = torch.float64 if wide else torch.float32
    residual = x.to(dtype)
    total = torch.zeros_like(residual)
    for q, book in enumerate(books):
        index = torch.from_numpy(brute_force(residual, book, metric)[0]).to(x.device)
        assert torch.equal(got.indices[..., q], index), q
        residual = residual - book[index].to(dtype)
        total = total + book[index].to(dtype)
        loss = residual.double().square().mean().to(dtype)
        for losses in (got.commitment_losses, got.codebook_losses):
            assert losses.dtype == dtype
            torch.testing.assert_close(losses[q], loss, rtol=1e-6, atol=0)
        counts = index.flatten().bincount(minlength=got.counts.shape[1])
        assert torch.equal(got.counts[q], counts.to(dtype))
    assert torch.equal(got.quantized, total.to(x.dtype))
    assert got.indices.shape == (*x.shape[:-1], len(books))
    return got


@pytest.mark.parametrize("codes_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dtypes(backend, dtype, codes_dtype):
    x, books = problem(backend, 20, dtype=dtype, codes_dtype=codes_dtype)
    check(x, books, torch.stack(books))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(300, 7, 1, 65), (70, 70)], ids=str)
@pytest.mark.parametrize("d", [1, 8, 33])
def test_metrics_and_sizes(backend, sizes, d, metric):
    x, books = problem(backend, 130, sizes, d, torch.float32)
    check(x, books, books, metric)


def test_forms_of_the_codebooks(backend):
    x, books = problem(backend)
    stacked = torch.stack(books)
    expected = check(x, books, stacked)
    assert_same_bits(mmfast.residual_quantize(x, books), expected)
    assert_same_bits(mmfast.residual_quantize(x, stacked, num_quantizers=3), expected)
    fewer = mmfast.residual_quantize(x, stacked, stages=2)
    assert_same_bits(fewer, mmfast.residual_quantize(x, books[:2]))
    shared = check(x, [books[0]] * 4, books[0], num_quantizers=4)
    fewer = mmfast.residual_quantize(x, books[0], num_quantizers=4, stages=3)
    assert torch.equal(fewer.indices, shared.indices[:, :3])


@pytest.mark.parametrize("view", VIEWS)
def test_strides(backend, view):
    x, books = problem(backend, dtype=torch.float32)
    check(VIEWS[view](x), [VIEWS[view](b) for b in books], [VIEWS[view](b) for b in books])
    image = normal(2, 6, 3, 4).to(x.device).permute(0, 2, 3, 1)
    check(image, books, torch.stack(books).mT.contiguous().mT)
    check(image[0, 0, 0], books, books)


@pytest.mark.parametrize("gradient", residual_quantize.GRADIENTS)
def test_one_stage_is_vector_quantize(backend, gradient):
    x, books = problem(backend)
    mask = (normal(40, seed=5) < 0.5).to(x.device)
    got = mmfast.residual_quantize(x, books[:1], gradient=gradient, mask=mask)
    # Not every backend has it; the reference has.
    with mmfast.use_backend("reference"):
        want = mmfast.vector_quantize(x, books[0], gradient=gradient, mask=mask)
    assert torch.equal(got.quantized, want.quantized)
    assert torch.equal(got.indices[:, 0], want.indices)
    assert torch.equal(got.counts[0], want.counts)
    torch.testing.assert_close(got.commitment_losses[0], want.commitment_loss)


def test_mask(backend):
    x, books = problem(backend)
    mask = (normal(40, seed=5) < 0.5).to(x.device)
    x[~mask] = math.nan
    x.requires_grad_()
    result = mmfast.residual_quantize(x, books, mask=mask)
    alone = mmfast.residual_quantize(x[mask], books)
    assert result.quantized[~mask].isnan().all()
    assert (result.indices[~mask] == -1).all()
    assert torch.equal(result.quantized[mask], alone.quantized)
    assert torch.equal(result.indices[mask], alone.indices)
    assert torch.equal(result.counts, alone.counts)
    torch.testing.assert_close(result.commitment_losses, alone.commitment_losses)
    losses = result.commitment_losses.sum() + result.quantized[mask].sum()
    (gradient,) = torch.autograd.grad(losses, x)
    assert (gradient[~mask] == 0).all()
    (expected,) = torch.autograd.grad(alone.commitment_losses.sum() + alone.quantized.sum(), x)
    torch.testing.assert_close(gradient[mask], expected[mask])
    nobody = mmfast.residual_quantize(x, books, mask=torch.zeros_like(mask))
    assert (nobody.commitment_losses == 0).all()
    assert (nobody.counts == 0).all()


def test_no_vectors(backend):
    x, books = problem(backend, n=0)
    x.requires_grad_()
    books[0].requires_grad_()
    result = mmfast.residual_quantize(x.reshape(2, 0, 6), books)
    assert result.quantized.shape == (2, 0, 6)
    assert result.indices.shape == (2, 0, 3)
    assert (result.counts == 0).all()
    assert (result.commitment_losses == 0).all()
    loss = (result.commitment_losses + result.codebook_losses).sum()
    to_x, to_codes = torch.autograd.grad(loss, (x, books[0]))
    assert to_x.shape == (0, 6)
    assert (to_codes == 0).all()


def test_nan_rows(backend):
    for value in (math.nan, math.inf):
        x, books = problem(backend, dtype=torch.float32)
        x[[3, 17], 2] = value
        result = mmfast.residual_quantize(x, books)
        good = ~x.isfinite().logical_not().any(1)
        assert (result.indices >= 0).all()
        assert (result.indices < 9).all()
        assert (result.indices[~good, 0] == 0).all()
        assert torch.equal(result.indices[good], mmfast.residual_quantize(x[good], books).indices)
        assert not result.commitment_losses.isfinite().any()
        assert result.quantized.isfinite().all()


def test_residuals_of_large_and_small_numbers(backend):
    x, books = problem(backend, dtype=torch.float32)
    check(x + 1000, books, books)
    check(x * 1e-20, [b * 1e-20 for b in books], [b * 1e-20 for b in books])
    # Codes that undo each other: what rounding leaves is what the next stage sees.
    opposite = torch.stack([books[0] * 1e6, books[0] * -1e6])
    check(x, list(opposite), opposite)


def plain(x, books, indices, gradient):
    """Quantised vectors and losses as papers write them, by autograd alone."""
    mse = torch.nn.functional.mse_loss
    residual, total, commitment, codebook = x, 0.0, [], []
    for q, book in enumerate(books):
        code = book[indices[:, q]]
        commitment.append(mse(residual, code.detach()))
        codebook.append(mse(code, residual.detach()))
        residual = residual - code.detach()
        total = total + code
    if gradient == "straight_through":
        total = x + (total - x).detach()
    return total, torch.stack(commitment), torch.stack(codebook)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gradient", residual_quantize.GRADIENTS)
def test_gradients(backend, gradient, shared):
    x, books = problem(backend, sizes=(9, 9, 9) if shared else (9, 5, 12), d=19)
    x.requires_grad_()
    books = [books[0]] * 3 if shared else books
    for book in books:
        book.requires_grad_()
    codebooks = books[0] if shared else books
    number = 3 if shared else None
    result = mmfast.residual_quantize(x, codebooks, num_quantizers=number, gradient=gradient)
    expected = plain(x, books, result.indices, gradient)
    weights = [normal(t.numel(), seed=7, dtype=WIDE).view(t.shape).to(x.device) for t in expected]
    got = sum((w * t).sum() for w, t in zip(weights, (result[0], *result[2:4]), strict=True))
    want = sum((w * t).sum() for w, t in zip(weights, expected, strict=True))
    torch.testing.assert_close(got, want)
    parameters = (x, books[0]) if shared else (x, *books)
    gradients = torch.autograd.grad(got, parameters)
    for a, b in zip(gradients, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(backend, shared, metric):
    """Of what has a gradient by definition, the choice of codes being what it is: the losses of
    the vectors, each loss of its own stage's codes, and without an estimator the sum of codes."""
    x, books = problem(backend, n=6, sizes=(4, 4) if shared else (4, 3), d=3)
    mask = torch.tensor([True, True, False, True, True, True], device=x.device)
    books = books[:1] if shared else books

    def of(name, x, *books):
        codebooks, number = (books[0], 2) if shared else (list(books), None)
        result = mmfast.residual_quantize(
            x, codebooks, num_quantizers=number, metric=metric, gradient="none", mask=mask
        )
        return getattr(result, name)

    def own_loss(stage, book):
        """The loss of a stage by its own codes."""
        given = [book if q == stage else other for q, other in enumerate(books)]
        return of("codebook_losses", x, *given)[stage]

    check = torch.autograd.gradcheck
    assert check(lambda x: of("commitment_losses", x, *books), x.clone().requires_grad_())
    leaves = [book.clone().requires_grad_() for book in books]
    assert check(lambda *codes: of("quantized", x, *codes), leaves)
    for stage in range(len(books)):
        assert check(lambda book, stage=stage: own_loss(stage, book), leaves[stage])


def test_only_what_is_asked_for(backend):
    x, books = problem(backend)
    stacked = torch.stack(books)
    result = mmfast.residual_quantize(x.requires_grad_(), stacked)
    assert not result.indices.requires_grad
    assert torch.equal(torch.autograd.grad(result.quantized.sum(), x)[0], torch.ones_like(x))
    result = mmfast.residual_quantize(x.detach(), stacked.requires_grad_())
    (gradient,) = torch.autograd.grad(result.codebook_losses[1], stacked)
    assert gradient[1].abs().sum() > 0
    assert (gradient[[0, 2]] == 0).all()
    with torch.no_grad():
        assert not mmfast.residual_quantize(x, stacked).quantized.requires_grad


def test_half_precision_keeps_its_dtype(backend):
    x, books = problem(backend, dtype=torch.bfloat16, codes_dtype=torch.float32)
    books = torch.stack(books).requires_grad_()
    result = mmfast.residual_quantize(x.requires_grad_(), books)
    assert result.quantized.dtype == torch.bfloat16
    (result.quantized.sum() + (result.commitment_losses + result.codebook_losses).sum()).backward()
    assert x.grad.dtype == torch.bfloat16
    assert books.grad.dtype == torch.float32


@pytest.mark.parametrize("d", [8, 24])
def test_batches_and_threads(backend, d, threads):
    x, books = problem(backend, 900, (300, 70, 300), d, torch.float32)
    codes = torch.cat(books)
    with torch.no_grad():
        whole = mmfast.residual_quantize(x, books)
        for size in (1, 37, 200):
            parts = [mmfast.residual_quantize(part, books)[:2] for part in x[:600].split(size)]
            joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
            assert_same_bits(joined, [t[:600] for t in whole[:2]])
        grads = [normal(t.numel(), seed=3).view(t.shape).to(t) for t in (whole[0], *whole[2:4])]
        arguments = (
            *grads, x, codes, whole[1], [300, 70, 300], False, "none", True, True
        )  # fmt: skip
        run = mmfast.backends.call
        back = run(residual_quantize.BACKWARD, *arguments)
        torch.set_num_threads(1)
        assert_same_bits(mmfast.residual_quantize(x, books), whole)
        assert_same_bits(run(residual_quantize.BACKWARD, *arguments), back)


def exhaustive(x: Tensor, books: list[Tensor]) -> Tensor:
    """Squared error of the best of all sums, one code of each stage."""
    sums = books[0]
    for book in books[1:]:
        sums = (sums[:, None] + book[None]).flatten(0, 1)
    return (x[:, None] - sums).square().sum(2).amin(1)


def test_beam():
    x, books = problem("reference", 60, (5, 4, 6))
    greedy = mmfast.residual_quantize(x, books)
    errors = [(x - greedy.quantized).square().sum(1)]
    for beam in (2, 4, 20, 500):
        result = mmfast.residual_quantize(x, books, beam=beam)
        codes = sum(book[result.indices[:, q]] for q, book in enumerate(books))
        torch.testing.assert_close(result.quantized, codes)
        errors.append((x - result.quantized).square().sum(1))
        torch.testing.assert_close(result.commitment_losses[-1], errors[-1].mean() / 6)
        halves = [mmfast.residual_quantize(h, books, beam=beam).indices for h in x.split(31)]
        assert torch.equal(torch.cat(halves), result.indices)
    # A beam that holds all partial sums finds the best.
    torch.testing.assert_close(errors[-1], exhaustive(x, books))
    means = [float(e.mean()) for e in errors]
    assert means[1] < means[0]
    assert means[-1] < means[1]


def test_beam_of_nan_and_many_rows(monkeypatch):
    monkeypatch.setattr(residual_quantize, "_WORKSPACE", 1 << 10)
    x, books = problem("reference", 300, (50, 50), dtype=torch.float32)
    x[7] = math.nan
    result = mmfast.residual_quantize(x, books, beam=3)
    assert (result.indices >= 0).all()
    assert (result.indices < 50).all()
    good = torch.arange(300) != 7
    alone = mmfast.residual_quantize(x[good], books, beam=3)
    assert torch.equal(result.indices[good], alone.indices)


def test_beam_gradients():
    x, books = problem("reference")
    x.requires_grad_()
    for book in books:
        book.requires_grad_()
    result = mmfast.residual_quantize(x, books, beam=4, gradient="none")
    expected = plain(x, books, result.indices, "none")
    got = sum(t.square().sum() for t in (result[0], *result[2:4]))
    want = sum(t.square().sum() for t in expected)
    gradients = torch.autograd.grad(got, (x, *books))
    for a, b in zip(gradients, torch.autograd.grad(want, (x, *books)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("beam", [1, 3])
def test_compiles_with_gradients(beam):
    x, books = problem("reference", dtype=torch.float32)
    stacked = torch.stack(books).requires_grad_()
    x.requires_grad_()

    def loss(x, codebooks):
        result = mmfast.residual_quantize(x, codebooks, beam=beam)
        return result.quantized.square().sum() + sum(t.sum() for t in result[2:4])

    want = torch.autograd.grad(loss(x, stacked), (x, stacked))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, stacked), (x, stacked)), want, strict=True):
        torch.testing.assert_close(a, b)


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


BOOKS = zeros(2, 5, 3)
REFUSED = [
    ([1.0], BOOKS, {}, TypeError, "x must be a torch.Tensor, got list"),
    (zeros(4, 3), zeros(2, 5, 3, dtype=torch.int64), {}, TypeError, "codebooks must be float32"),
    (zeros(4, 3), zeros(3), {}, ValueError, r"codebooks must be \(Q, K, D\), \(K, D\) or a list"),
    (zeros(4, 3), zeros(0, 5, 3), {}, ValueError, r"at least 1, got shape \(0, 5, 3\)"),
    (zeros(4, 3), [], {}, ValueError, "codebooks must hold at least one, got an empty list"),
    (zeros(4, 3), [zeros(5, 3), zeros(5, 2)], {}, ValueError, r"codebooks\[1\] must be \(K_q, D\)"),
    (zeros(4, 3), [zeros(5, 3), zeros(5, 3).double()], {}, TypeError, r"codebooks\[1\] must be fl"),
    (zeros(4, 3), [zeros(5, 3), None], {}, TypeError, r"codebooks\[1\] must be a torch.Tensor"),
    (zeros(4, 3), zeros(5, 3), {}, ValueError, "need num_quantizers of at least 1, got None"),
    (zeros(4, 3), BOOKS, {"num_quantizers": 3}, ValueError, "got 3 and 2 codebooks"),
    (zeros(4, 2), BOOKS, {}, ValueError, r"with the codebooks' D = 3 .* got shape \(4, 2\)"),
    (zeros(4, 3), BOOKS, {"stages": 3}, ValueError, "stages must be from 1 to 2, got 3"),
    (zeros(4, 3), BOOKS, {"stages": 0}, ValueError, "stages must be from 1 to 2, got 0"),
    (zeros(4, 3), BOOKS, {"metric": "l2"}, ValueError, "metric must be one of euclidean"),
    (zeros(4, 3), BOOKS, {"gradient": "rotation"}, ValueError, "gradient must be one of straight"),
    (zeros(4, 3), BOOKS, {"mask": zeros(4)}, TypeError, "mask must be bool, got float32"),
    (
        zeros(4, 3),
        BOOKS,
        {"mask": zeros(3, dtype=torch.bool)},
        ValueError,
        r"mask must have shape \(4,\), got \(3,\)",
    ),
    (zeros(4, 3), BOOKS.to("meta"), {}, ValueError, "x on cpu, codebooks on meta"),
    (zeros(4, 3), BOOKS, {"beam": 0}, ValueError, "beam must be at least 1, got 0"),
    (
        zeros(4, 3),
        BOOKS,
        {"beam": 2, "metric": "dot"},
        ValueError,
        "a beam above 1 needs metric 'euclidean', got 'dot'",
    ),
]


@pytest.mark.parametrize(("x", "codebooks", "options", "error", "message"), REFUSED)
def test_messages(x, codebooks, options, error, message):
    with pytest.raises(error, match=message):
        mmfast.residual_quantize(x, codebooks, **options)


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_kernels_refuse_beams(name):
    with (
        mmfast.use_backend(name),
        pytest.raises(mmfast.BackendError, match="residual_quantize_beam has no backend"),
    ):
        mmfast.residual_quantize(zeros(4, 3), BOOKS, beam=2)
