"""The quantiser of VQGAN, which diffusers and taming-transformers share, on mmfast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast.regions import autocast_dtype


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Indices ``(N,)`` of the codes ``(K, D)`` nearest to z ``(..., D)``."""
    indices, _ = mmfast.nearest_code(z, codes)
    return indices.flatten()


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """``codes``, with the gradient going to ``z``."""
    return z + (codes - z).detach()


def losses(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared difference twice: with its gradient to z, and with it to the codes."""
    # A power: autocast takes it, but no square, in float32 on some devices.
    return ((codes.detach() - z) ** 2).mean(), ((codes - z.detach()) ** 2).mean()


def quantize(
    quantizer: Any, z: Tensor, legacy: bool, product: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantised map, loss and indices.

    Args:
        quantizer: has ``embedding`` (K, D) and ``beta``.
        z: ``(B, D, height, width)``.
        legacy: whether beta weighs the codebook's loss, as it did at first, in the place of the
            commitment.
        product: whether the original's codes are a product of matrices, to which autocast gives
            its dtype.

    Returns:
        ``(B, D, height, width)``, ``()`` and ``(N,)``, N = B x height x width.

    Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021), eq. 4.
    """
    z = z.permute(0, 2, 3, 1).contiguous()
    indices = nearest(z, quantizer.embedding.weight)
    codes = quantizer.embedding(indices).view(z.shape)
    lowered = autocast_dtype(z.device.type) if product else None
    if lowered is not None and codes.dtype != torch.float64:
        codes = codes.to(lowered)
    commitment, codebook = losses(z, codes)
    beta = quantizer.beta
    loss = commitment + beta * codebook if legacy else beta * commitment + codebook
    return straight_through(z, codes).permute(0, 3, 1, 2).contiguous(), loss, indices


def remapped(quantizer: Any, indices: Tensor, shape: torch.Size) -> Tensor:
    """``indices`` in the form that ``remap`` and ``sane_index_shape`` ask for.

    Args:
        shape: of the quantised map, ``(B, D, height, width)``.
    """
    batch, _, height, width = shape
    if quantizer.remap is not None:
        indices = quantizer.remap_to_used(indices.reshape(batch, -1)).reshape(-1, 1)
    return indices.reshape(batch, height, width) if quantizer.sane_index_shape else indices
