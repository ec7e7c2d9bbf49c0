"""guidance_factors and dynamic_threshold against the formulas and diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from cases import backends_here, device_of, normal
from test_determinism import assert_same_bits

import mmfast
from mmfast.ops import dynamic_threshold, guidance_factors
from mmfast.schedule.layout import Layout, M, N, P, X
from mmfast.schedule.table import Linear, SamplerTable, TableBuilder

BACKENDS = backends_here(guidance_factors.OP)
x_, m_, n_, p_ = (Linear({place: 1.0}) for place in (X, M, N, P))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def halves(*shape: int, device="cpu"):
    """A conditional and an unconditional output that have something in common."""
    c = normal(*shape).to(device)
    return c, 0.6 * c + 0.5 * normal(*shape, seed=1).to(device) + 0.3


def guided(c, u, factors):
    """The output that the factors make."""
    a, b = (f.view(-1, *[1] * (c.dim() - 1)).to(c.dtype) for f in factors.unbind(1))
    return a * c + b * u


def table(**row) -> SamplerTable:
    """Of a single row."""
    builder = TableBuilder()
    builder.row(0.0, **row)
    return builder.build()


def test_rescaled_guidance_is_that_of_diffusers(backend):
    guiders = pytest.importorskip("diffusers.guiders.guider_utils")
    c, u = halves(3, 4, 9, 31, device=device_of(backend))
    for rescale in (0.0, 0.7, 1.0):
        factors = mmfast.guidance_factors(c, u, guidance_scale=5.0, rescale=rescale)
        plain = u + 5.0 * (c - u)
        expected = guiders.rescale_noise_cfg(plain, c, rescale)
        torch.testing.assert_close(guided(c, u, factors), expected)
    assert factors.dtype == torch.float64


def apg(c, u, w, eta, threshold, average):
    """Algorithm 1 of the paper, line by line."""
    d = c - u if average is None else average
    dims = tuple(range(1, c.dim()))

    def norm(t):
        return torch.linalg.vector_norm(t, dim=dims, keepdim=True)

    d = d * torch.clamp(threshold / norm(d), max=1)
    unit = c / norm(c)
    along = (d * unit).sum(dims, keepdim=True) * unit
    return c + (w - 1) * (d - along + eta * along)


@pytest.mark.parametrize("threshold", [math.inf, 2.5])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_projected_guidance(backend, eta, threshold):
    c, u = halves(3, 4, 5, 61, device=device_of(backend))
    options = {"guidance_scale": 6.0, "eta": eta, "norm_threshold": threshold}
    factors = mmfast.projected_guidance_factors(c, u, **options)
    torch.testing.assert_close(guided(c, u, factors), apg(c, u, 6.0, eta, threshold, None))
    if eta == 1 and threshold == math.inf:
        torch.testing.assert_close(factors[0].tolist(), [6.0, -5.0])


def test_projected_guidance_with_momentum(backend):
    device = device_of(backend)
    average, kept = torch.zeros(2, 3, 43, device=device), torch.zeros(2, 3, 43, device=device)
    for _ in range(3):
        c, u = halves(2, 3, 43, device=device)
        factors = mmfast.projected_guidance_factors(
            c, u, guidance_scale=6.0, norm_threshold=9.0, momentum=-0.5, average=average
        )
        kept = c - u - 0.5 * kept
        torch.testing.assert_close(average, kept)
        expected = apg(c, u, 6.0, 0.0, 9.0, kept)
        torch.testing.assert_close(guided(c, average, factors), expected)


def test_factors_guide_a_step(backend):
    c, u = halves(2, 3, 43)
    with mmfast.use_backend("reference" if backend == "triton" else backend):
        factors = mmfast.guidance_factors(c, u, guidance_scale=5.0, rescale=0.7)
        got = mmfast.sampler_step(c, c, table(next=m_), 0, unconditional=u, guidance=factors)
    torch.testing.assert_close(got, guided(c, u, factors))


def test_a_large_offset_costs_no_precision(backend):
    """Sums of squares would lose the deviation."""
    c, u = halves(1, 30000)
    c, u = c.double() + 1e6, u.double() + 1e6
    factors = mmfast.guidance_factors(c, u, guidance_scale=5.0, rescale=1.0)
    f = c.std() / (5 * c - 4 * u).std()
    torch.testing.assert_close(factors[0, 0], 5 * f, rtol=1e-9, atol=0)


def test_factors_do_not_depend_on_batch_or_threads(backend, threads):
    c, u = halves(3, 20011)
    for make in (mmfast.guidance_factors, mmfast.projected_guidance_factors):
        together = make(c, u, guidance_scale=5.0)
        alone = [make(c[b : b + 1], u[b : b + 1], guidance_scale=5.0) for b in range(3)]
        assert_same_bits([together], [torch.cat(alone)])


def test_zeros_and_nan(backend):
    zero, one = torch.zeros(1, 9), torch.ones(1, 9)
    got = mmfast.projected_guidance_factors(zero, one, guidance_scale=3.0)
    assert got.tolist() == [[3, -2]]
    got = mmfast.projected_guidance_factors(one, one, guidance_scale=3.0, norm_threshold=1.0)
    assert got.tolist() == [[3, -2]]
    for make in (mmfast.guidance_factors, mmfast.projected_guidance_factors):
        options = {"rescale": 0.5} if make is mmfast.guidance_factors else {}
        bad = normal(2, 9)
        bad[1, 4] = math.nan
        got = make(bad, normal(2, 9, seed=1), guidance_scale=3.0, **options)
        assert got.isnan().any(1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditional": torch.ones(2, 4)}, r"unconditional must have shape \(2, 4\)"),
        ({"conditional": 3.0}, "conditional must be a torch.Tensor"),
        ({"momentum": 0.5}, "momentum without average"),
        ({"average": torch.ones(3)}, r"average must have shape \(2, 5\)"),
        ({"norm_threshold": 0.0}, "norm_threshold must be above 0"),
    ],
    ids=str,
)
def test_refusals_of_factors(change, message):
    arguments = {"conditional": normal(2, 5), "unconditional": normal(2, 5), "guidance_scale": 2.0}
    with pytest.raises((TypeError, ValueError), match=message):
        mmfast.projected_guidance_factors(**arguments | change)


def test_rescale_out_of_range():
    with pytest.raises(ValueError, match="rescale must be from 0 to 1, got 2"):
        mmfast.guidance_factors(*halves(2, 5), guidance_scale=2.0, rescale=2)


@pytest.mark.parametrize("numbers", [1, 2, 7, 201, 5000])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("name", backends_here(dynamic_threshold.OP))
def test_quantiles_are_those_of_torch(name, ratio, numbers):
    x = 3 * normal(3, numbers, dtype=torch.float64)
    with mmfast.use_backend(name):
        got = mmfast.dynamic_threshold(
            x, x, table(denoised=x_, next=p_), 0, ratio=ratio, maximum=1e9
        )
    expected = torch.quantile(x.abs(), ratio, dim=1).clamp(1, 1e9)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_thresholding_is_that_of_diffusers(backend):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(dynamic_thresholding_ratio=0.9, sample_max_value=3.0)
    x = normal(3, 4, 8, 8) * torch.tensor([0.1, 1.0, 9.0]).view(3, 1, 1, 1)
    row = table(denoised=x_, next=p_)
    threshold = mmfast.dynamic_threshold(x, x, row, 0, ratio=0.9, maximum=3.0)
    got = mmfast.sampler_step(x, x, row, 0, threshold=threshold)
    torch.testing.assert_close(got, scheduler._threshold_sample(x), rtol=1e-5, atol=1e-6)
    assert threshold[0] == 1
    assert threshold[2] == 3


def test_threshold_of_nan_and_infinity(backend):
    x = normal(3, 50)
    x[0, 3], x[1, 4] = math.nan, -math.inf
    got = mmfast.dynamic_threshold(x, x, table(denoised=x_, next=p_), 0, ratio=1.0, maximum=9.0)
    assert got[0].isnan()
    assert got[1] == 9
    assert not got[2].isnan()


def test_refusals_of_thresholds():
    x = normal(2, 5)
    row = table(denoised=x_, next=p_)
    with pytest.raises(ValueError, match="ratio must be from 0 to 1, got 2"):
        mmfast.dynamic_threshold(x, x, row, 0, ratio=2)
    with pytest.raises(ValueError, match=r"maximum must be above 0, got 0\.0"):
        mmfast.dynamic_threshold(x, x, row, 0, maximum=0.0)
    with pytest.raises(ValueError, match="guidance without unconditional"):
        mmfast.dynamic_threshold(x, x, row, 0, guidance=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"model_output must have shape \(2, 5\), got \(5,\)"):
        mmfast.dynamic_threshold(x, x[0], row, 0)
    with pytest.raises(IndexError, match="from 0 to 0 for a table of 1"):
        mmfast.dynamic_threshold(x, x, row, 1)
    with pytest.raises(TypeError, match="step must be int64, got float32"):
        mmfast.dynamic_threshold(x, x, row, torch.tensor(0.0))
    noisy = table(denoised=x_ + n_, next=p_)
    assert noisy.coefficients[0, Layout.DENOISED + N] == 1
    for name in backends_here(dynamic_threshold.OP):
        if name == "triton":  # on a device nothing is read back
            continue
        with mmfast.use_backend(name), pytest.raises(RuntimeError, match="predicts with noise"):
            mmfast.dynamic_threshold(x, x, noisy, 0)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_rows_without_a_prediction_are_nan_on_a_device():
    x = normal(3, 70).to(device_of("triton"))
    rows = TableBuilder()
    rows.row(1.0, denoised=x_ + n_, next=p_)
    rows.row(0.0, denoised=x_, next=p_)
    steps = torch.tensor([0, 1, 2], device=x.device)
    with mmfast.use_backend("triton"):
        got = mmfast.dynamic_threshold(x, x, rows.build().to(x.device), steps)
    assert got.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", backends_here(dynamic_threshold.OP))
def test_quantiles_of_equal_and_denormal_numbers(name, ratio):
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[2.0, -2, 2, 2, 5, 0, 1e-310, 7, -7, 7]], dtype=dtype)
        x = torch.cat([x, x.flip(1), x * 2], 1).to(device_of(name))
        with mmfast.use_backend(name):
            got = mmfast.dynamic_threshold(
                x, x, table(denoised=x_, next=p_).to(x.device), 0, ratio=ratio, maximum=1e9
            )
        expected = torch.quantile(x.abs(), ratio, dim=1).clamp(1, 1e9)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
