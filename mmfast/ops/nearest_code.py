"""Exact nearest-code lookup."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice, check_codebook, check_device, check_floating
from mmfast.registry import Arguments, Cost, Op, Sample, register

METRICS = ("euclidean", "cosine", "dot")

_WORKSPACE = 1 << 20  # float64 elements of the reference's largest temporary
_UNIT_ROUNDOFF = 2.0**-53


def nearest_code(
    x: Tensor, codebook: Tensor, *, metric: str = "euclidean"
) -> tuple[Tensor, Tensor]:
    """The nearest code of every vector, exactly, without an N x K matrix in memory.

    Args:
        x: vectors, ``(..., D)``, or ``(H, ..., D)`` when ``codebook`` has heads. Any strides.
        codebook: codes, ``(K, D)`` or ``(H, K, D)``, K >= 1. Any strides. ``x`` and ``codebook``
            may differ in dtype; each is float16, bfloat16, float32 or float64.
        metric: ``"euclidean"`` (smallest squared distance), ``"cosine"`` (largest cosine
            similarity; 0 where a vector is zero) or ``"dot"`` (largest inner product).

    Returns:
        ``(indices, distances)``, both of shape ``x.shape[:-1]``. ``indices`` (int64) is the
        argmin (argmax) of the metric evaluated in float64 on the values given, the lowest index
        on ties, whatever the backend, batch size or thread count. ``distances`` is the metric at
        that code: squared distance, similarity or score; float64 if either input is, else
        float32. As in ``torch.argmin``, NaN counts as the best: a vector with a NaN gets index 0
        and distance NaN. Not differentiable.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or ``metric`` do not fit.

    Source: nearest-neighbour quantisation of van den Oord et al., "Neural Discrete Representation
    Learning" (2017), eq. 1-2. Evaluated in float64, dimension by dimension, as
    :func:`float64_metric` defines.
    """
    check_floating("x", x)
    check_floating("codebook", codebook)
    check_device(x=x, codebook=codebook)
    check_codebook(x, codebook)
    check_choice("metric", metric, METRICS)
    return backends.call(OP, x, codebook, metric)


def output_dtype(x: Tensor, codebook: Tensor) -> torch.dtype:
    """dtype of the distances."""
    return torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32


def float64_metric(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """The metric of paired vectors, smaller is nearer: the definition that every backend meets.

    Sums run over D in order, every operation rounded to float64 (no fused multiply-add).

    Args:
        x: ``(P, D)`` float64. codes: ``(P, D)`` float64.

    Returns:
        ``(P,)``: squared distances, or the negated similarity or score.
    """
    total = x.new_zeros(x.shape[0])  # [P]
    if metric == "euclidean":
        for a, b in zip(x.unbind(1), codes.unbind(1), strict=True):
            total += (a - b).square()
        return total
    for a, b in zip(x.unbind(1), codes.unbind(1), strict=True):
        total -= a * b
    if metric == "cosine":
        norms = _norm(x) * _norm(codes)  # [P]
        total = torch.where(norms == 0, total.abs() * 0, total / norms)
    return total


def _norm(x: Tensor) -> Tensor:
    """Norms of the rows of ``x`` (P, D), summed in order."""
    total = x.new_zeros(x.shape[0])
    for a in x.unbind(1):
        total += a.square()
    if total.device.type != "cpu":
        return total.sqrt()
    # On the CPU torch.sqrt may be wrong in the last bit (it is MKL's); numpy's is the processor's.
    return torch.from_numpy(np.sqrt(total.detach().numpy()))


def _tame(norm: Tensor) -> Tensor:
    """Whether the square of ``norm`` is far from float64's limits."""
    return (norm == 0) | ((norm > 1e-140) & (norm < 1e140))


def reference(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The specification. A float64 matrix product leaves the codes that rounding could make
    nearest; these few are evaluated by :func:`float64_metric`."""
    if codebook.dim() == 3:
        heads = [reference(a, b, metric) for a, b in zip(x, codebook, strict=True)]
        if not heads:
            return fake(x, codebook, metric)
        return torch.stack([i for i, _ in heads]), torch.stack([d for _, d in heads])
    indices, distances = fake(x, codebook, metric)
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    codes = codebook.double()  # [K, D]
    screen = _Screen.of(codes, metric)
    step = max(1, _WORKSPACE // max(codes.shape))
    for start in range(0, rows.shape[0], step):
        index, value = _nearest_rows(rows[start : start + step].double(), codes, metric, screen)
        indices.view(-1)[start : start + step] = index
        distances.view(-1)[start : start + step] = value if metric == "euclidean" else -value
    return indices, distances


class _Screen(NamedTuple):
    """What the approximate metric, terms + alpha * (x' @ factors.T), takes from the codes."""

    centre: Tensor  # [D]
    factors: Tensor  # [K, D]
    terms: Tensor  # [K]
    alpha: float
    largest: Tensor  # [], the largest norm among the factors
    trusted: Tensor  # [], whether norms keep their bits when squared

    @staticmethod
    def of(codes: Tensor, metric: str) -> _Screen:
        centre = torch.zeros_like(codes[0])
        terms = torch.zeros_like(codes[:, 0])
        trusted = torch.ones_like(terms[0], dtype=torch.bool)
        if metric == "euclidean":
            centre = codes.mean(0)  # removes a common offset, which would drown the differences
            factors = codes - centre
            terms = factors.square().sum(1)
        elif metric == "dot":
            factors = codes
        else:
            norms = codes.norm(dim=1)  # [K]
            trusted = _tame(norms).all()
            # 1 / inf = 0, the similarity with a zero vector.
            factors = codes / norms.where(norms > 0, torch.inf)[:, None]
        alpha = -2.0 if metric == "euclidean" else -1.0
        return _Screen(centre, factors, terms, alpha, factors.norm(dim=1).max(), trusted)


def _nearest_rows(x: Tensor, codes: Tensor, metric: str, screen: _Screen) -> tuple[Tensor, Tensor]:
    """Index and metric (smaller is nearer) of the nearest code, x (N, D), codes (K, D), float64."""
    num_codes, num_dims = codes.shape
    a = x - screen.centre
    norm = a.norm(dim=1)  # [N]
    if metric == "euclidean":
        scale = (norm + screen.largest).square()  # [N]
    elif metric == "dot":
        scale = norm * screen.largest
    else:
        a = a / norm.where(norm > 0, torch.inf)[:, None]
        # Norms whose squares overflow or lose bits exclude nothing.
        scale = torch.where(_tame(norm) & screen.trusted, 1.0, torch.inf)
    approximate = torch.addmm(screen.terms, a, screen.factors.T, alpha=screen.alpha)  # [N, K]
    bound = 8 * (num_dims + 16) * _UNIT_ROUNDOFF * scale + torch.finfo(x.dtype).tiny  # [N]
    limit = approximate.amin(1) + 2 * bound
    # Written so that a NaN anywhere keeps the code in the running.
    row, code = (~(approximate > limit[:, None])).nonzero(as_tuple=True)  # [P] each
    piece = _WORKSPACE // num_dims + 1  # all N * K pairs may be left
    pieces = zip(row.split(piece), code.split(piece), strict=True)
    value = torch.cat([float64_metric(x[r], codes[c], metric) for r, c in pieces])  # [P]
    # The minimum of values with a NaN among them is NaN.
    best = value.new_full((x.shape[0],), torch.inf).scatter_reduce(0, row, value, "amin")
    nearest = (value == best[row]) | (value.isnan() & best[row].isnan())
    code = torch.where(nearest, code, num_codes)
    index = code.new_full((x.shape[0],), num_codes).scatter_reduce(0, row, code, "amin")
    return index, float64_metric(x, codes[index], metric)


def fake(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    shape = x.shape[:-1]
    return (
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(shape, dtype=output_dtype(x, codebook)),
    )


def vmap(
    info: torch._functorch.autograd_function.VmapInfo,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    codebook: Tensor,
    metric: str,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Batching: a batch of x joins the leading dimensions, a batch of codebooks the heads."""
    x_dim, codebook_dim, _ = in_dims
    heads = codebook.dim() - (codebook_dim is not None) == 3
    size = info.batch_size
    if codebook_dim is None:
        assert x_dim is not None  # something is batched
        x = x.movedim(x_dim, 1 if heads else 0)
        return backends.call(OP, x, codebook, metric), ((1, 1) if heads else (0, 0))
    codebook = codebook.movedim(codebook_dim, 0)
    x = x.movedim(x_dim, 0) if x_dim is not None else x.expand(size, *x.shape)
    if not heads:
        return backends.call(OP, x, codebook, metric), (0, 0)
    num_heads = codebook.shape[1]
    result = backends.call(OP, x.flatten(0, 1), codebook.flatten(0, 1), metric)
    indices, distances = (r.unflatten(0, (size, num_heads)) for r in result)
    return (indices, distances), (0, 0)


def cost(x: Tensor, codebook: Tensor, metric: str) -> Cost:
    """Inputs read once, outputs written once; one multiply and one add per pair and dimension."""
    rows = x.shape[:-1].numel()
    moved = x.nbytes + codebook.nbytes + rows * (8 + output_dtype(x, codebook).itemsize)
    return Cost(bytes=moved, flops=2 * rows * codebook.shape[-2] * x.shape[-1])


def compare(
    result: tuple[Tensor, Tensor],
    arguments: Arguments,
    expected: tuple[Tensor, Tensor] | None = None,
) -> list[str]:
    """Indices must equal the reference's; distances must be within rounding of it."""
    x, codebook, metric = arguments
    indices, distances = result
    expected_indices, best = expected or reference(x, codebook, metric)
    complaints = []
    wrong = int((indices != expected_indices).sum())
    if wrong:
        complaints.append(f"{wrong} of {indices.numel()} indices differ from the float64 argmin")
    if distances.dtype != best.dtype:
        complaints.append(f"distances are {distances.dtype}, expected {best.dtype}")
    # One rounding to the output's dtype after a sum of D terms in float64, in any order.
    tolerance = 4 * torch.finfo(distances.dtype).eps + 2 * x.shape[-1] * _UNIT_ROUNDOFF
    scale = best.abs()
    if metric == "dot":
        scale = x.double().norm(dim=-1) * codebook.double().norm(dim=-1).amax()
    elif metric == "cosine":
        scale = torch.ones_like(best)
    close = (distances - best).abs() <= tolerance * scale
    same = close | (distances == best) | (distances.isnan() & best.isnan())
    if not bool(same.all()):
        complaints.append(f"{int((~same).sum())} distances differ from the reference")
    return complaints


def _gaussian(n: int, k: int, d: int, heads: int = 0, offset: float = 0.0) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        lead = (heads,) if heads else ()
        x = torch.randn(*lead, n, d, generator=generator) + offset
        codes = torch.randn(*lead, k, d, generator=generator) + offset
        return x.to(device, dtype), codes.to(device, dtype), "euclidean"

    prefix = f"h{heads}_" if heads else ""
    suffix = f"_offset{offset:g}" if offset else ""
    return Sample(
        f"{prefix}n{n}_k{k}_d{d}{suffix}",
        make,
        {"N": n, "K": k, "D": d, "H": heads or 1},
        bench=n >= 256,
    )


def samples() -> Iterable[Sample]:
    """Shapes of the field (``bench``) and odd ones."""
    for n, k, d in (
        (65536, 1024, 64),
        (65536, 512, 64),
        (65536, 8192, 32),
        (16384, 16384, 256),
        (65536, 16384, 8),
        (256, 512, 64),
    ):
        yield _gaussian(n, k, d)
    yield _gaussian(65536, 1024, 64, offset=100.0)
    for n, k, d in ((0, 5, 3), (1, 1, 1), (7, 3, 1), (33, 65, 7), (63, 129, 33), (130, 257, 72)):
        yield _gaussian(n, k, d)
    yield _gaussian(63, 129, 33, offset=100.0)
    yield _gaussian(17, 33, 5, heads=3)


def _load_triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from mmfast.kernels.nearest_code import nearest_code as launch

    return launch


OP = register(
    Op(
        name="nearest_code",
        schema="(Tensor x, Tensor codebook, str metric) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("nearest_code"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        vmap=vmap,
    )
)
