"""What needs the similarities of vectors to all codes, in pieces of bounded size.

Similarities are minus the distances, or inner products of normalised vectors. A gradient computes
those of a piece again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfast.ops.soft_assignment_statistics import LEAST_SQUARE, soft_assignment_statistics

_WORKSPACE = 1 << 22  # similarities of one piece


def similarity(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """(C, M, K) of vectors (C, M, D) and codes (C, K, D), or (C, M, K, D) of each vector."""
    if codes.dim() == 4:
        if metric == "dot":
            return (codes @ x[..., None]).squeeze(-1)
        return -torch.nn.functional.pairwise_distance(x[:, :, None], codes)
    if metric == "dot":
        return x @ codes.mT
    squares = x.square().sum(-1, keepdim=True) + codes.square().sum(-1)[:, None]
    return -torch.baddbmm(squares, x, codes.mT, alpha=-2).clamp_min(LEAST_SQUARE).sqrt()


def rows_of(codes: Tensor, rows: slice) -> Tensor:
    """The codes of these vectors."""
    return codes[:, rows] if codes.dim() == 4 else codes


def pieces(num_vectors: int, num_codebooks: int, num_codes: int) -> list[slice]:
    """Slices of the vectors with bounded similarities."""
    return slices(num_vectors, max(1, _WORKSPACE // (num_codebooks * num_codes)))


def slices(length: int, step: int) -> list[slice]:
    """Slices of ``step`` that make up ``length``; the last ends where that does, so that what a
    tracer makes of them holds for each length of as many."""
    starts = [step * i for i in range((length + step - 1) // step)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)] if starts else []


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, none of whose intermediates are kept for the gradient, but in an
    exported program, which cannot say so."""
    if torch.compiler.is_exporting():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def choose(
    x: Tensor,
    codes: Tensor,
    metric: str,
    *,
    topk: int | None = None,
    temperature: float | None = None,
) -> Tensor:
    """Codes of the vectors ``x`` (C, M, D): (C, M) int64, or (C, M, topk), best first.

    Args:
        temperature: draw each code with a probability in proportion to the exponential of its
            similarity over this; None takes the most similar in float64.
    """
    dtype = torch.float64 if temperature is None else torch.float32
    wide = codes.to(dtype)
    chosen = [x.new_zeros(x.shape[0], 0, *(() if topk is None else (topk,)), dtype=torch.int64)]
    for rows in pieces(x.shape[1], x.shape[0], codes.shape[-2]):
        scores = similarity(x[:, rows].to(dtype), rows_of(wide, rows), metric)  # [C, m, K]
        if temperature is not None:
            scores = scores / temperature + _gumbel(scores)
        chosen.append(scores.argmax(-1) if topk is None else scores.topk(topk, -1).indices)
    return torch.cat(chosen, 1)


def _gumbel(like: Tensor) -> Tensor:
    uniform = torch.rand_like(like)
    return -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()


def gathered(codes: Tensor, indices: Tensor) -> Tensor:
    """Codes (C, M, ..., D) at ``indices`` (C, M, ...) of (C, K, D), or of each vector's own
    (C, M, K, D)."""
    lead = codes.dim() - 2
    flat = indices.flatten(lead) if indices.dim() > lead else indices[..., None]
    index = flat[..., None].expand(*flat.shape, codes.shape[-1])
    return codes.gather(-2, index).reshape(*indices.shape, codes.shape[-1])


def expected_codes(x: Tensor, codes: Tensor, metric: str, temperature: float) -> Tensor:
    """The mean code (C, M, D) of each vector under the softmax of its similarities."""

    def piece(x: Tensor, codes: Tensor) -> Tensor:
        weights = (similarity(x, codes, metric) / temperature).softmax(-1)
        return weights @ codes if codes.dim() == 3 else (weights[:, :, None] @ codes).squeeze(2)

    x = x.to(codes.dtype)
    parts = [
        recomputed(piece, x[:, rows], rows_of(codes, rows))
        for rows in pieces(x.shape[1], x.shape[0], codes.shape[-2])
    ]
    return torch.cat([x[:, :0], *parts], 1)


def cross_entropy(x: Tensor, codes: Tensor, indices: Tensor, metric: str) -> Tensor:
    """Mean cross entropy () of the similarities as logits for ``indices`` (C, M), but for
    -1; 0 if there are none.

    Source: Shen et al., "NaturalSpeech 2" (2023), eq. 4.
    """

    def piece(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        logits = similarity(x, codes, metric)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), indices.flatten(), ignore_index=-1, reduction="sum"
        )

    x = x.to(codes.dtype)
    total = x.new_zeros(())
    for rows in pieces(x.shape[1], x.shape[0], codes.shape[-2]):
        total = total + recomputed(piece, x[:, rows], rows_of(codes, rows), indices[:, rows])
    return total / (indices >= 0).sum().clamp_min(1)


def diversity(x: Tensor, codes: Tensor, metric: str, temperature: float) -> Tensor:
    """Minus the entropy () of the codes' mean probabilities, averaged over the positions.

    Args:
        x: ``(C, S, L, D)``: the probabilities are means over the C codebooks and S samples.
        codes: ``(C, K, D)``, or ``(C, S, L, K, D)``.
        temperature: what similarities are multiplied with before the softmax, above 0.
    """
    x = x.to(codes.dtype)
    if codes.dim() == 5:
        logits = similarity(x.flatten(1, 2), codes.flatten(1, 2), metric) * temperature
        each = logits.softmax(-1).unflatten(1, x.shape[1:3]).mean(1)  # [C, L, K]
    else:
        each = soft_assignment_statistics(
            x.transpose(1, 2),
            codes,
            temperature=1 / temperature,
            metric="distance" if metric == "euclidean" else metric,
            batch_dims=1,
        ).mean_probabilities
    mean = each.mean(0)  # [L, K]
    return (mean * mean.clamp_min(1e-5).log()).sum() / max(mean.shape[0], 1)
