"""k-means: the steps of Lloyd's algorithm, seeding, empty codes, determinism, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.ops.kmeans import METRICS, _plus_plus

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def clusters(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """``n`` vectors around a few centres, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(7, d, generator=generator, dtype=torch.float64) + 1
    owner = torch.randint(7, (n,), generator=generator)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (centres[owner] + noise).to(dtype)


def same(a: mmfast.KMeansResult, b: mmfast.KMeansResult) -> bool:
    """Equal bits."""
    tensors = zip(a[:3], b[:3], strict=True)
    return all(torch.equal(p, q) for p, q in tensors) and a.iterations == b.iterations


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_steps_equal_scikit_learns(steps):
    cluster = pytest.importorskip("sklearn.cluster")
    x = clusters(900, 5, dtype=torch.float64)
    init = x[::60].clone()
    result = mmfast.kmeans(x, len(init), iterations=steps, init=init, tolerance=0)
    peer = cluster.KMeans(len(init), init=init.numpy(), n_init=1, max_iter=steps, tol=0)
    peer.fit(x.numpy())
    np.testing.assert_allclose(result.codebook.numpy(), peer.cluster_centers_, rtol=1e-12)
    np.testing.assert_array_equal(result.indices.numpy(), peer.labels_)
    assert float(result.inertia) == pytest.approx(peer.inertia_, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indices_and_inertia_belong_to_the_codebook(metric, dtype):
    x = clusters(700, 6, dtype=dtype)
    result = mmfast.kmeans(x, 30, metric=metric, iterations=4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.codebook.shape == (30, 6)
    assert result.codebook.dtype == wide
    assert result.inertia.dtype == torch.float64
    assert result.inertia.shape == ()
    indices, distances = mmfast.nearest_code(x, result.codebook, metric=metric)
    assert torch.equal(result.indices, indices)
    costs = distances.double() if metric == "euclidean" else 1 - distances.double()
    assert float(result.inertia) == pytest.approx(float(costs.sum()), rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "many-equal"])
def test_inertia_never_rises(metric, init, crowded):
    x = clusters(500, 3, dtype=torch.float64)
    if crowded:  # so that codes coincide, and turn up empty
        x[100:] = x[:4].repeat(100, 1)
    inertia = [
        float(mmfast.kmeans(x, 40, metric=metric, init=init, iterations=i, tolerance=0).inertia)
        for i in range(10)
    ]
    assert inertia[-1] < 0.99 * inertia[0]
    for before, after in itertools.pairwise(inertia):
        assert after <= before * (1 + 1e-12)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_the_same_bits_for_any_number_of_threads(init):
    x = clusters(100_003, 3)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(mmfast.kmeans(x, 20, init=init, iterations=3, seed=5))
    torch.set_num_threads(before)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_the_seed_alone_decides(init):
    x = clusters(400, 4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = mmfast.kmeans(x, 20, init=init, seed=3, iterations=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, mmfast.kmeans(x, 20, init=init, seed=3, iterations=2))
    assert not same(first, mmfast.kmeans(x, 20, init=init, seed=4, iterations=2))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_a_head_gets_what_it_gets_alone(metric, init):
    # Of different difficulty, so that the heads converge after different numbers of iterations.
    x = torch.stack([clusters(300, 4, seed=1), clusters(300, 4, seed=2).round(), clusters(300, 4)])
    result = mmfast.kmeans(x, 12, metric=metric, init=init, iterations=50, tolerance=1e-3)
    alone = [
        mmfast.kmeans(head, 12, metric=metric, init=init, iterations=50, tolerance=1e-3)
        for head in x
    ]
    assert len({one.iterations for one in alone}) > 1
    assert result.iterations == max(one.iterations for one in alone)
    for h, one in enumerate(alone):
        assert torch.equal(result.codebook[h], one.codebook)
        assert torch.equal(result.indices[h], one.indices)
        assert torch.equal(result.inertia[h], one.inertia)


def test_empty_codes_take_the_farthest_vectors():
    x = torch.tensor([[0.0], [1.0], [2.0], [20.0], [7.0], [7.0], [50.0]])
    init = torch.tensor([[1.0], [900.0], [50.0], [901.0]])
    result = mmfast.kmeans(x, 4, init=init, iterations=1)
    # All but 50 belong to code 0, and 50 is at code 2. The farthest is 20; of the two 7s, which
    # come next and are equal, one is taken.
    expected = torch.tensor([[37 / 6], [20.0], [50.0], [7.0]])
    assert torch.allclose(result.codebook, expected)


def test_the_only_vector_of_a_code_stays():
    x = torch.tensor([[0.0], [1.0], [20.0], [1000.0]])
    init = torch.tensor([[0.0], [500.0], [-9.0]])
    result = mmfast.kmeans(x, 3, init=init, iterations=1)
    assert torch.equal(result.codebook, torch.tensor([[7.0], [1000.0], [20.0]]))


def test_equal_initial_codes_part():
    x = clusters(300, 4)
    result = mmfast.kmeans(x, 16, init=torch.zeros(16, 4), iterations=60, tolerance=0)
    assert len(result.codebook.unique(dim=0)) == 16
    assert result.indices.bincount(minlength=16).min() > 0
    assert float(result.inertia) < 0.5 * float(mmfast.kmeans(x, 1).inertia)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_fewer_different_vectors_than_codes(init):
    x = clusters(3, 2).round().repeat(20, 1)  # their means have no rounding
    result = mmfast.kmeans(x, 7, init=init, iterations=5, tolerance=0)
    assert float(result.inertia) == 0
    assert torch.equal(result.codebook[result.indices], x)
    assert bool(result.codebook.isfinite().all())


def test_as_many_codes_as_vectors():
    x = clusters(50, 3)
    result = mmfast.kmeans(x, 50)
    assert float(result.inertia) == 0
    assert torch.equal(result.indices.sort().values, torch.arange(50))


def test_plus_plus_draws_from_its_distribution():
    # Four codes are drawn as 1, 1 and 2, the last two from stale distances.
    x = torch.tensor([[0.0, 0], [1, 0], [1, 1], [4, 0], [4, 1], [9, 5]], dtype=torch.float64)
    between = torch.cdist(x, x).square().numpy()
    expected: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(x)), 4):
        chance = 1 / len(x)
        for i in range(1, 4):
            left = between[list(order[:i])].min(0)
            chance *= left[order[i]] / left.sum()
        key = tuple(sorted(order))
        expected[key] = expected.get(key, 0) + chance
    generator = torch.Generator().manual_seed(0)
    rounds = 3000
    seen = dict.fromkeys(expected, 0)
    for _ in range(rounds):
        seen[tuple(sorted(_plus_plus(x, x, 4, generator, "euclidean").tolist()))] += 1
    chi2 = sum((seen[k] - rounds * p) ** 2 / (rounds * p) for k, p in expected.items())
    assert sum(expected.values()) == pytest.approx(1)
    assert chi2 < 42.6  # one in ten thousand, at 14 degrees of freedom


def test_plus_plus_beats_random_on_clusters():
    x = torch.cat([clusters(2000, 4), 200 + clusters(20, 4), -200 + clusters(20, 4, seed=1)])
    seeded = mmfast.kmeans(x, 64, iterations=0)
    assert float(seeded.inertia) < float(mmfast.kmeans(x, 64, iterations=0, init="random").inertia)
    assert len(seeded.codebook.unique(dim=0)) == 64


def test_cosine_codes_are_normalised_means():
    x = clusters(200, 5, dtype=torch.float64)
    x[3] = 0
    init = x[10:18].clone()
    result = mmfast.kmeans(x, 8, metric="cosine", init=init, iterations=1)
    unit = torch.nn.functional.normalize(x, dim=1)
    owner, _ = mmfast.nearest_code(x, init, metric="cosine")
    for k in range(8):
        mean = unit[owner == k].mean(0)
        assert torch.allclose(result.codebook[k], mean / mean.norm(), rtol=1e-12, atol=1e-12)
    assert float(result.inertia) == pytest.approx(
        float((1 - unit @ result.codebook.T).amin(1).sum()), rel=1e-12
    )


def test_cosine_ignores_lengths_and_zero_vectors():
    x = clusters(200, 5)
    x[::7] = 0
    scales = torch.logspace(-18, 14, 200)[:, None]
    result = mmfast.kmeans(x * scales, 20, metric="cosine", iterations=5)
    assert torch.allclose(result.codebook.norm(dim=1), torch.ones(20))
    plain = mmfast.kmeans(x, 20, metric="cosine", iterations=5)
    assert float(result.inertia) == pytest.approx(float(plain.inertia), rel=0.1)
    everything_zero = mmfast.kmeans(torch.zeros(10, 3), 2, metric="cosine", iterations=2)
    assert float(everything_zero.inertia) == 10


def test_opposite_vectors_leave_their_code():
    x = torch.tensor([[1.0, 0], [-1.0, 0]])
    init = torch.tensor([[0.0, 1.0]])
    result = mmfast.kmeans(x, 1, metric="cosine", init=init, iterations=1)
    assert torch.equal(result.codebook, init)


def test_tolerance_is_the_relative_decrease():
    x = clusters(500, 3)
    path = [float(mmfast.kmeans(x, 9, iterations=i, tolerance=0).inertia) for i in range(30)]
    decrease = [(a - b) / a for a, b in itertools.pairwise(path)]
    for tolerance in (1e-1, 1e-2, 1e-3):
        expected = next(i for i, change in enumerate(decrease) if change <= tolerance) + 1
        result = mmfast.kmeans(x, 9, iterations=30, tolerance=tolerance)
        assert result.iterations == expected
        assert float(result.inertia) == path[expected]
    assert mmfast.kmeans(x, 9, iterations=60, tolerance=0).iterations == 60


def test_no_iterations_keep_the_initial_codes():
    x = clusters(60, 3)
    result = mmfast.kmeans(x, 5, init=x[:5], iterations=0)
    assert result.iterations == 0
    assert torch.equal(result.codebook, x[:5])
    chosen = mmfast.kmeans(x, 5, init="random", iterations=0).codebook
    assert bool((chosen[:, None] == x).all(2).any(1).all())
    assert len(chosen.unique(dim=0)) == 5


def test_inputs_stay_as_they_are_and_strides_do_not_matter():
    x = clusters(90, 6).T.contiguous().T.requires_grad_()
    init = x[:4].detach().clone()
    before = x.detach().clone(), init.clone()
    result = mmfast.kmeans(x, 4, init=init)
    assert torch.equal(x, before[0])
    assert torch.equal(init, before[1])
    assert not result.codebook.requires_grad
    assert same(result, mmfast.kmeans(x.detach().contiguous(), 4, init=init))


def test_progress_goes_to_stderr(capsys):
    result = mmfast.kmeans(clusters(60, 3), 5, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{float(result.inertia):.6g}" in printed.err
    assert f"{result.iterations}/" in printed.err


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refuses_what_is_not_finite(bad, dtype):
    x = clusters(30, 3, dtype=dtype)
    x[17, 1] = bad
    with pytest.raises(ValueError, match="x must be finite"):
        mmfast.kmeans(x, 3)
    with pytest.raises(ValueError, match="init must be finite"):
        mmfast.kmeans(clusters(30, 3, dtype=dtype), 3, init=x[16:19])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(9, 3, dtype=torch.int64)}, TypeError, "x must be float32.*got int64"),
        ({"x": torch.zeros(9)}, ValueError, r"x must be \(N, D\) or \(H, N, D\).*\(9,\)"),
        ({"x": torch.zeros(9, 0)}, ValueError, r"D at least 1, got shape \(9, 0\)"),
        ({"x": torch.zeros(0, 9, 3)}, ValueError, r"H and D at least 1, got shape \(0, 9, 3\)"),
        ({"x": torch.full((9, 3), 1e19)}, ValueError, "within 2.66e.18 of 0.*got 1e.19"),
        ({"num_codes": 10}, ValueError, "N = 9, got 10"),
        ({"num_codes": 0}, ValueError, "from 1 to .*got 0"),
        ({"num_codes": 2.0}, TypeError, "num_codes must be an int, got float"),
        ({"iterations": 1.5}, TypeError, "iterations must be an int, got float"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"seed": 1 << 64}, ValueError, "seed must have at most 64 bits, got 18446744073709551616"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
        ({"tolerance": -1e-3}, ValueError, "tolerance must be .*got -0.001"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be finite.*got nan"),
        ({"metric": "dot"}, ValueError, "'dot' has no k-means"),
        ({"metric": "l1"}, ValueError, "euclidean, cosine, got 'l1'"),
        ({"init": "zeros"}, ValueError, "init must be one of k-means.*, random, or a tensor"),
        ({"init": torch.zeros(3, 3)}, ValueError, r"init must have shape \(2, 3\), got \(3, 3\)"),
        ({"init": torch.zeros(2, 3).int()}, TypeError, "init must be float32.*got int32"),
        ({"init": torch.zeros(2, 3, device="meta")}, ValueError, "x on cpu, init on meta"),
    ],
)
def test_refuses(changes, error, message):
    arguments = {"x": clusters(9, 3), "num_codes": 2, **changes}
    with pytest.raises(error, match=message):
        mmfast.kmeans(arguments.pop("x"), arguments.pop("num_codes"), **arguments)


@pytest.mark.cuda
def test_cuda_steps_equal_the_cpus():
    x = clusters(5000, 8, dtype=torch.float64)
    init = x[::250].clone()
    here = mmfast.kmeans(x, len(init), init=init, iterations=5, tolerance=0)
    there = mmfast.kmeans(x.cuda(), len(init), init=init.cuda(), iterations=5, tolerance=0)
    assert torch.allclose(there.codebook.cpu(), here.codebook, rtol=1e-10, atol=0)
    assert torch.equal(there.indices.cpu(), here.indices)


@pytest.mark.cuda
def test_cuda_reads_nothing_back_between_iterations(monkeypatch):
    pytest.importorskip("triton")
    x = clusters(5000, 8).cuda()
    init = torch.zeros(40, 8, device="cuda")  # so that empty codes are moved
    mmfast.kmeans(x, 40, init=init, iterations=2, tolerance=0)
    monkeypatch.setattr("mmfast.ops.kmeans._check", lambda *_: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mmfast.kmeans(x, 40, init=init, iterations=3, tolerance=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
