"""finite_scalar_quantize against the formulas of the papers, autograd and the peer."""

from __future__ import annotations

import math

import pytest
import torch
from cases import VIEWS, backends_here, device_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import mmfast
from mmfast.ops import finite_scalar_quantize

BACKENDS = backends_here(finite_scalar_quantize.OP)
WIDE = torch.float64
LEVELS = ((8, 5, 5, 5), (3, 4), (7,), (16, 33, 5))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def plain(z, levels, variant, hard_clamp, noise=None):
    """Quantised values as the papers write them, straight-through, by autograd alone."""
    size = torch.tensor(levels, dtype=z.dtype, device=z.device)

    def bounded(t):
        return t.clamp(-1, 1) if hard_clamp else t.tanh()

    if variant == "symmetric":
        t = (size - 1) * (bounded(z) + 1) / 2 + 0.5
        value = 2 / (size - 1) * (t + (t.floor() - t).detach()) - 1
    else:
        half = (size - 1) * 1.001 / 2
        offset = torch.where(size % 2 == 0, 0.5, 0.0).to(z.dtype)
        shift = offset / half if hard_clamp else (offset / half).atanh()
        t = bounded(z + shift) * half - offset
        value = (t + (t.round() - t).detach()) / (size // 2)
    return value if noise is None else (value + noise).clamp(-1, 1)


def indices_of(quantized, levels, variant):
    """Indices of values without noise."""
    total, basis = torch.zeros(quantized.shape[:-1], dtype=torch.int64), 1
    for column, size in zip(quantized.detach().cpu().double().unbind(-1), levels, strict=True):
        width = size - 1 if variant == "symmetric" else size // 2 * 2
        total += ((column + 1) * width / 2).round().long() * basis
        basis *= size
    return total


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("hard_clamp", [False, True])
@pytest.mark.parametrize("variant", ["bound", "symmetric"])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_values_and_gradients(backend, levels, variant, hard_clamp, noisy):
    if noisy and variant == "bound":
        return
    device = device_of(backend)
    for dtype in (WIDE, torch.float32):
        z = (1.5 * normal(7, 40, len(levels), dtype=dtype)).to(device).requires_grad_()
        noise = normal(*z.shape, seed=2, dtype=dtype).to(device) / 4 if noisy else None
        options = {"variant": variant, "hard_clamp": hard_clamp, "noise": noise}
        got = mmfast.finite_scalar_quantize(z, levels, **options)
        wide = z.detach().double().requires_grad_()
        wide_noise = None if noise is None else noise.double()
        want = plain(wide, levels, variant, hard_clamp, wide_noise)
        torch.testing.assert_close(got.quantized, want.to(dtype))
        clean = plain(wide, levels, variant, hard_clamp)
        assert torch.equal(got.indices.long().cpu(), indices_of(clean, levels, variant))
        weight = normal(*z.shape, seed=1, dtype=dtype).to(device)
        (gradient,) = torch.autograd.grad((got.quantized * weight).sum(), z)
        (expected,) = torch.autograd.grad((want * weight).sum(), wide)
        torch.testing.assert_close(gradient, expected.to(dtype), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("hard_clamp", [False, True])
@pytest.mark.parametrize("variant", ["bound", "symmetric"])
def test_gradcheck(backend, variant, hard_clamp):
    """The gradient is the derivative of the values before they are rounded."""
    levels = (8, 5, 4)
    dims = finite_scalar_quantize.dimensions(levels, variant, hard_clamp)

    class Unrounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            moved = z + z.new_tensor([d.shift for d in dims])
            bounded = moved.clamp(-1, 1) if hard_clamp else moved.tanh()
            halves = [(n - 1) * 1.001 / (n // 2 * 2) for n in levels]
            return bounded * (z.new_tensor(halves) if variant == "bound" else 1)

        @staticmethod
        def backward(ctx, grad):
            z = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                quantized, _ = mmfast.finite_scalar_quantize(
                    z, levels, variant=variant, hard_clamp=hard_clamp
                )
            return torch.autograd.grad(quantized, z, grad)[0]

    z = normal(5, 3, dtype=WIDE).to(device_of(backend)).requires_grad_()
    assert torch.autograd.gradcheck(Unrounded.apply, z)


@pytest.mark.parametrize("variant", ["bound", "symmetric"])
@pytest.mark.parametrize(
    "levels", [(3, 6, 8, 5, 7, 4), (8,) * 5, (6, 5, 8), (8, 4), (3,) * 8], ids=str
)
def test_few_levels_are_exact(backend, levels, variant):
    """Also where rows fill tiles, and where some are left."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 1100):
            z = 2 * normal(rows, len(levels), dtype=torch.float32, seed=rows)
            z.view(-1)[::31] = math.nan
            z.view(-1)[5::37] = math.inf
            z.view(-1)[7::41] = -math.inf
            z = z.to(dtype)
            got = mmfast.finite_scalar_quantize(z.to(device_of(backend)), levels, variant=variant)
            want = finite_scalar_quantize.reference(z, levels, variant, False, None)
            assert torch.equal(got.indices.cpu(), want[1])
            assert torch.equal(got.quantized.cpu().nan_to_num(9), want[0].nan_to_num(9))


@pytest.mark.parametrize("symmetric", [False, True])
def test_as_the_peer(backend, symmetric):
    peer = pytest.importorskip("vector_quantize_pytorch")
    levels = [8, 6, 5]
    z = normal(5, 30, 3).requires_grad_()
    quantized, indices = peer.FSQ(levels, preserve_symmetry=symmetric)(z)
    mine = z.detach().to(device_of(backend)).requires_grad_()
    variant = "symmetric" if symmetric else "bound"
    got = mmfast.finite_scalar_quantize(mine, levels, variant=variant)
    torch.testing.assert_close(got.quantized.cpu(), quantized)
    assert torch.equal(got.indices.cpu(), indices)
    (expected,) = torch.autograd.grad(quantized.square().sum(), z)
    (gradient,) = torch.autograd.grad(got.quantized.square().sum(), mine)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["bound", "symmetric"])
@pytest.mark.parametrize("num_levels", [3, 8, 17, 100])
def test_levels_change_at_the_thresholds(backend, num_levels, variant):
    for hard in (False, True):
        thresholds = finite_scalar_quantize.dimension(num_levels, variant, hard).thresholds
        for dtype in (WIDE, torch.float32, torch.bfloat16):
            # The least number that is not below the threshold, and the one before it.
            at = torch.tensor(thresholds, dtype=WIDE)
            rounded = at.to(dtype)
            above = torch.full_like(rounded, math.inf)
            upper = torch.where(rounded.double() >= at, rounded, torch.nextafter(rounded, above))
            lower = torch.nextafter(upper, -above)
            z = torch.stack([lower, upper])[:, :, None].to(device_of(backend))
            got = mmfast.finite_scalar_quantize(z, (num_levels,), variant=variant, hard_clamp=hard)
            upper_level = torch.stack([(at <= v.double()).sum() for v in upper])
            lower_level = torch.stack([(at <= v.double()).sum() for v in lower])
            assert torch.equal(got.indices.cpu(), torch.stack([lower_level, upper_level]).int())


def test_every_level_is_reached(backend):
    z = torch.linspace(-9, 9, 4001, device=device_of(backend))[:, None]
    for variant in ("bound", "symmetric"):
        for num_levels in (3, 4, 9, 32):
            got = mmfast.finite_scalar_quantize(z, (num_levels,), variant=variant)
            assert torch.equal(got.indices.unique().cpu(), torch.arange(num_levels).int())
            assert got.quantized.abs().max() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(backend, value):
    device = device_of(backend)
    for dtype in (torch.float32, WIDE, torch.bfloat16):
        z = normal(20, 4, dtype=dtype).to(device)
        clean = mmfast.finite_scalar_quantize(z, (8, 5, 5, 5))
        z[[3, 19], 2] = value
        z.requires_grad_()
        got = mmfast.finite_scalar_quantize(z, (8, 5, 5, 5))
        level = 4 if value == math.inf else 0
        assert (got.indices[[3, 19]] // 40 % 5 == level).all()
        assert torch.equal(
            got.quantized[[3, 19], 2].isnan().all().cpu(), torch.tensor(value != value)
        )
        rest = [i for i in range(20) if i not in (3, 19)]
        assert torch.equal(got.indices[rest], clean.indices[rest])
        (gradient,) = torch.autograd.grad(got.quantized.sum(), z)
        if value == value:
            assert (gradient[[3, 19], 2] == 0).all()
        else:
            assert gradient[[3, 19], 2].isnan().all()
        assert gradient[rest].isfinite().all()


def test_gradient_of_nan_with_noise(backend):
    device = device_of(backend)
    z = torch.tensor([[math.nan, math.nan, 0.1, 0.1]], device=device, requires_grad=True)
    noise = torch.tensor([[-0.5, 0.5, math.nan, 0.0]], device=device)
    got = mmfast.finite_scalar_quantize(z, (5, 5, 5, 5), variant="symmetric", noise=noise)
    (gradient,) = torch.autograd.grad(got.quantized.sum(), z)
    assert gradient[0, :2].isnan().all()
    assert gradient[0, 2] == 0
    assert gradient[0, 3] > 0


@pytest.mark.parametrize("view", VIEWS)
def test_strides(backend, view):
    for dtype in (torch.float32, torch.float16):
        z = VIEWS[view](normal(70, 5, dtype=dtype).to(device_of(backend)))
        levels = (8, 8, 5, 5, 3)
        got = mmfast.finite_scalar_quantize(z, levels)
        want = mmfast.finite_scalar_quantize(z.contiguous(), levels)
        assert torch.equal(got.quantized, want.quantized)
        assert torch.equal(got.indices, want.indices)


def test_images(backend):
    z = normal(2, 4, 3, 5).to(device_of(backend)).movedim(1, -1)
    got = mmfast.finite_scalar_quantize(z, (8, 5, 5, 5))
    want = mmfast.finite_scalar_quantize(z.contiguous().view(-1, 4), (8, 5, 5, 5))
    assert torch.equal(got.quantized.reshape(-1, 4), want.quantized)
    assert torch.equal(got.indices.flatten(), want.indices)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3,)])
def test_few_vectors(backend, shape):
    z = torch.zeros(shape, device=device_of(backend), requires_grad=True)
    got = mmfast.finite_scalar_quantize(z, (5, 5, 5))
    assert got.quantized.shape == shape
    assert got.indices.shape == shape[:-1]
    assert torch.autograd.grad(got.quantized.sum(), z)[0].shape == shape


def test_threads(backend, threads):
    z = normal(5000, 5).to(device_of(backend))
    many = mmfast.finite_scalar_quantize(z, (8, 8, 5, 5, 3))
    torch.set_num_threads(1)
    one = mmfast.finite_scalar_quantize(z, (8, 8, 5, 5, 3))
    part = mmfast.finite_scalar_quantize(z[17:1234], (8, 8, 5, 5, 3))
    assert torch.equal(many.indices, one.indices)
    assert torch.equal(many.quantized, one.quantized)
    assert torch.equal(part.quantized, one.quantized[17:1234])


def test_large_outputs(backend):
    if backend != "cpp":
        return  # its kernels write them past the cache
    z, levels = normal((1 << 20) + 3, 4).requires_grad_(), (8, 5, 5, 5)
    weight = normal(*z.shape, seed=1)
    whole = mmfast.finite_scalar_quantize(z, levels)
    (gradient,) = torch.autograd.grad(whole.quantized, z, weight)
    for rows in (slice(0, 70000), slice(500000, 570000), slice(z.shape[0] - 70000, None)):
        part = mmfast.finite_scalar_quantize(z[rows], levels)
        assert torch.equal(part.quantized, whole.quantized[rows])
        assert torch.equal(part.indices, whole.indices[rows])
        (few,) = torch.autograd.grad(part.quantized, z, weight[rows])
        assert torch.equal(few[rows], gradient[rows])


def test_gradients_of_any_size(backend):
    """Each within its tolerance, and the same whatever numbers are beside it."""
    device, levels = device_of(backend), (8, 5, 5)
    z = torch.linspace(-13, 13, 3 * 1111).view(-1, 3).to(device)
    for numbers in (z, z / 4, z[torch.randperm(1111, generator=torch.Generator().manual_seed(0))]):
        weight = normal(*z.shape, seed=1).to(device)
        arguments = (weight, numbers, levels, "bound", False, None)
        leaf = numbers.clone().requires_grad_()
        whole = mmfast.finite_scalar_quantize(leaf, levels).quantized
        (gradient,) = torch.autograd.grad(whole, leaf, weight)
        assert finite_scalar_quantize.compare_bwd(gradient, arguments) == []
        for row in (0, 130, 555, 1110):
            leaf = numbers[row : row + 1].clone().requires_grad_()
            alone = mmfast.finite_scalar_quantize(leaf, levels).quantized
            (single,) = torch.autograd.grad(alone, leaf, weight[row : row + 1])
            assert torch.equal(single[0], gradient[row])


@pytest.mark.parametrize("levels", [(40000, 3), (3, 32767), (8,) * 10, (3,) * 16, (3,) * 17])
def test_many_levels_or_dimensions(backend, levels):
    """What takes more than 15 bits, and more dimensions than are packed."""
    for dtype in (torch.float32, WIDE):
        z = (2 * normal(275, len(levels), dtype=dtype)).to(device_of(backend))
        got = mmfast.finite_scalar_quantize(z, levels)
        assert finite_scalar_quantize.compare(got, (z, levels, "bound", False, None)) == []


@settings(max_examples=40)
@given(
    levels=st.one_of(
        st.lists(st.integers(3, 40), min_size=1, max_size=6),
        st.lists(st.sampled_from([4, 5, 8]), min_size=1, max_size=10),
        st.lists(st.just(3), min_size=1, max_size=19),
    ),
    n=st.integers(0, 40),
    variant=st.sampled_from(finite_scalar_quantize.VARIANTS),
    seed=st.integers(0, 99),
)
def test_any_problem(levels, n, variant, seed):
    z = 2 * normal(n, len(levels), seed=seed)
    z.view(-1)[::7] = math.nan
    arguments = (z, levels, variant, False, None)
    for name in BACKENDS:
        device = device_of(name)
        given = (z.to(device), *arguments[1:])
        with mmfast.use_backend(name):
            got = mmfast.finite_scalar_quantize(given[0], levels, variant=variant)
        assert finite_scalar_quantize.compare(got, given) == []


def test_messages():
    z = normal(4, 3)
    call = mmfast.finite_scalar_quantize
    with pytest.raises(ValueError, match=r"each at least 3 with variant 'bound', got \[2, 5, 5\]"):
        call(z, (2, 5, 5))
    with pytest.raises(ValueError, match=r"z must be \(..., D\) with D = 2, got shape \(4, 3\)"):
        call(z, (5, 5))
    with pytest.raises(ValueError, match="variant must be one of bound, symmetric, got 'round'"):
        call(z, (5, 5, 5), variant="round")
    with pytest.raises(ValueError, match="at most 2147483647 codes"):
        call(z, (5000, 5000, 5000))
    with pytest.raises(ValueError, match="noise is for variant 'symmetric', got 'bound'"):
        call(z, (5, 5, 5), noise=z)
    with pytest.raises(ValueError, match=r"noise must have shape \(4, 3\), got \(3,\)"):
        call(z, (5, 5, 5), variant="symmetric", noise=z[0])
    with pytest.raises(TypeError, match="z must be float32, float16, bfloat16, float64, got int64"):
        call(z.long(), (5, 5, 5))


def test_compiles_with_gradients():
    z = normal(20, 3).requires_grad_()

    def loss(z):
        result = mmfast.finite_scalar_quantize(z, (8, 5, 4))
        return (result.quantized * result.indices[:, None]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(loss(z), z)
    assert torch.equal(torch.autograd.grad(compiled(z), z)[0], want)
