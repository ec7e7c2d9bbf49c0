"""sample_code: the definition, the distribution, the streams."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from cases import METRICS, backends_here, device_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmfast
from mmfast import philox
from mmfast.ops import sample_code

BACKENDS = backends_here(sample_code.OP)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def draw(backend: str, x: Tensor, codebook: Tensor, **options) -> Tensor:
    device = device_of(backend)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with mmfast.use_backend(backend):
        return mmfast.sample_code(x.to(device), codebook.to(device), **options).cpu()


def by_hand(x: Tensor, codebook: Tensor, temperature: float, metric: str, seed: int) -> Tensor:
    """One stream, no heads, vector by vector."""
    codes = codebook.double()
    room = (len(codes) + 3) // 4 * 4
    u = philox.uniforms(torch.tensor(seed), torch.tensor(0), len(x) * room).double()
    indices = []
    for n, row in enumerate(x.double()):
        if metric == "euclidean":
            logits = [-math.dist(row.tolist(), code.tolist()) for code in codes]
        elif metric == "dot":
            logits = [float(row @ code) for code in codes]
        else:
            logits = [float(torch.cosine_similarity(row, code, 0)) for code in codes]
        scores = [
            logit / temperature - math.log(-math.log1p(-min(float(v), 1 - 2.0**-24)))
            for logit, v in zip(logits, u[n * room :], strict=False)
        ]
        indices.append(max(range(len(scores)), key=scores.__getitem__))
    return torch.tensor(indices)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), [(9, 1, 3), (20, 30, 4), (5, 67, 19)])
def test_definition(backend, n, k, d, metric):
    x, codebook = normal(n, d), normal(k, d, seed=1)
    for temperature in (0.1, 1.0, 7.0):
        got = draw(backend, x, codebook, temperature=temperature, metric=metric, seed=5)
        assert torch.equal(got, by_hand(x, codebook, temperature, metric, 5))


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 90),
    d=st.integers(1, 40),
    metric=st.sampled_from(METRICS),
    temperature=st.sampled_from([1e-30, 1e-6, 1e-2, 0.3, 1.0, 40.0, 1e9, math.inf]),
    offset=st.sampled_from([0.0, 100.0, 1e6]),
    scale=st.sampled_from([1e-25, 1e-8, 1.0, 1e8, 1e25]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**62),
)
def test_any_problem(n, k, d, metric, temperature, offset, scale, dtype, seed):
    x = ((normal(n, d, seed=seed % 97, dtype=torch.float64) + offset) * scale).to(dtype)
    codebook = ((normal(k, d, seed=seed % 89, dtype=torch.float64) + offset) * scale).to(dtype)
    x[0] = codebook[-1]
    want = draw(
        "reference", x, codebook, temperature=temperature, metric=metric, seed=seed, offset=3
    )
    for backend in BACKENDS[1:]:
        got = draw(
            backend, x, codebook, temperature=temperature, metric=metric, seed=seed, offset=3
        )
        assert torch.equal(got, want), backend


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_frequencies(backend, metric, temperature):
    """Chi-square against the softmax of the logits."""
    vector, codebook = normal(1, 6), normal(12, 6, seed=1)
    if metric == "euclidean":
        logits = -torch.cdist(vector, codebook)
    elif metric == "dot":
        logits = vector @ codebook.T
    else:
        logits = torch.cosine_similarity(vector, codebook)[None]
    wanted = 20_000 * (logits.double() / temperature).softmax(1)[0]
    got = draw(backend, vector.expand(20_000, 6), codebook, temperature=temperature,
               metric=metric, seed=9)  # fmt: skip
    counts = torch.bincount(got, minlength=12)
    enough = wanted > 8  # the others are counted together
    seen = torch.cat([counts[enough], counts[~enough].sum()[None]]).double()
    hoped = torch.cat([wanted[enough], wanted[~enough].sum()[None]])
    seen, hoped = seen[hoped > 0], hoped[hoped > 0]
    statistic = float(((seen - hoped).square() / hoped).sum())
    assert scipy.stats.chi2.sf(statistic, len(seen) - 1) > 1e-3


def test_batches(backend):
    x, codebook = normal(50, 7), normal(33, 7, seed=1)
    whole = draw(backend, x, codebook, seed=3)
    for size in (1, 17, 49):
        assert torch.equal(draw(backend, x[:size], codebook, seed=3), whole[:size])
    assert torch.equal(draw(backend, x.view(5, 10, 7), codebook, seed=3), whole.view(5, 10))


@pytest.mark.parametrize("heads", [0, 3])
def test_samples_do_not_see_the_batch(backend, heads):
    lead = (heads,) if heads else ()
    x, codebook = normal(*lead, 4, 9, 7), normal(*lead, 33, 7, seed=1)
    seed, offset = torch.tensor([5, -1, 2**40, 5]), torch.tensor([0, 0, 1, 1])
    whole = draw(backend, x, codebook, seed=seed, offset=offset)
    for b in range(4):
        part = x[..., b : b + 1, :, :]
        alone = draw(backend, part, codebook, seed=int(seed[b]), offset=offset[b])
        assert torch.equal(alone, whole[..., b : b + 1, :])
    if heads:
        stream = draw(backend, x[:, 0], codebook, seed=1)
        assert torch.equal(draw(backend, x[:, 0, :5], codebook, seed=1), stream[:, :5])


@pytest.mark.parametrize("metric", METRICS)
def test_threads(threads, metric):
    x, codebook = normal(500, 9), normal(70, 9, seed=1)
    many = mmfast.sample_code(x, codebook, metric=metric, seed=1)
    torch.set_num_threads(1)
    assert torch.equal(many, mmfast.sample_code(x, codebook, metric=metric, seed=1))


@pytest.mark.parametrize("metric", METRICS)
def test_temperatures(backend, metric):
    x, codebook = normal(60, 5), normal(30, 5, seed=1)
    nearest = mmfast.nearest_code(x, codebook, metric=metric)[0]
    for temperature in (0, 1e-12):
        got = draw(backend, x, codebook, temperature=temperature, metric=metric, seed=1)
        assert torch.equal(got, nearest)
    hot = [
        draw(backend, x, codebook, temperature=t, metric=metric, seed=1) for t in (1e12, math.inf)
    ]
    assert torch.equal(hot[0], hot[1])
    assert len(hot[0].unique()) > 20


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity(backend, metric, value):
    x, codebook = normal(20, 5), normal(30, 5, seed=1)
    clean = draw(backend, x, codebook, metric=metric, seed=1)
    bad = x.clone()
    bad[[3, 19], 2] = value
    got = draw(backend, bad, codebook, metric=metric, seed=1)
    good = torch.ones(20, dtype=torch.bool)
    good[[3, 19]] = False
    assert torch.equal(got[good], clean[good])
    assert ((got >= 0) & (got < 30)).all()
    if math.isnan(value):
        assert got[[3, 19]].tolist() == [0, 0]
    codes = codebook.clone()
    codes[[4, 9], 2] = value
    for vectors in (x, bad):
        want = draw("reference", vectors, codes, metric=metric, seed=1)
        assert torch.equal(draw(backend, vectors, codes, metric=metric, seed=1), want)
        if math.isnan(value):
            assert set(want.tolist()) <= {0, 4}


def test_zero_vectors(backend):
    x, codebook = torch.zeros(40, 5), normal(30, 5, seed=1)
    codebook[3] = 0
    for metric in METRICS:
        got = draw(backend, x, codebook, metric=metric, seed=1)
        assert torch.equal(got, draw("reference", x, codebook, metric=metric, seed=1))


def test_equal_codes_are_drawn_alike(backend):
    counts = torch.bincount(
        draw(backend, torch.ones(4000, 3), torch.ones(4, 3), temperature=1e-3, seed=2), minlength=4
    )
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_strides(backend, dtype):
    x, codebook = normal(30, 5, dtype=dtype), normal(20, 5, seed=1, dtype=dtype)
    want = draw(backend, x.double(), codebook.double(), seed=1)
    assert torch.equal(draw(backend, x, codebook.double(), seed=1), want)
    assert torch.equal(draw(backend, x.T.contiguous().T, codebook, seed=1), want)


def test_no_vectors(backend):
    assert draw(backend, torch.zeros(0, 3, 5), normal(4, 5), seed=1).shape == (0, 3)
    assert draw(backend, torch.zeros(2, 0, 5), normal(4, 5), seed=torch.arange(2)).shape == (2, 0)
    got = draw(backend, torch.zeros(0, 5, 5), torch.zeros(0, 4, 5), seed=1)
    assert got.shape == (0, 5)
    assert draw(backend, normal(5), normal(4, 5), seed=1).shape == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0, got -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be at least 0, got nan"),
        ({"metric": "manhattan"}, ValueError, "metric must be one of euclidean, cosine, dot"),
        ({"seed": None}, TypeError, "seed must be an int or an int64 tensor, got NoneType"),
        ({"seed": torch.arange(3)}, ValueError, r"seed .* with x's B = 4, got \(3,\)"),
        ({"offset": torch.arange(3)}, ValueError, r"offset .* with x's B = 4, got \(3,\)"),
    ],
)
def test_messages(options, error, message):
    with pytest.raises(error, match=message):
        mmfast.sample_code(normal(4, 5), normal(3, 5), **{"seed": 0, **options})


def test_compiles():
    def tokens(x, codebook, seed):
        return codebook[mmfast.sample_code(x, codebook, temperature=0.5, seed=seed)]

    torch.compiler.reset()
    compiled = torch.compile(tokens, fullgraph=True, backend="aot_eager")
    x, codebook = normal(4, 3, 5), normal(9, 5, seed=1)
    for seed in (1, 2, torch.arange(4)):
        assert torch.equal(compiled(x, codebook, seed), tokens(x, codebook, seed))
