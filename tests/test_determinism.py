"""The same bits for any number of threads, and for any split of a batch."""

from __future__ import annotations

import pytest
import torch
from cases import METRICS, backends_here, device_of, normal
from test_nearest_code import HARD, clusters

import mmfast
from mmfast.ops import code_statistics, nearest_code


def problem(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors and codes; enough of them that threads and blocks of rows matter."""
    if name == "gaussian":
        return normal(1000, 24), normal(700, 24, seed=1)
    if name == "few dimensions":
        return normal(1000, 6), normal(700, 6, seed=1)
    if name == "clusters":
        return clusters(2000, 700, 24, spread=1e-2)
    return HARD[name](400, 130, 24)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The same number for the same bits only, NaN and zeros included."""
    return t.contiguous().view({8: torch.int64, 4: torch.int32}[t.element_size()]).cpu()


def assert_same_bits(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


PROBLEMS = ["gaussian", "few dimensions", "clusters", *HARD]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", backends_here(nearest_code.OP))
def test_nearest_code_batches(backend, name):
    x, codebook = (t.to(device_of(backend)) for t in problem(name))
    sizes = (60,) if backend == "reference" else (1, 5, 37, 200)
    for metric in METRICS:
        with mmfast.use_backend(backend):
            whole = mmfast.nearest_code(x, codebook, metric=metric)
            for size in sizes:
                rows = x[: 20 * size]
                parts = [
                    mmfast.nearest_code(part, codebook, metric=metric) for part in rows.split(size)
                ]
                joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
                assert_same_bits(joined, [t[: len(rows)] for t in whole])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", backends_here(nearest_code.OP))
def test_nearest_code_threads(backend, name, threads):
    x, codebook = (t.to(device_of(backend)) for t in problem(name))
    with mmfast.use_backend(backend):
        many = mmfast.nearest_code(x, codebook)
        torch.set_num_threads(1)
        one = mmfast.nearest_code(x, codebook)
    assert_same_bits(many, one)


@pytest.mark.parametrize("backend", backends_here(nearest_code.OP))
def test_nearest_code_heads_are_independent(backend):
    device = device_of(backend)
    x, codebook = normal(3, 200, 9).to(device), normal(3, 70, 9, seed=1).to(device)
    with mmfast.use_backend(backend):
        together = mmfast.nearest_code(x, codebook)
        for head in range(3):
            alone = mmfast.nearest_code(x[head], codebook[head])
            assert_same_bits(alone, [t[head] for t in together])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", backends_here(code_statistics.OP))
def test_code_statistics_threads(backend, weighted, threads):
    device = device_of(backend)
    x = (normal(5000, 24) * 10 ** normal(5000, 1, seed=3)).to(device)
    indices = torch.randint(300, (5000,), generator=torch.Generator().manual_seed(0)).to(device)
    indices[::2] = 7
    weights = normal(5000, seed=2).to(device) if weighted else None
    with mmfast.use_backend(backend):
        many = mmfast.code_statistics(x, indices, 300, weights=weights)
        torch.set_num_threads(1)
        one = mmfast.code_statistics(x, indices, 300, weights=weights)
    assert_same_bits(many, one)
