"""Lloyd's k-means on nearest_code and code_statistics."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfast.checks import check_device, check_floating, check_integer
from mmfast.ops.code_statistics import code_statistics
from mmfast.ops.nearest_code import nearest_code
from mmfast.progress import progress_bar

METRICS = ("euclidean", "cosine")
INITS = ("k-means++", "random")

# Codes that k-means++ draws between two looks at all vectors. The distances among these draws
# are the largest temporary of the seeding: 2 MB.
_MAX_DRAWS = 512

# Called with the iterations done and the inertia (H,) then.
_Report = Callable[[int, Tensor], None]


class KMeansResult(NamedTuple):
    """What :func:`kmeans` returns. ``indices`` and ``inertia`` belong to ``codebook``.

    Attributes:
        codebook: ``(K, D)`` or ``(H, K, D)``; float64 if x is, else float32.
        indices: the nearest code of each vector, ``(N,)`` or ``(H, N)``, int64.
        inertia: sum over the vectors of the squared distance to their code, or of 1 - cosine
            similarity; ``()`` or ``(H,)``, float64.
        iterations: updates of the codebook made; with heads, those of the head that took most.
    """

    codebook: Tensor
    indices: Tensor
    inertia: Tensor
    iterations: int


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_codes: int,
    *,
    iterations: int = 25,
    init: str | Tensor = "k-means++",
    seed: int = 0,
    tolerance: float = 1e-4,
    metric: str = "euclidean",
    progress: bool = False,
) -> KMeansResult:
    """A codebook for ``x`` by Lloyd's algorithm, with exact assignments.

    The same arguments give the same bits for any number of threads, and a head of a batch gets
    what it would get alone. torch's global random state is neither read nor changed.

    A code that no vector chooses is moved to a vector: the empty codes of an iteration take the
    vectors farthest from their codes, one each. Vectors that equal their code, or are their
    code's only one, stay; where only such are left, the code stays too.

    On CUDA, nothing is read back between iterations, so that they queue up, except by the
    convergence test (``tolerance`` > 0) and ``progress``. Checking ``x`` reads one number back,
    ``"k-means++"`` a few arrays.

    Args:
        x: vectors, ``(N, D)``, or ``(H, N, D)`` for H independent codebooks; float16, bfloat16,
            float32, float64; finite. Any strides.
        num_codes: K, from 1 to N.
        iterations: updates of the codebook at most; 0 assigns the vectors to the initial codes.
        init: ``"k-means++"``, ``"random"`` (K different vectors), or the initial codes,
            ``(K, D)`` or ``(H, K, D)`` as x has heads.
        seed: for ``init``; of at most 64 bits.
        tolerance: stop after the first iteration that lowers the inertia by at most this fraction
            of what it was. 0 makes every iteration, without the test.
        metric: ``"euclidean"``, or ``"cosine"`` for spherical k-means: the codes are the
            normalised means of the normalised vectors, of which a copy is kept. A zero vector
            has similarity 0 to all codes and moves none.
        progress: show a progress bar with the inertia, on stderr.

    Returns:
        :class:`KMeansResult`. Not differentiable.

    Raises:
        TypeError: an argument is no tensor, or has another dtype, or is no int.
        ValueError: shapes, devices or options do not fit; ``x`` or ``init`` has a NaN or an
            infinity, or numbers whose squared distances overflow the codebook's dtype.

    Source: Lloyd, "Least squares quantization in PCM" (1982); Arthur and Vassilvitskii,
    "k-means++: the advantages of careful seeding" (2007), drawn as :func:`_plus_plus` says;
    Dhillon and Modha, "Concept decompositions for large sparse text data using clustering"
    (2001) for the spherical variant.
    """
    _check(x, num_codes, iterations, init, seed, tolerance, metric)
    heads = x.dim() == 3
    vectors = x.detach() if heads else x.detach()[None]  # [H, N, D]
    points = vectors if metric == "euclidean" else _unit(vectors)  # [H, N, D], what is averaged
    with _reporter(progress, iterations) as report:
        codebook = _initial(vectors, points, num_codes, init, seed, metric)
        indices, distances = _assign(vectors, codebook, metric)
        inertia = _total(distances)
        settled = torch.zeros_like(inertia, dtype=torch.bool)  # [H]
        report(0, inertia)
        done = 0
        while done < iterations:
            updated = _update(points, codebook, indices, distances, metric)
            if tolerance > 0 and len(settled) > 1:
                updated = torch.where(settled[:, None, None], codebook, updated)
            codebook = updated
            indices, distances = _assign(vectors, codebook, metric)
            before, inertia = inertia, _total(distances)
            done += 1
            report(done, inertia)
            if tolerance > 0:
                settled |= before - inertia <= tolerance * before
                if bool(settled.all()):
                    break
    if heads:
        return KMeansResult(codebook, indices, inertia, done)
    return KMeansResult(codebook[0], indices[0], inertia[0], done)


def _check(
    x: Tensor,
    num_codes: int,
    iterations: int,
    init: str | Tensor,
    seed: int,
    tolerance: float,
    metric: str,
) -> None:
    check_floating("x", x)
    for name, value in (("num_codes", num_codes), ("iterations", iterations), ("seed", seed)):
        check_integer(name, value)
    if x.dim() not in (2, 3) or x.shape[-1] < 1 or x.shape[0] < 1:
        raise ValueError(
            f"x must be (N, D) or (H, N, D) with H and D at least 1, got shape {tuple(x.shape)}"
        )
    if not 1 <= num_codes <= x.shape[-2]:
        raise ValueError(
            f"num_codes must be from 1 to the number of vectors, N = {x.shape[-2]}, got {num_codes}"
        )
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must have at most 64 bits, got {seed}")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
    if metric == "dot":
        raise ValueError(
            "metric 'dot' has no k-means: longer codes would win without end; "
            "use 'cosine' or 'euclidean'"
        )
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if isinstance(init, Tensor):
        check_floating("init", init)
        check_device(x=x, init=init)
        expected = (*x.shape[:-2], num_codes, x.shape[-1])
        if init.shape != expected:
            raise ValueError(f"init must have shape {expected}, got {tuple(init.shape)}")
        _check_range("init", init, _codebook_dtype(x))
    elif init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, or a tensor, got {init!r}")
    _check_range("x", x, _codebook_dtype(x))


def _check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Finite, and squared distances in ``dtype`` will be too."""
    low, high = tensor.aminmax()
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, but has a NaN or an infinity")
    limit = math.sqrt(torch.finfo(dtype).max / tensor.shape[-1]) / 4
    if largest > limit:
        raise ValueError(
            f"{name} must be within {limit:.3g} of 0, or squared distances overflow {dtype}; "
            f"got {largest:.3g}"
        )


def _codebook_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _unit(x: Tensor) -> Tensor:
    """``x`` (..., D) with rows of norm 1, in the codebook's dtype; zero rows stay zero."""
    wide = x.double()
    wide = wide / wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.where(norm > 0, wide / norm, 0.0).to(_codebook_dtype(x))


def _assign(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest codes of x (H, N, D), and what each vector adds to the inertia, both (H, N)."""
    indices, distances = nearest_code(x, codebook, metric=metric)
    if metric == "cosine":
        distances = distances.neg_().add_(1).clamp_min_(0)
    return indices, distances


def _total(values: Tensor) -> Tensor:
    """Sums of ``values`` (H, N) in float64, (H,).

    Added in short runs: torch splits long ones by the number of threads, which changes the bits.
    """
    while values.shape[1] > 1024:
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 256))
        values = padded.unflatten(1, (-1, 256)).sum(2, dtype=torch.float64)
    return values.sum(1, dtype=torch.float64)


def _update(
    points: Tensor, codebook: Tensor, indices: Tensor, distances: Tensor, metric: str
) -> Tensor:
    """The next codebook (H, K, D): means of the assigned points, empty codes moved."""
    counts, codes = code_statistics(points, indices, codebook.shape[1])  # [H, K], [H, K, D]
    if metric == "euclidean":
        codes.div_(counts.clamp_min(1)[:, :, None])
    else:
        codes = _unit(codes)
        # Opposite points cancel, and zero vectors have no direction: the code stays.
        codes = torch.where((codes == 0).all(2, keepdim=True), codebook, codes)
    empty = counts == 0  # [H, K]
    # Only where asking costs nothing; a GPU does the little work instead.
    if empty.device.type == "cpu" and not bool(empty.any()):
        return codes
    # What a code leaves when its only vector goes is a code without vectors.
    movable = counts.gather(1, indices) > 1  # [H, N]
    if metric == "cosine":
        movable &= (points != 0).any(2)
    return _reseed(points, codes, codebook, empty, indices, torch.where(movable, distances, 0))


def _reseed(
    points: Tensor,
    codes: Tensor,
    codebook: Tensor,
    empty: Tensor,
    indices: Tensor,
    distances: Tensor,
) -> Tensor:
    """``codes`` (H, K, D) with the ``empty`` (H, K) ones at the points farthest from their codes,
    or as in ``codebook`` when no point is at a distance. Its shapes depend on no values."""
    distances, order = distances.sort(dim=1, descending=True, stable=True)  # [H, N]
    owners = indices.gather(1, order)
    # Equal points have equal distances from one code: the first of a run will do.
    repeated = (distances == distances.roll(1, 1)) & (owners == owners.roll(1, 1))
    repeated[:, 0] = False
    distances = distances.masked_fill(repeated, 0)
    distances, again = distances.sort(dim=1, descending=True, stable=True)
    order = order.gather(1, again)
    rank = (empty.cumsum(1) - 1).clamp_min(0)  # [H, K], of each empty code among them
    seeds = order.gather(1, rank)[:, :, None].expand_as(codes)
    moved = points.gather(1, seeds).to(codes.dtype)  # [H, K, D]
    moved = torch.where((distances.gather(1, rank) > 0)[:, :, None], moved, codebook)
    return torch.where(empty[:, :, None], moved, codes)


def _initial(
    x: Tensor, points: Tensor, num_codes: int, init: str | Tensor, seed: int, metric: str
) -> Tensor:
    """The initial codes (H, K, D) of x and points (H, N, D), each head drawn from ``seed``."""
    dtype = _codebook_dtype(x)
    if isinstance(init, Tensor):
        codes = init.detach().to(dtype, copy=True).view(x.shape[0], num_codes, x.shape[2])
        return codes if metric == "euclidean" else _unit(codes)
    drawn = []
    for head, candidates in zip(x, points, strict=True):
        generator = torch.Generator().manual_seed(seed)
        if init == "random":
            chosen = torch.randperm(len(head), generator=generator)[:num_codes]
        else:
            chosen = _plus_plus(head, candidates, num_codes, generator, metric)
        drawn.append(candidates[chosen.to(x.device)].to(dtype))
    return torch.stack(drawn)


def _plus_plus(
    x: Tensor, points: Tensor, num_codes: int, generator: torch.Generator, metric: str
) -> Tensor:
    """Positions (K,) of initial codes by k-means++: each drawn with a probability proportional
    to the squared distance from the nearest code drawn before it.

    The textbook looks at all N vectors after each code. Here, as many codes as there are already
    (at most 512) are drawn from the distances of the last look. A draw is then accepted with the
    probability of its distance now, given the codes accepted since, over that at the last look.
    Distances only shrink, so that this is rejection sampling from exactly the distribution that
    k-means++ asks for, in about log2(512) + K / 512 looks.

    Args:
        x: ``(N, D)``. points: ``(N, D)``, normalised if the metric is cosine.
    """
    num_vectors = x.shape[0]
    usable = torch.ones(num_vectors, dtype=torch.bool, device=x.device)
    if metric == "cosine":
        usable = (points != 0).any(1)
    # Of each vector, its squared distance; equal before there is a code. On the host, where sums
    # have one order.
    weights = usable.double().cpu()  # [N]
    chosen = torch.empty(num_codes, dtype=torch.int64)
    count = 0
    while count < num_codes:
        cumulative = weights.cumsum(0)  # [N]
        if not cumulative[-1] > 0:
            # All vectors are at codes already: those that remain will coincide with others.
            chosen[count:] = torch.randperm(num_vectors, generator=generator)[: num_codes - count]
            break
        size = min(max(count, 1), num_codes - count, _MAX_DRAWS)
        uniform = torch.rand(2, size, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, uniform[0] * cumulative[-1], right=True)
        drawn = drawn.clamp_max(num_vectors - 1)  # [S]
        accepted = drawn[_accept(points, drawn, weights[drawn], uniform[1], metric)]
        if len(accepted) == 0:
            continue
        _, distances = _assign(x[None], points[accepted.to(points.device)][None], metric)
        latest = torch.where(usable, distances[0], 0).double().cpu()
        weights = torch.minimum(weights, latest) if count else latest
        chosen[count : count + len(accepted)] = accepted
        count += len(accepted)
    return chosen


def _accept(
    points: Tensor, drawn: Tensor, weights: Tensor, uniform: Tensor, metric: str
) -> list[int]:
    """Which of the points ``drawn`` (S,) with ``weights`` (S,) become codes, one after another."""
    candidates = points[drawn.to(points.device)].cpu().double()  # [S, D]
    # Differences, not products: the distance of equal points must be 0.
    between = torch.cdist(candidates, candidates, compute_mode="donot_use_mm_for_euclid_dist")
    squared = between.square_().mul_(1 if metric == "euclidean" else 0.5).numpy()  # [S, S]
    current = weights.clone().numpy()
    threshold = (uniform * weights).numpy()
    accepted = []
    for i in range(len(drawn)):
        if threshold[i] < current[i]:
            accepted.append(i)
            current = np.minimum(current, squared[i])
    return accepted


@contextlib.contextmanager
def _reporter(progress: bool, iterations: int) -> Iterator[_Report]:
    """What :func:`kmeans` calls after each iteration: a progress bar, or nothing."""
    if not progress:
        yield lambda done, inertia: None
        return
    with progress_bar("k-means", said=True) as bar:
        task = bar.add_task("", total=iterations, said="inertia ...")

        def report(done: int, inertia: Tensor) -> None:
            bar.update(task, completed=done, said=f"inertia {float(inertia.sum()):.6g}")

        yield report
        bar.update(task, total=bar.tasks[task].completed)
