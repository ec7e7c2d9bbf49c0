"""soft_assignment_statistics: the plain formula and autograd in float64, hard values, refusals."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from cases import backends_here, device_of, normal
from hypothesis import given, settings
from test_determinism import assert_same_bits
from torch import Tensor

import mmfast
from mmfast.backends import interpreting
from mmfast.ops import soft_assignment_statistics as op
from mmfast.ops.soft_assignment_statistics import METRICS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(params=backends_here(op.OP))
def backend(request):
    """Each backend that runs here."""
    with mmfast.use_backend(request.param):
        yield request.param


def placed(backend: str, *tensors: Tensor) -> list[Tensor]:
    """Where ``backend`` runs."""
    return [t.to(device_of(backend)) for t in tensors]


def plain(
    x: Tensor, codebook: Tensor, temperature: float, metric: str, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The formula, without a common offset to lose anything to: x (..., N, D)."""
    if metric in ("euclidean", "distance"):
        distance = torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        logits = -distance.square() if metric == "euclidean" else -distance
    else:
        if metric == "cosine":
            x, codebook = (torch.nn.functional.normalize(t, dim=-1) for t in (x, codebook))
        logits = x @ codebook.mT
    log = (logits / temperature).log_softmax(-1)
    weights = x.new_ones(x.shape[:-1]) if weights is None else weights.to(x.dtype)
    weights = weights / weights.sum(-1, keepdim=True)
    entropies = -(log.exp() * log).sum(-1)
    return (weights[..., None] * log.exp()).sum(-2), (weights * entropies).sum(-1)


def with_gradients(run: Any, x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both outputs, and the gradients of a function of them."""
    x, codebook = (t.detach().clone().requires_grad_() for t in (x, codebook))
    means, entropy = run(x, codebook)
    generator = torch.Generator().manual_seed(3)
    total = (means * torch.randn(means.shape, generator=generator).to(means)).sum() - entropy.sum()
    return means, entropy, *torch.autograd.grad(total, (x, codebook))


def check(
    backend: str,
    x: Tensor,
    codebook: Tensor,
    temperature: float,
    metric: str,
    weights: Tensor | None = None,
    tolerance: float = 2e-5,
) -> None:
    """``backend`` against the formula in float64 on the same numbers."""
    device = device_of(backend)

    def ours(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        return mmfast.soft_assignment_statistics(
            x,
            codebook,
            temperature=temperature,
            metric=metric,
            weights=None if weights is None else weights.to(device),
        )

    got = with_gradients(ours, x.to(device), codebook.to(device))
    want = with_gradients(
        lambda x, c: plain(x, c, temperature, metric, weights), x.double(), codebook.double()
    )
    for a, b in zip(got, want, strict=True):
        a = a.cpu().double()
        size = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b.view(a.shape), rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("metric", METRICS)
def test_formula(backend, metric):
    x, codebook = normal(2, 70, 11), normal(2, 45, 11, seed=1)
    weights = normal(2, 70, seed=2).clamp_min(0)
    check(backend, x, codebook, 0.3 if metric == "cosine" else 2.0, metric, weights)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), list(zip(DTYPES, (2e-5, 4e-3, 3e-2, 1e-11), strict=True))
)
def test_dtypes(backend, dtype, tolerance):
    x, codebook = normal(40, 9).to(dtype), normal(33, 9, seed=1).to(dtype)
    check(backend, x, codebook, 3.0, "euclidean", tolerance=tolerance)
    x, codebook = placed(backend, x, codebook.double())
    means, entropy = mmfast.soft_assignment_statistics(x, codebook)
    assert means.dtype == entropy.dtype == torch.float64


@pytest.mark.parametrize("metric", ["euclidean", "distance", "dot"])
def test_common_offset(backend, metric):
    offset = 0 if metric == "dot" else 100
    check(backend, normal(60, 8) + offset, normal(20, 8, seed=1) + 100, 2.0, metric, tolerance=4e-4)


def test_bool_weights_are_a_mask(backend):
    x, codebook, mask = placed(backend, normal(40, 5), normal(9, 5, seed=1), normal(40, seed=2) > 0)
    x[~mask] = math.nan
    got = mmfast.soft_assignment_statistics(x, codebook, weights=mask)
    few = mmfast.soft_assignment_statistics(x[mask], codebook)
    for a, b in zip(got, few, strict=True):
        torch.testing.assert_close(a, b)
    leaf = x.clone().requires_grad_()
    mmfast.soft_assignment_statistics(leaf, codebook, weights=mask).entropy.backward()
    assert leaf.grad[mask].isfinite().all()
    assert not leaf.grad[~mask].any()


def test_batch_dimensions(backend):
    x, codebook = placed(backend, normal(2, 3, 4, 7, 6), normal(2, 35, 6, seed=1))
    means, entropy = mmfast.soft_assignment_statistics(x, codebook, batch_dims=2)
    assert means.shape == (2, 3, 4, 35)
    assert entropy.shape == (2, 3, 4)
    for h in range(2):
        for i in range(3):
            for j in range(4):
                alone = mmfast.soft_assignment_statistics(x[h, i, j], codebook[h])
                assert_same_bits((means[h, i, j], entropy[h, i, j]), alone)
    each = mmfast.soft_assignment_statistics(x, codebook, batch_dims=3)
    torch.testing.assert_close(each.mean_probabilities.mean(3), means)
    one = mmfast.soft_assignment_statistics(x[0, 0, 0, 0], codebook[0])
    torch.testing.assert_close(one.mean_probabilities, each.mean_probabilities[0, 0, 0, 0])


@settings(max_examples=15)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40)),
    heads=st.integers(1, 2),
    metric=st.sampled_from(METRICS),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_problem(sizes, heads, metric, weighted, dtype):
    n, k, d = sizes
    weights = torch.rand(heads, n, generator=torch.Generator().manual_seed(0)) if weighted else None
    for name in backends_here(op.OP):
        with mmfast.use_backend(name):
            x, codebook = normal(heads, n, d, dtype=dtype), normal(heads, k, d, seed=1, dtype=dtype)
            check(name, x, codebook, math.sqrt(d), metric, weights, tolerance=1e-4)


def test_many_codes_and_rows(backend):
    """More than one wave, panel and line."""
    if backend == "reference" or interpreting():
        pytest.skip("only where it does not take long")
    check(backend, normal(4500, 5), normal(2100, 5, seed=1), 1.5, "distance", tolerance=1e-4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("factor", "temperature"), [(1.0, 1e-12), (1e6, 1.0), (1e-4, 1e3)])
def test_extreme_logits(backend, metric, factor, temperature):
    x, codebook = placed(backend, factor * normal(33, 4), factor * normal(17, 4, seed=1))
    means, entropy, *grads = with_gradients(
        lambda x, c: mmfast.soft_assignment_statistics(
            x, c, temperature=temperature, metric=metric
        ),
        x,
        codebook,
    )
    assert all(t.isfinite().all() for t in (means, entropy, *grads))
    if temperature == 1e3:
        assert entropy.item() == pytest.approx(math.log(17), rel=1e-6)
        torch.testing.assert_close(means, torch.full_like(means, 1 / 17), rtol=1e-2, atol=0)
    elif metric != "cosine" or temperature < 1:
        kind = "euclidean" if metric == "distance" else metric
        indices, _ = mmfast.nearest_code(x, codebook, metric=kind)
        torch.testing.assert_close(means, indices.bincount(minlength=17).to(means) / 33)
        assert entropy.item() == pytest.approx(0, abs=1e-6)


def test_a_code_that_is_the_vector(backend):
    (x,) = placed(backend, normal(12, 6))
    for metric in METRICS:
        grads = with_gradients(
            lambda x, c, metric=metric: mmfast.soft_assignment_statistics(x, c, metric=metric),
            x,
            x.clone(),
        )[2:]
        assert all(g.isfinite().all() for g in grads)


def test_zero_vectors_have_no_cosine(backend):
    x, codebook = placed(backend, normal(12, 6), normal(5, 6, seed=1))
    x[3], codebook[2] = 0, 0
    leaf, codes = x.requires_grad_(), codebook.requires_grad_()
    means, entropy = mmfast.soft_assignment_statistics(leaf, codes, metric="cosine")
    (means[0] + entropy).backward()
    assert not leaf.grad[3].any()
    assert not codes.grad[2].any()
    assert leaf.grad.isfinite().all()
    assert codes.grad.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(backend, metric, value):
    x, codebook = placed(backend, normal(2, 40, 5), normal(2, 37, 5, seed=1))
    x[0, 3, 2] = value
    got = with_gradients(
        lambda x, c: mmfast.soft_assignment_statistics(x, c, metric=metric), x, codebook
    )
    assert got[0][0].isnan().all()
    assert got[1][0].isnan()
    assert got[0][1].isfinite().all()
    assert got[1][1].isfinite()
    assert got[2][0, 3].isnan().all()
    assert got[2][1].isfinite().all()
    x, codebook = placed(backend, normal(2, 40, 5), codebook.clone())
    codebook[1, 36, 4] = value
    means, entropy = mmfast.soft_assignment_statistics(x, codebook, metric=metric)
    assert means[1].isnan().all()
    assert entropy[1].isnan()
    assert means[0].isfinite().all()


@pytest.mark.parametrize("weights", [None, torch.zeros(6)])
def test_nothing_to_average(backend, weights):
    x, codebook = placed(backend, normal(0 if weights is None else 6, 4), normal(3, 4, seed=1))
    weights = None if weights is None else weights.to(x.device)
    x, codebook = x.requires_grad_(), codebook.requires_grad_()
    means, entropy = mmfast.soft_assignment_statistics(x, codebook, weights=weights)
    assert not means.any()
    assert entropy == 0
    (means.sum() + entropy).backward()
    assert not x.grad.any()
    assert not codebook.grad.any()


def test_one_code(backend):
    x, codebook = placed(backend, normal(9, 4), normal(1, 4, seed=1))
    got = with_gradients(mmfast.soft_assignment_statistics, x, codebook)
    torch.testing.assert_close(got[0], torch.ones_like(got[0]))
    assert abs(got[1].item()) < 1e-6
    assert not got[2].any()
    assert not got[3].any()


def test_only_what_is_asked_for(backend):
    x, codebook = placed(backend, normal(20, 6), normal(11, 6, seed=1))
    both = with_gradients(mmfast.soft_assignment_statistics, x, codebook)[2:]
    assert mmfast.soft_assignment_statistics(x, codebook).entropy.requires_grad is False
    for i in range(2):
        leaf = (x, codebook)[i].clone().requires_grad_()
        arguments = (leaf, codebook) if i == 0 else (x, leaf)
        means, entropy = mmfast.soft_assignment_statistics(*arguments)
        weights = torch.randn(means.shape, generator=torch.Generator().manual_seed(3)).to(means)
        grad = torch.autograd.grad((means * weights).sum() - entropy, leaf, retain_graph=True)[0]
        assert torch.equal(grad, both[i])
        one = torch.autograd.grad((means * weights).sum(), leaf, retain_graph=True)[0]
        other = torch.autograd.grad(-entropy, leaf)[0]
        torch.testing.assert_close(one + other, grad)


def test_bits_do_not_depend_on_threads(threads):
    x, codebook = normal(700, 9), normal(1030, 9, seed=1)
    run = lambda x, c: mmfast.soft_assignment_statistics(x, c, temperature=4.0)  # noqa: E731
    got = with_gradients(run, x, codebook)
    torch.set_num_threads(1)
    assert_same_bits(got, with_gradients(run, x, codebook))


def test_entropy_losses_of_the_field():
    """The two terms of LFQ's and IBQ's loss, from one call."""
    x, codebook = normal(64, 8), normal(50, 8, seed=1)
    means, entropy = mmfast.soft_assignment_statistics(x, codebook, metric="dot")
    p = (x @ codebook.T).softmax(1)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(p).entropy().mean())
    torch.testing.assert_close(means, p.mean(0))


X, CODES = torch.zeros(4, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.long(), CODES), {}, TypeError, "x must be float32.*got int64"),
        ((X, torch.zeros(2, 4)), {}, ValueError, "codebook's D = 4"),
        ((X, torch.zeros(0, 3)), {}, ValueError, "at least one code"),
        ((X, CODES), {"metric": "l2"}, ValueError, "metric must be one of euclidean, distance"),
        ((X, CODES), {"temperature": 0.0}, ValueError, "temperature must be above 1e-30.*got 0"),
        ((X, CODES), {"temperature": math.nan}, ValueError, "temperature must be .*got nan"),
        ((X, CODES), {"temperature": math.inf}, ValueError, "temperature must be .*got inf"),
        ((X, CODES), {"weights": torch.ones(3)}, ValueError, r"shape \(4,\), got \(3,\)"),
        ((X, CODES), {"weights": torch.ones(4).long()}, TypeError, "weights must be bool"),
        ((X, CODES), {"batch_dims": 2}, ValueError, "batch_dims must be from 0 to 1.*got 2"),
        ((X, CODES), {"batch_dims": -1}, ValueError, "batch_dims must be from 0 to 1.*got -1"),
    ],
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        mmfast.soft_assignment_statistics(*arguments, **options)
