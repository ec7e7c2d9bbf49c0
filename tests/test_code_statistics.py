"""code_statistics on every backend against sums made in numpy."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import VIEWS, backends_here, device_of, normal
from hypothesis import given, settings
from torch import Tensor

import mmfast
from mmfast.checks import FLOATING
from mmfast.ops.code_statistics import OP

BACKENDS = backends_here(OP)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of a backend that can run here."""
    return request.param


def random_indices(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))


def sums_of(x: np.ndarray, indices: np.ndarray, num_codes: int, weights: np.ndarray):
    """Counts and sums of one head in float64, and the sizes of what was summed."""
    inside = (indices >= 0) & (indices < num_codes)
    indices, weights, x = indices[inside], weights[inside], x[inside]
    counts, sums = np.zeros(num_codes), np.zeros((num_codes, x.shape[1]))
    with np.errstate(all="ignore"):
        weighted = x * weights[:, None]
        np.add.at(counts, indices, weights)
        np.add.at(sums, indices, weighted)
        sizes = np.zeros(num_codes), np.zeros_like(sums)
        np.add.at(sizes[0], indices, np.abs(weights))
        np.add.at(sizes[1], indices, np.abs(weighted))
    return (counts, sums), sizes


def check(backend: str, x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None = None):
    """``backend`` gives the sums that numpy gives."""
    device = device_of(backend)
    there = [None if t is None else t.to(device) for t in (x, indices, weights)]
    with mmfast.use_backend(backend):
        got = mmfast.code_statistics(there[0], there[1], num_codes, weights=there[2])
    wide = x.dtype == torch.float64 or (weights is not None and weights.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    ones = torch.ones(indices.shape) if weights is None else weights
    arrays = x.double().numpy(), indices.numpy(), ones.double().numpy()
    if x.dim() == 2:
        expected, sizes = sums_of(arrays[0], arrays[1], num_codes, arrays[2])
    else:
        heads = [sums_of(a, i, num_codes, w) for a, i, w in zip(*arrays, strict=True)]
        expected, sizes = (
            tuple(np.stack([head[which][part] for head in heads]) for part in range(2))
            for which in range(2)
        )
    for name, tensor, want, size in zip(("counts", "sums"), got, expected, sizes, strict=True):
        assert tensor.dtype == dtype
        assert tensor.shape == want.shape, name
        with np.errstate(all="ignore"):
            # float64 sums of up to N terms in any order, rounded to the output's dtype once.
            tolerance = torch.finfo(dtype).eps * np.abs(want) + 2.0**-52 * x.shape[-2] * size
            rounded = torch.from_numpy(want).to(dtype).double().numpy()
            values = tensor.cpu().double().numpy()
            same = (np.abs(values - rounded) <= tolerance) | (values == rounded)
        same |= np.isnan(values) & np.isnan(rounded)
        assert same.all(), f"{(~same).sum()} {name} are wrong"


@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 16, 33, 64, 257])
@pytest.mark.parametrize("n", [0, 1, 2, 31, 300])
def test_sizes(backend, n, d):
    for k in (1, 2, 65, 1000):
        check(backend, normal(n, d), random_indices(n, k), k)


@pytest.mark.parametrize("weights", [None, *FLOATING], ids=str)
@pytest.mark.parametrize("vectors", FLOATING, ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_dtypes(backend, index, vectors, weights):
    weight = None if weights is None else normal(150, seed=2, dtype=weights)
    x = normal(150, 9, dtype=vectors)
    check(backend, x, random_indices(150, 17).to(index), 17, weight)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(backend, view):
    x = VIEWS[view](normal(70, 9))
    indices = random_indices(140, 17).view(70, 2).T[1]
    check(backend, x, indices, 17)
    check(backend, x, indices, 17, normal(70, 3, seed=2)[:, 1])
    check(backend, x, indices[:1].expand(70), 17, normal(1, seed=2).expand(70))


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_heads(backend, index):
    x = normal(3, 70, 9)
    indices = random_indices(210, 17).view(3, 70).to(index)
    weights = normal(3, 70, seed=2)
    check(backend, x, indices, 17)
    check(backend, x, indices, 17, weights)
    check(backend, x.transpose(0, 1).contiguous().transpose(0, 1), indices.mT.contiguous().mT, 17)
    check(backend, x[:1].expand(3, 70, 9), indices, 17, weights[:1].expand(3, 70))
    check(backend, x[:, :0], indices[:, :0], 17)


def test_no_heads(backend):
    device = device_of(backend)
    x = torch.zeros(0, 5, 3, device=device)
    with mmfast.use_backend(backend):
        result = mmfast.code_statistics(x, torch.zeros(0, 5, dtype=torch.int64, device=device), 7)
    assert [tuple(r.shape) for r in result] == [(0, 7), (0, 7, 3)]


def test_indices_out_of_range_are_left_out(backend):
    indices = random_indices(64, 10)
    indices[::4] = torch.tensor([-1, 10, 2**31, 2**32, 2**32 + 3, 2**62, -(2**32), -(2**63)] * 2)
    x = normal(64, 5)
    x[::4] = torch.nan
    check(backend, x, indices, 10)
    check(backend, x, torch.full((64,), -1), 10)
    check(backend, x, torch.tensor([10, -1, 2**31 - 1, -(2**31)] * 16, dtype=torch.int32), 10)


def test_nan_and_infinity_stay_with_their_code(backend):
    x, weights = normal(60, 4), normal(60, seed=2)
    x[3, 1], x[7, 2], x[8, 2] = torch.nan, torch.inf, -torch.inf
    weights[11] = torch.nan
    check(backend, x, torch.arange(60) // 4, 15)
    check(backend, x, torch.arange(60) // 4, 15, weights)


def test_no_loss_in_long_sums(backend):
    # In float32 the sum would stay at 2^24, and the small terms of the second code would vanish.
    x = torch.ones(2**12, 1).repeat(2, 1)
    x[0] = 2.0**24
    x[2**12 :] *= 2.0**-30
    x[2**12] = 1.0
    check(backend, x, torch.arange(2**13) // 2**12, 2)


@st.composite
def problems(draw):
    """Vectors, indices and weights of any dtypes and strides."""
    n, d, k = draw(st.integers(0, 80)), draw(st.integers(1, 40)), draw(st.integers(1, 50))
    seed = draw(st.integers(0, 2**16))
    scale = 10.0 ** draw(st.integers(-3, 3))
    view = VIEWS[draw(st.sampled_from(list(VIEWS)))] if n else VIEWS["contiguous"]
    x = view(normal(n, d, seed=seed, dtype=torch.float64).mul(scale).to(draw(dtypes)))
    indices = random_indices(n, k + 2, seed) - 1
    weighted = draw(st.booleans())
    weights = normal(n, seed=seed + 1, dtype=draw(dtypes)) if weighted else None
    return x, indices.to(draw(st.sampled_from([torch.int32, torch.int64]))), k, weights


dtypes = st.sampled_from(FLOATING)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=100)
@given(problem=problems())
def test_any_problem(name, problem):
    check(name, *problem)
