"""What the attention ops share: softmax attention written out, its gradients, and their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.checks import check_device, check_floating
from mmfast.ops.per_sample import differences

_MOST_DIMS = 256  # of a head in Triton
_OPERATIONS = 8  # how many roundings' worth a float32 score may be off


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which scores and sums are made."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_attention(**tensors: Tensor) -> None:
    """Tensors of one floating dtype on one device, else TypeError or ValueError."""
    for name, tensor in tensors.items():
        check_floating(name, tensor)
    check_device(**tensors)
    if len({t.dtype for t in tensors.values()}) > 1:
        got = ", ".join(f"{n} {str(t.dtype)[6:]}" for n, t in tensors.items())
        raise TypeError(f"{', '.join(tensors)} must have one dtype, got {got}")


def check_heads(name: str, heads: int, kv_heads: int) -> None:
    """``heads`` of queries fall into groups for ``kv_heads``, else ValueError."""
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{name} must have a number of heads that divides {heads}, got {kv_heads}")


def scale_of(scale: float | None, num_dims: int) -> float:
    """The factor of the scores."""
    return 1 / math.sqrt(num_dims) if scale is None else float(scale)


def too_wide(*arguments: Any) -> list[str]:
    """Reasons against the Triton kernels, which keep whole heads on the chip."""
    # The first three tell of both head sizes, in all ops.
    widths = [a.shape[-1] for a in arguments[:3] if isinstance(a, Tensor)]
    if max(widths) <= _MOST_DIMS:
        return []
    return [f"head sizes may be up to {_MOST_DIMS}, got {max(widths)}"]


def new_like(query: Tensor, num_dims: int) -> Tensor:
    """Empty (B, H, L, num_dims) in query's order: (B, L, H, E) in memory stays that."""
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, num_dims).transpose(1, 2)
    return query.new_empty(batch, heads, length, num_dims)


def new_lse(query: Tensor, shape: Sequence[int]) -> Tensor:
    """Empty, for logarithms of sums."""
    return query.new_empty(shape, dtype=wide_dtype(query.dtype))


class Limits(NamedTuple):
    """What besides queries, keys and values decides. Each broadcasts to (B, H, L, S), or is None.

    Attributes:
        allowed: bool, True where a key takes part.
        bias: added to the scores.
        kept: factor of the probabilities that dropout leaves, 0 where it leaves none.
    """

    allowed: Tensor | None = None
    bias: Tensor | None = None
    kept: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Limits:
        """With numbers of ``dtype``."""
        bias, kept = (None if t is None else t.to(dtype) for t in (self.bias, self.kept))
        return Limits(self.allowed, bias, kept)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x [B, H, L, C] times y [B, Hkv, C, D], a head of y for each group of heads: [B, H, L, D]."""
    batch, heads, length, inner = x.shape
    groups = (batch, y.shape[1], heads // max(y.shape[1], 1), length, inner)
    made = x.reshape(groups) @ y[:, :, None]  # [B, Hkv, G, L, D]
    return made.reshape(batch, heads, length, y.shape[-1])


def _gathered(x: Tensor, y: Tensor, kv_heads: int) -> Tensor:
    """x^T y of x [B, H, L, S] and y [B, H, L, D], summed over groups of heads: [B, Hkv, S, D]."""
    made = x.mT @ y  # [B, H, S, D]
    batch, heads, length, num_dims = made.shape
    groups = (batch, kv_heads, heads // max(kv_heads, 1), length, num_dims)
    return made.reshape(groups).sum(2)


def _scores(query: Tensor, key: Tensor, scale: float, limits: Limits) -> Tensor:
    scores = _product(query, key.mT) * scale  # [B, H, L, S]
    if limits.bias is not None:
        scores = scores + limits.bias
    if limits.allowed is not None:
        scores = torch.where(limits.allowed, scores, -math.inf)
    return scores


def attend(
    query: Tensor,  # [B, H, L, E]
    key: Tensor,  # [B, Hkv, S, E]
    value: Tensor,  # [B, Hkv, S, Ev]
    *,
    scale: float,
    limits: Limits,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, L, Ev] and logarithms of the sums of exponentials [B, H, L], both wide."""
    wide = wide_dtype(query.dtype)
    query, key, value = (t.to(wide).contiguous() for t in (query, key, value))
    limits = limits.to(wide)
    scores = _scores(query, key, scale, limits)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[..., None] == -math.inf, 0, scores.softmax(-1))
    if limits.kept is not None:
        weights = weights * limits.kept
    return _product(weights, value), lse


class Gradients(NamedTuple):
    """Of queries, keys, values and scores, all wide."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor  # [B, H, L, S]


def attend_bwd(
    grad_out: Tensor,  # [B, H, L, Ev]
    query: Tensor,  # [B, H, L, E]
    key: Tensor,  # [B, Hkv, S, E]
    value: Tensor,  # [B, Hkv, S, Ev]
    out: Tensor,  # [B, H, L, Ev]
    lse: Tensor,  # [B, H, L]
    *,
    scale: float,
    limits: Limits,
) -> Gradients:
    """The gradients, from the outputs of :func:`attend`; 0 from rows that attend to nothing."""
    wide = wide_dtype(query.dtype)
    tensors = (grad_out, query, key, value, out, lse)
    grad_out, query, key, value, out, lse = (t.to(wide).contiguous() for t in tensors)
    limits = limits.to(wide)
    scores = _scores(query, key, scale, limits)
    weights = _weights(scores, lse)  # [B, H, L, S]
    grad_weights = _product(grad_out, value.mT)  # [B, H, L, S]
    dropped = weights
    if limits.kept is not None:
        dropped, grad_weights = weights * limits.kept, grad_weights * limits.kept
    delta = (grad_out * out).sum(-1, keepdim=True)  # [B, H, L, 1]
    grad_scores = weights * (grad_weights - delta)
    return Gradients(
        _product(grad_scores, key) * scale,
        _gathered(grad_scores, query, key.shape[1]) * scale,
        _gathered(dropped, grad_out, key.shape[1]),
        grad_scores,
    )


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    empty = lse[..., None] == -math.inf
    return torch.where(empty, 0, (scores - lse[..., None]).exp())


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Of what is multiplied: relative, and below the normal numbers absolute."""
    info, wide = torch.finfo(dtype), torch.finfo(wide_dtype(dtype))
    tiny = max(info.smallest_normal * info.eps, wide.smallest_normal)
    return (info.eps if info.bits == 16 else 0.0), tiny


def _unsure(query: Tensor, key: Tensor, scale: float, limits: Limits, dtype: torch.dtype) -> Tensor:
    """Relative error of probabilities before rounding, [B, H, L, 1], where inputs are of dtype."""
    bias = None if limits.bias is None else limits.bias.abs().nan_to_num(0, 0, 0)
    size = _scores(query.abs(), key.abs(), abs(scale), Limits(limits.allowed, bias))
    largest = size.amax(-1, keepdim=True) if size.shape[-1] else size.sum(-1, keepdim=True)
    eps = _OPERATIONS * torch.finfo(wide_dtype(dtype)).eps
    return eps * (1 + largest.clamp_min(0))


def errors(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, limits: Limits
) -> tuple[Tensor, Tensor]:
    """How far outputs and logarithms may be from :func:`attend`, but for their own rounding.

    Probabilities may be rounded to value's dtype. All is computed in float64.
    """
    dtype, (eps, tiny) = value.dtype, _rounding(value.dtype)
    query, key, value = (t.double() for t in (query, key, value))
    limits = limits.to(torch.float64)
    unsure = _unsure(query, key, scale, limits, dtype)
    size, lse = attend(query, key, value.abs(), scale=scale, limits=limits)
    sums = value.abs().sum(2, keepdim=True)  # [B, Hkv, 1, Ev]
    sums = sums.repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
    return (eps + unsure) * size + tiny * sums, torch.where(lse == -math.inf, 0, unsure[..., 0])


def errors_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    limits: Limits,
) -> Gradients:
    """The same for :func:`attend_bwd`."""
    dtype, (eps, tiny) = value.dtype, _rounding(value.dtype)
    tensors = (grad_out, query, key, value, out, lse)
    grad_out, query, key, value, out, lse = (t.double() for t in tensors)
    limits = limits.to(torch.float64)
    unsure = eps + _unsure(query, key, scale, limits, dtype)
    weights = _weights(_scores(query, key, scale, limits), lse)
    grad_weights = _product(grad_out.abs(), value.mT.abs())
    dropped = weights
    if limits.kept is not None:
        dropped, grad_weights = weights * limits.kept, grad_weights * limits.kept
    delta = (grad_out * out).abs().sum(-1, keepdim=True)
    scores = unsure * weights * (grad_weights + delta) + tiny
    return Gradients(
        _product(scores, key.abs()) * abs(scale),
        _gathered(scores, query.abs(), key.shape[1]) * abs(scale),
        _gathered(unsure * dropped + tiny, grad_out.abs(), key.shape[1]),
        scores,
    )


def complaints(
    names: Sequence[str],
    result: Sequence[Tensor],
    likes: Sequence[Tensor],
    wanted: Sequence[Tensor],
    allowed: Sequence[Tensor],
) -> list[str]:
    """What speaks against ``result``: dtypes, shapes, values."""
    found = []
    for name, got, like, want, error in zip(names, result, likes, wanted, allowed, strict=True):
        found += differences(name, got, like, want, error, 1.0)
    return found
