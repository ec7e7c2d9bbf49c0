"""Targets for self-supervised speech models: nearest random codes of random projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.checks import check_floating
from mmfast.nn.vector_quantize import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """Indices of the codes nearest in angle to random projections of the vectors.

    Takes the place of ``vector_quantize_pytorch.RandomProjectionQuantizer``: arguments, results,
    state dict, and from the same seed the same buffers. Nothing is learned.

    Args:
        dim: of the vectors.
        codebook_size: K.
        codebook_dim: D, of the codes.
        num_codebooks: H, each with a projection of its own.
        norm: give each vector mean 0 and variance 1 first.
        kwargs: for :class:`VectorQuantize`.

    Source: Chiu et al., "Self-supervised Learning with Random-projection Quantizer for Speech
    Recognition" (2022), sec. 3.1.
    """

    rand_projs: Tensor

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_codebooks = num_codebooks
        projections = nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim))
        self.register_buffer("rand_projs", projections)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            dim=codebook_dim * num_codebooks,
            heads=num_codebooks,
            codebook_size=codebook_size,
            use_cosine_sim=True,
            separate_codebook_per_head=True,
            **kwargs,
        )

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Indices of the vectors ``x`` (B, L, dim), or a loss.

        Args:
            indices: targets, ``(B, L)``, or ``(B, L, H)`` if H > 1.

        Returns:
            Indices ``(B, L)``, or ``(B, L, H)`` if H > 1, int64; or if indices are given, the
            cross-entropy ``()`` of the similarities with them.

        Raises:
            ValueError: x has another shape.
        """
        check_floating("x", x)
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, L, {self.dim}), got shape {tuple(x.shape)}")
        projected = torch.einsum("bnd,hde->bnhe", self.norm(x), self.rand_projs).flatten(2)
        self.vq.eval()
        if indices is not None:
            return self.vq(projected, indices=indices)[1]
        return self.vq(projected)[1]
