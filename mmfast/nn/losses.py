"""Losses of codebooks, and the gradients of codes that are given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.library import copied
from mmfast.nn.initialisation import unit
from mmfast.ops.vector_quantize import directional
from mmfast.results import exportable


@exportable
class LossBreakdown(NamedTuple):
    """The losses of a quantiser before their weights."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def orthogonal(
    codebook: Tensor, active: Tensor | None = None, max_codes: int | None = None
) -> Tensor:
    """Mean squared cosine similarity () of different codes of ``codebook`` (H, K, D).

    Computed from the D x D matrix of the normalised codes: the squares of all K x K similarities
    have the sum that its squares have.

    Args:
        active: ``(H, K)``, bool: the codes that count, as many in each head; all if None.
        max_codes: at most this many codes, drawn at random.

    Source: Shin et al., "Translation-equivariant Image Quantizer for Bi-directional Image-Text
    Generation" (2021), eq. 2.
    """
    num_codes = codebook.shape[1]
    weight = codebook.new_ones(codebook.shape[:2]) if active is None else active.to(codebook.dtype)
    if max_codes is not None and num_codes > max_codes:
        order = torch.randperm(num_codes, device=codebook.device)
        if active is not None:
            # The active ones first, in random order.
            order = order[(~active[0, order]).sort(stable=True).indices]
        order = order[:max_codes]
        codebook, weight = codebook[:, order], weight[:, order]
    else:
        codebook = copied(codebook)  # a later change in place must not reach the gradient
    codes = unit(codebook) * weight[:, :, None]
    gram = codes.mT @ codes if codes.shape[1] > codes.shape[2] else codes @ codes.mT
    count = weight[0].sum().clamp_min(1)
    return gram.square().sum() / (codes.shape[0] * count.square()) - 1 / count


def passed(x: Tensor, codes: Tensor, gradient: str, variance: float) -> Tensor:
    """``codes`` (..., D) of ``x`` (..., D) with the gradients of
    :func:`mmfast.vector_quantize`, for codes that are not the nearest ones. In x's dtype, computed
    in float32 at least."""
    dtype = x.dtype
    if gradient == "none":
        return codes.to(dtype)
    if gradient == "directional":
        return directional(x, codes.to(dtype), torch.randn_like(x), variance)
    x = x.to(torch.promote_types(dtype, torch.float32))
    codes = codes.to(x.dtype)
    if gradient == "straight_through":
        return (x + (codes - x).detach()).to(dtype)
    length = x.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    scale = codes.detach().norm(dim=-1, keepdim=True) / length
    e, q = unit(x.detach()), unit(codes.detach())
    w = unit(e + q)
    rotated = x - 2 * (x * w).sum(-1, keepdim=True) * w + 2 * (x * e).sum(-1, keepdim=True) * q
    return (rotated * scale).to(dtype)


def active(indices: Tensor, num_codes: int) -> Tensor:
    """(C, K): whether a vector has the code, of indices (C, ...), -1 for none."""
    slots = indices.flatten(1)
    slots = torch.where(slots >= 0, slots, num_codes)
    active = slots.new_zeros(slots.shape[0], num_codes + 1, dtype=torch.bool)
    return active.scatter_(1, slots, True)[:, :num_codes]
