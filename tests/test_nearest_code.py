"""nearest_code on every backend against the definition, evaluated over all pairs in numpy."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import METRICS, VIEWS, backends_here, complaints, device_of, normal
from hypothesis import given, settings

import mmfast
from mmfast.checks import FLOATING
from mmfast.ops.nearest_code import OP

BACKENDS = backends_here(OP)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of a backend that can run here."""
    return request.param


def check(backend: str, x: torch.Tensor, codebook: torch.Tensor, metric: str = "euclidean") -> None:
    """``backend`` gives what the definition says for ``x`` and ``codebook``."""
    device = device_of(backend)
    with mmfast.use_backend(backend):
        result = mmfast.nearest_code(x.to(device), codebook.to(device), metric=metric)
    message = complaints(result, x, codebook, metric)
    assert not message, message


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 65, 100, 257, 1030])
def test_dimensions(backend, d, metric):
    check(backend, normal(50, d), normal(70, d, seed=1), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 5000])
def test_numbers_of_codes(backend, k, metric):
    for d in (4, 20):
        check(backend, normal(20, d), normal(k, d, seed=1), metric)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6, 7, 47, 48, 49, 191, 192, 193, 300])
def test_numbers_of_vectors(backend, n):
    for metric in METRICS:
        check(backend, normal(n, 12), normal(65, 12, seed=1), metric)


@pytest.mark.parametrize(("k", "d"), [(20000, 4), (20000, 20), (9000, 64)])
def test_large_codebooks(backend, k, d):
    check(backend, normal(30, d), normal(k, d, seed=1))


@pytest.mark.parametrize("codes", FLOATING, ids=str)
@pytest.mark.parametrize("vectors", FLOATING, ids=str)
def test_dtypes(backend, vectors, codes):
    for metric in METRICS:
        check(backend, normal(65, 33, dtype=vectors), normal(77, 33, seed=1, dtype=codes), metric)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("codes", VIEWS)
@pytest.mark.parametrize("vectors", VIEWS)
def test_strides(backend, vectors, codes, dtype):
    x = VIEWS[vectors](normal(33, 19, dtype=dtype))
    codebook = VIEWS[codes](normal(40, 19, seed=1, dtype=dtype))
    check(backend, x, codebook)


@pytest.mark.parametrize("metric", METRICS)
def test_leading_dimensions(backend, metric):
    codebook = normal(40, 6, seed=1)
    check(backend, normal(6), codebook, metric)
    check(backend, normal(2, 3, 5, 6), codebook, metric)
    images = normal(2, 6, 5, 7)
    check(backend, images.movedim(1, -1), codebook, metric)
    check(backend, images.to(memory_format=torch.channels_last).movedim(1, -1), codebook, metric)
    check(backend, normal(7, 2, 5, 3, 6).permute(3, 1, 0, 2, 4), codebook, metric)
    check(backend, normal(4, 1, 5, 6).expand(4, 3, 5, 6), codebook, metric)
    check(backend, normal(2, 0, 5, 6), codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_heads(backend, metric):
    codebook = normal(3, 40, 6, seed=1)
    check(backend, normal(3, 6), codebook, metric)
    check(backend, normal(3, 50, 6), codebook, metric)
    check(backend, normal(3, 2, 5, 7, 6), codebook, metric)
    check(backend, normal(50, 3, 6).transpose(0, 1), codebook, metric)
    check(backend, normal(2, 3, 6, 9).permute(1, 0, 3, 2), codebook, metric)
    check(backend, normal(3, 50, 6), codebook.transpose(1, 2).contiguous().mT, metric)
    check(backend, normal(3, 50, 6), normal(40, 6, seed=1).expand(3, 40, 6), metric)
    check(backend, normal(1, 50, 6), normal(1, 40, 6, seed=1), metric)


def test_no_heads(backend):
    device = device_of(backend)
    with mmfast.use_backend(backend):
        result = mmfast.nearest_code(
            torch.zeros(0, 7, 5, device=device), torch.zeros(0, 4, 5, device=device)
        )
    assert [tuple(r.shape) for r in result] == [(0, 7), (0, 7)]


def clusters(n: int, k: int, d: int, spread: float, seed: int = 0):
    """Vectors in tight clusters of few effective dimensions; codes are some of them, moved."""
    rank = max(1, d // 4)
    basis = normal(rank, d, seed=seed)
    centres = normal(30, rank, seed=seed + 1) @ basis
    of = torch.randint(30, (n + k,), generator=torch.Generator().manual_seed(seed))
    points = centres[of] + spread * normal(n + k, rank, seed=seed + 2) @ basis
    return points[:n], points[n:] + 0.1 * spread * normal(k, d, seed=seed + 3)


def _ones(k: int, d: int) -> torch.Tensor:
    return torch.ones(k, d)


def _last_bits(k: int, d: int, centre: float) -> torch.Tensor:
    """Codes whose components are one number or a neighbour of it."""
    up = torch.from_numpy(np.nextafter(np.full((k, d), centre, np.float32), np.float32(1e9)))
    return torch.where(normal(k, d, seed=5) > 0, up, torch.full((k, d), centre))


def _outlier_row(n: int, d: int, factor: float) -> torch.Tensor:
    x = normal(n, d)
    x[7] *= factor
    return x


def _outlier_code(k: int, d: int, factor: float) -> torch.Tensor:
    codebook = normal(k, d, seed=1)
    codebook[77] *= factor
    return codebook


def _scaled_rows(rows: int, d: int, seed: int) -> torch.Tensor:
    """Rows from 1e-18 to 1e18."""
    exponents = torch.linspace(-18, 18, rows, dtype=torch.float64)
    return (normal(rows, d, seed=seed, dtype=torch.float64) * 10 ** exponents[:, None]).float()


def _one_dimension(d: int, factor: float) -> torch.Tensor:
    scale = torch.ones(d)
    scale[d // 2] = factor
    return scale


def _magnitudes(d: int) -> torch.Tensor:
    """From 1 down to denormals."""
    return (10 ** -torch.linspace(0, 42, d, dtype=torch.float64)).float()


def _lattice(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def _two_far_clusters(n: int, k: int, d: int):
    half = k // 2
    codebook = torch.cat([_last_bits(half, d, 1000.0), _last_bits(half, d, -1000.0)])
    x = codebook[torch.arange(n) * 7 % (2 * half)]
    x[::3] += 0.01 * normal(len(x[::3]), d)
    x[1::9] = normal(len(x[1::9]), d)
    return x, codebook


_HUGE = torch.finfo(torch.float32).max / 4

# name: (N, K, D) -> vectors and codes
HARD = {
    "offset 100": lambda n, k, d: (normal(n, d) + 100, normal(k, d, seed=1) + 100),
    "offset 1e6": lambda n, k, d: (normal(n, d) + 1e6, normal(k, d, seed=1) + 1e6),
    "offset of one side": lambda n, k, d: (normal(n, d) + 1e4, normal(k, d, seed=1)),
    "norms 1e18": lambda n, k, d: (normal(n, d) * 1e18, normal(k, d, seed=1) * 1e18),
    "norms 1e30": lambda n, k, d: (normal(n, d) * 1e30, normal(k, d, seed=1) * 1e30),
    "norms near the largest": lambda n, k, d: (
        normal(n, d).clamp(-1, 1) * _HUGE,
        normal(k, d, seed=1).clamp(-1, 1) * _HUGE,
    ),
    "norms 1e-20": lambda n, k, d: (normal(n, d) * 1e-20, normal(k, d, seed=1) * 1e-20),
    "norms 1e-30": lambda n, k, d: (normal(n, d) * 1e-30, normal(k, d, seed=1) * 1e-30),
    "denormals": lambda n, k, d: (normal(n, d) * 1e-41, normal(k, d, seed=1) * 1e-41),
    "huge vectors": lambda n, k, d: (normal(n, d) * 1e25, normal(k, d, seed=1)),
    "tiny vectors": lambda n, k, d: (normal(n, d) * 1e-25, normal(k, d, seed=1)),
    "mixed magnitudes of vectors": lambda n, k, d: (_scaled_rows(n, d, 0), normal(k, d, seed=1)),
    "mixed magnitudes": lambda n, k, d: (_scaled_rows(n, d, 0), _scaled_rows(k, d, 1)),
    "one outlier vector": lambda n, k, d: (_outlier_row(n, d, 1e8), normal(k, d, seed=1)),
    "one outlier code": lambda n, k, d: (normal(n, d), _outlier_code(k, d, 1e8)),
    "one moderate outlier code": lambda n, k, d: (normal(n, d), _outlier_code(k, d, 300)),
    "one outlier dimension": lambda n, k, d: (
        normal(n, d) * _one_dimension(d, 1e6),
        normal(k, d, seed=1) * _one_dimension(d, 1e6),
    ),
    "magnitudes within a vector": lambda n, k, d: (
        normal(n, d) * _magnitudes(d),
        normal(k, d, seed=1) * _magnitudes(d),
    ),
    "a large denormal offset": lambda n, k, d: (
        normal(n, d) * 1e-41 + _one_dimension(d, 1e5),
        normal(k, d, seed=1) * 1e-41 + _one_dimension(d, 1e5),
    ),
    "codes that differ in the ninth bit": lambda n, k, d: (
        1 + _lattice(n, d, 0) * 2**-9,
        1 + _lattice(k, d, 1) * 2**-9,
    ),
    "small differences from a large vector": lambda n, k, d: (
        1e3 * normal(1, d) + normal(n, d),
        1e-3 * normal(k, d, seed=1),
    ),
    "codes that differ in the last bit": lambda n, k, d: (normal(n, d), _last_bits(k, d, 1.0)),
    "vectors among such codes": lambda n, k, d: (
        _last_bits(n + 7, d, 1.0)[:n],
        _last_bits(k, d, 1.0),
    ),
    "two far clusters of such codes": _two_far_clusters,
    "all codes equal": lambda n, k, d: (normal(n, d), _ones(k, d)),
    "all equal": lambda n, k, d: (_ones(n, d), _ones(k, d)),
    "all zero": lambda n, k, d: (0 * _ones(n, d), 0 * _ones(k, d)),
    "signed zeros": lambda n, k, d: (normal(n, d), -0.0 * _ones(k, d) * _lattice(k, 1, 1)),
    "zero vectors": lambda n, k, d: (normal(n, d) * _lattice(n, 1, 0), normal(k, d, seed=1)),
    "zero codes": lambda n, k, d: (normal(n, d), normal(k, d, seed=1) * _lattice(k, 1, 0)),
    "each code twice": lambda n, k, d: (normal(n, d), normal(k // 2, d, seed=1).repeat(2, 1)),
    "each code many times": lambda n, k, d: (normal(n, d), normal(5, d, seed=1).repeat(k // 5, 1)),
    "vectors are codes": lambda n, k, d: (normal(k, d, seed=1)[40:90], normal(k, d, seed=1)),
    "lattice": lambda n, k, d: (_lattice(n, d, 0), _lattice(k, d, 1)),
    "between lattice points": lambda n, k, d: (_lattice(n, d, 0) + 0.5, _lattice(k, d, 1)),
    "lattice far away": lambda n, k, d: (_lattice(n, d, 0) + 4096, _lattice(k, d, 1) + 4096),
    "mirrored codes": lambda n, k, d: (
        0 * normal(n, d),
        torch.cat([normal(k // 2, d, seed=1), -normal(k // 2, d, seed=1)]),
    ),
    "tight clusters": lambda n, k, d: clusters(n, k, d, spread=1e-2),
    "very tight clusters": lambda n, k, d: clusters(n, k, d, spread=1e-5),
    "loose clusters": lambda n, k, d: clusters(n, k, d, spread=0.3),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
def test_hard_data(backend, name, metric):
    for d in (3, 16, 37):
        x, codebook = HARD[name](50, 130, d)
        check(backend, x, codebook, metric)
        check(backend, x[:3], codebook, metric)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_more_hard_data(backend, name):
    """Enough of it that grouping the codes can pay."""
    for d in (5, 24, 65):
        check(backend, *HARD[name](1700, 700, d))


@pytest.mark.parametrize("name", HARD)
def test_hard_data_in_float64(backend, name):
    x, codebook = HARD[name](50, 130, 9)
    jitter = 1 + 1e-12 * normal(*codebook.shape, seed=9, dtype=torch.float64)
    check(backend, x.double(), codebook.double() * jitter)
    check(backend, x, codebook.double() * jitter)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e150, 1e-150, 1e60, 1e-60, 1e-310])
def test_float64_beyond_float32(backend, scale, metric):
    x = normal(50, 9, dtype=torch.float64) * scale
    codebook = normal(130, 9, seed=1, dtype=torch.float64) * scale
    check(backend, x, codebook, metric)
    check(backend, normal(50, 9), codebook, metric)
    check(backend, x, normal(130, 9), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(backend, value, metric):
    for d in (3, 16, 37):
        x, codebook = normal(50, d), normal(130, d, seed=1)
        bad_x, bad_codebook = x.clone(), codebook.clone()
        bad_x[[3, 17, 49], d // 2] = value
        bad_codebook[[5, 100, 129], d // 2] = value
        for n in (50, 4):
            check(backend, bad_x[:n], codebook, metric)
            check(backend, x[:n], bad_codebook, metric)
            check(backend, bad_x[:n], bad_codebook, metric)
        check(backend, torch.full_like(x, value), codebook, metric)
        check(backend, x, torch.full_like(codebook, value), metric)


def test_nan_row_gets_the_first_index_and_nan(backend):
    x = normal(20, 8).to(device_of(backend))
    x[11, 3] = math.nan
    with mmfast.use_backend(backend):
        indices, distances = mmfast.nearest_code(x, normal(30, 8, seed=1).to(x.device))
    assert indices[11] == 0
    assert distances.isnan().nonzero().flatten().tolist() == [11]


def test_lowest_index_on_ties(backend):
    codebook = torch.tensor([[5.0], [1.0], [-1.0], [1.0]]).repeat(40, 3)
    x = torch.zeros(30, 3)
    x[15:] = 1.0
    device = device_of(backend)
    with mmfast.use_backend(backend):
        indices, distances = mmfast.nearest_code(x.to(device), codebook.to(device))
    assert indices.unique().tolist() == [1]
    assert distances.tolist() == [3.0] * 15 + [0.0] * 15


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_clustered_data(backend, spread, dtype):
    for d in (8, 48):
        x, codebook = (t.to(dtype) for t in clusters(2000, 600, d, spread))
        check(backend, x, codebook)
        check(backend, x + 100, codebook + 100)
        if spread == 0.1:
            check(backend, VIEWS["stepped"](x), VIEWS["transposed"](codebook))


def along_a_line(d: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """2000 vectors and 600 codes, whose groups are long and thin."""
    direction = normal(1, d, seed=2)
    codes = normal(600, 1, seed=1).cumsum(0) * direction + 1e-3 * normal(600, d, seed=3)
    vectors = codes[torch.arange(2000) % 600] + 0.3 * normal(2000, 1) * direction
    return vectors * scale, codes * scale


@pytest.mark.parametrize("scale", [1.0, 1e12, 1e-14, 1e-17])
@pytest.mark.parametrize("d", [1, 3, 7, 9, 48])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_data_along_a_line(backend, d, scale):
    x, codebook = along_a_line(d, scale)
    check(backend, x, codebook)
    check(backend, x + 100 * scale, codebook + 100 * scale)
    codebook[13] *= 1e6  # whose group is a box as long as all others together
    x[7] *= 1e7
    check(backend, x, codebook)
    check(backend, x.double(), (codebook / codebook.abs().max()).round(decimals=1).double())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_clustered_data_with_nan_and_infinity(backend, value):
    x, codebook = clusters(2000, 600, 12, 1e-2)
    bad_x, bad_codebook = x.clone(), codebook.clone()
    bad_x[[0, 777, 1999], [0, 5, 11]] = value
    bad_codebook[[100, 599], [3, 11]] = value
    check(backend, bad_x, codebook)
    check(backend, x, bad_codebook)
    check(backend, bad_x, bad_codebook)


@st.composite
def problems(draw):
    """Vectors and codes of any dtypes, strides, magnitudes and shapes."""
    n, k = draw(st.integers(0, 70)), draw(st.integers(1, 140))
    d = draw(st.one_of(st.integers(1, 20), st.sampled_from([33, 64, 65, 129])))
    kinds = st.sampled_from(["normal", "lattice", "few values", "copies"])
    dtypes = st.sampled_from(FLOATING)

    def tensor(rows: int, seed: int) -> torch.Tensor:
        kind, dtype = draw(kinds), draw(dtypes)
        base = normal(rows, d, seed=seed, dtype=torch.float64)
        if kind == "lattice":
            base = base.round()
        elif kind == "few values":
            base = torch.where(base > 0, 1.0, 1.0 + draw(st.sampled_from([2**-10, 2**-23, 2**-52])))
        elif kind == "copies" and rows:
            base = base[torch.arange(rows) // 3]
        limit = 3 if dtype == torch.float16 else 12
        base = base * 10.0 ** draw(st.integers(-limit, limit)) + draw(st.sampled_from([0.0, 50.0]))
        view = VIEWS[draw(st.sampled_from(list(VIEWS)))] if rows else VIEWS["contiguous"]
        return view(base.to(dtype))

    seed = draw(st.integers(0, 2**16))
    return tensor(n, seed), tensor(k, seed + 1), draw(st.sampled_from(METRICS))


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=200)
@given(problem=problems())
def test_any_problem(name, problem):
    check(name, *problem)
