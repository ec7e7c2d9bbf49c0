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


def _outlier_row(d: int, factor: float) -> torch.Tensor:
    x = normal(50, d)
    x[7] *= factor
    return x


def _outlier_code(d: int, factor: float) -> torch.Tensor:
    codebook = normal(130, d, seed=1)
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


def _lattice(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def _two_far_clusters(d: int):
    codebook = torch.cat([_last_bits(65, d, 1000.0), _last_bits(65, d, -1000.0)])
    x = torch.cat([codebook[::3], codebook[::3] + 0.01 * normal(44, d), normal(6, d)])
    return x, codebook


_HUGE = torch.finfo(torch.float32).max / 4

# name: (D) -> vectors and codes
HARD = {
    "offset 100": lambda d: (normal(50, d) + 100, normal(130, d, seed=1) + 100),
    "offset 1e6": lambda d: (normal(50, d) + 1e6, normal(130, d, seed=1) + 1e6),
    "offset of one side": lambda d: (normal(50, d) + 1e4, normal(130, d, seed=1)),
    "norms 1e18": lambda d: (normal(50, d) * 1e18, normal(130, d, seed=1) * 1e18),
    "norms 1e30": lambda d: (normal(50, d) * 1e30, normal(130, d, seed=1) * 1e30),
    "norms near the largest": lambda d: (
        normal(50, d).clamp(-1, 1) * _HUGE,
        normal(130, d, seed=1).clamp(-1, 1) * _HUGE,
    ),
    "norms 1e-20": lambda d: (normal(50, d) * 1e-20, normal(130, d, seed=1) * 1e-20),
    "norms 1e-30": lambda d: (normal(50, d) * 1e-30, normal(130, d, seed=1) * 1e-30),
    "denormals": lambda d: (normal(50, d) * 1e-41, normal(130, d, seed=1) * 1e-41),
    "huge vectors": lambda d: (normal(50, d) * 1e25, normal(130, d, seed=1)),
    "tiny vectors": lambda d: (normal(50, d) * 1e-25, normal(130, d, seed=1)),
    "mixed magnitudes of vectors": lambda d: (_scaled_rows(50, d, 0), normal(130, d, seed=1)),
    "mixed magnitudes": lambda d: (_scaled_rows(50, d, 0), _scaled_rows(130, d, 1)),
    "one outlier vector": lambda d: (_outlier_row(d, 1e8), normal(130, d, seed=1)),
    "one outlier code": lambda d: (normal(50, d), _outlier_code(d, 1e8)),
    "one moderate outlier code": lambda d: (normal(50, d), _outlier_code(d, 300)),
    "one outlier dimension": lambda d: (
        normal(50, d) * _one_dimension(d, 1e6),
        normal(130, d, seed=1) * _one_dimension(d, 1e6),
    ),
    "codes that differ in the last bit": lambda d: (normal(50, d), _last_bits(130, d, 1.0)),
    "vectors among such codes": lambda d: (_last_bits(150, d, 1.0)[:50], _last_bits(130, d, 1.0)),
    "two far clusters of such codes": _two_far_clusters,
    "all codes equal": lambda d: (normal(50, d), _ones(130, d)),
    "all equal": lambda d: (_ones(50, d), _ones(130, d)),
    "all zero": lambda d: (0 * _ones(50, d), 0 * _ones(130, d)),
    "signed zeros": lambda d: (normal(50, d), -0.0 * _ones(130, d) * _lattice(130, 1, 1)),
    "zero vectors": lambda d: (normal(50, d) * _lattice(50, 1, 0), normal(130, d, seed=1)),
    "zero codes": lambda d: (normal(50, d), normal(130, d, seed=1) * _lattice(130, 1, 0)),
    "each code twice": lambda d: (normal(50, d), normal(65, d, seed=1).repeat(2, 1)),
    "each code many times": lambda d: (normal(50, d), normal(5, d, seed=1).repeat(26, 1)),
    "vectors are codes": lambda d: (normal(130, d, seed=1)[40:90], normal(130, d, seed=1)),
    "lattice": lambda d: (_lattice(50, d, 0), _lattice(130, d, 1)),
    "between lattice points": lambda d: (_lattice(50, d, 0) + 0.5, _lattice(130, d, 1)),
    "lattice far away": lambda d: (_lattice(50, d, 0) + 4096, _lattice(130, d, 1) + 4096),
    "mirrored codes": lambda d: (
        0 * normal(50, d),
        torch.cat([normal(65, d, seed=1), -normal(65, d, seed=1)]),
    ),
    "tight clusters": lambda d: clusters(60, 200, d, spread=1e-2),
    "very tight clusters": lambda d: clusters(60, 200, d, spread=1e-5),
    "loose clusters": lambda d: clusters(60, 200, d, spread=0.3),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
def test_hard_data(backend, name, metric):
    for d in (3, 16, 37):
        x, codebook = HARD[name](d)
        check(backend, x, codebook, metric)
        check(backend, x[:3], codebook, metric)


@pytest.mark.parametrize("name", HARD)
def test_hard_data_in_float64(backend, name):
    x, codebook = HARD[name](9)
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


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("d", [8, 48])
def test_clustered_data(backend, d, spread):
    x, codebook = clusters(1000, 600, d, spread)
    check(backend, x, codebook)
    check(backend, x + 100, codebook + 100)


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
