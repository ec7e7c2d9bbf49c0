"""The codes of vectors, and what the losses of a quantiser need of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.nn import losses, similarity
from mmfast.ops.nearest_code import output_dtype
from mmfast.ops.vector_quantize import vector_quantize


class Chosen(NamedTuple):
    """Codes for vectors (C, M, D) of C codebooks.

    Attributes:
        quantized: with the gradient that was asked for, ``(C, M, D)``; of the k nearest
            ``(C, M, k, D)``.
        indices: ``(C, M)``, -1 where masked, or ``(C, M, k)``.
        commitment: mean squared difference ``()``, or ``(C, M, k)``; its gradient goes to the
            vectors only.
        codebook: the same number; its gradient goes to the codes only.
    """

    quantized: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor


def nearest(
    x: Tensor, codes: Tensor, metric: str, gradient: str, variance: float, mask: Tensor | None
) -> Chosen:
    """The nearest ones of the codes (C, K, D).

    Args:
        gradient, variance: of :func:`mmfast.vector_quantize`. mask: ``(C, M)``.
    """
    result = vector_quantize(
        x, codes, metric=metric, gradient=gradient, mask=mask, noise_variance=variance
    )
    commitment, codebook = result.commitment_loss.mean(), result.codebook_loss.mean()
    return Chosen(result.quantized, result.indices, commitment, codebook)


def in_pieces(
    x: Tensor,
    codes: Tensor,
    metric: str,
    gradient: str,
    variance: float,
    mask: Tensor | None,
    *,
    topk: int | None,
    drawn: float | None,
    soft: float | None,
) -> Chosen:
    """As :func:`nearest`, for codes that may be those of each vector, (C, M, K, D).

    Args:
        topk: how many codes.
        drawn: the temperature of drawing codes by their similarity; None takes the nearest.
        soft: that of the softmax through which the codes have a gradient; None for no such one.
    """
    indices = similarity.choose(x.detach(), codes.detach(), metric, topk=topk, temperature=drawn)
    quantized = similarity.gathered(codes, indices)
    if soft is not None:
        mean = similarity.expected_codes(x, codes, metric, soft)
        quantized = quantized + (mean - mean.detach())
    if topk is not None:
        x = x[:, :, None].expand_as(quantized)
        mask = None if mask is None else mask[:, :, None]
    dtype = output_dtype(x, codes)
    wide, wide_codes = x.to(dtype), quantized.to(dtype)
    commitment = (wide_codes.detach() - wide).square().mean(-1)
    codebook = (wide_codes - wide.detach()).square().mean(-1)
    if mask is not None:
        commitment, codebook = (torch.where(mask, t, 0) for t in (commitment, codebook))
        indices = torch.where(mask, indices, -1)
    if topk is None:
        count = max(commitment.numel(), 1) if mask is None else mask.sum().clamp_min(1)
        commitment, codebook = commitment.sum() / count, codebook.sum() / count
    return Chosen(losses.passed(x, quantized, gradient, variance), indices, commitment, codebook)
