"""The same bits for any number of threads, and for any split of a batch."""

from __future__ import annotations

import pytest
import torch
from cases import METRICS, backends_here, device_of, normal
from test_nearest_code import HARD, clusters

import mmfast
from mmfast.ops import code_statistics, ema_update, nearest_code, vector_quantize


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
    return (
        t.contiguous()
        .view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()])
        .cpu()
    )


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


def step(x, codebook, metric="euclidean", mask=None):
    """All outputs and gradients of vector_quantize."""
    a, b = (t.detach().requires_grad_() for t in (x, codebook))
    result = mmfast.vector_quantize(a, b, metric=metric, gradient="rotation", mask=mask)
    loss = result.quantized.square().sum() + result.commitment_loss + result.codebook_loss
    return *(t.detach() for t in result), *torch.autograd.grad(loss, (a, b))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("backend", backends_here(vector_quantize.OP))
def test_vector_quantize_threads(backend, metric, threads):
    device = device_of(backend)
    x, codebook = normal(1500, 24).to(device), normal(100, 24, seed=1).to(device)
    mask = (normal(1500, seed=2) < 0.5).to(device)
    for inside in (None, mask):
        with mmfast.use_backend(backend):
            many = step(x, codebook, metric, inside)
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            one = step(x, codebook, metric, inside)
            torch.set_num_threads(before)
        assert_same_bits(many, one)


@pytest.mark.parametrize("backend", backends_here(vector_quantize.OP))
def test_vector_quantize_rows_are_independent(backend):
    device = device_of(backend)
    x, codebook = normal(2, 700, 24).to(device), normal(2, 90, 24, seed=1).to(device)
    mask = (normal(2, 700, seed=2) < 0.5).to(device)
    with mmfast.use_backend(backend):
        together = mmfast.vector_quantize(x, codebook)
        for head in range(2):
            alone = mmfast.vector_quantize(x[head], codebook[head])
            assert_same_bits(alone, [t[head] for t in together])
        part = mmfast.vector_quantize(x[:, 300:407], codebook)
        assert_same_bits(part[:2], [t[:, 300:407] for t in together[:2]])
        masked = mmfast.vector_quantize(x, codebook, mask=mask)
        assert_same_bits([t[mask] for t in masked[:2]], [t[mask] for t in together[:2]])


@pytest.mark.parametrize("backend", backends_here(ema_update.OP))
def test_ema_update_threads(backend, threads):
    sample = next(s for s in ema_update.samples() if s.name == "k8192_d32")
    arguments = sample.make(device_of(backend), torch.float32, 0)
    run = mmfast.backends.select(ema_update.OP, backend, *arguments)
    many = ema_update.OP.result(run, arguments)
    torch.set_num_threads(1)
    assert_same_bits(many, ema_update.OP.result(run, arguments))
