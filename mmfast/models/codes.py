"""The codes of a VQ-VAE, stage by stage of its quantiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.models.vqvae import VQVAE


def codebook_sizes(quantizer: Any) -> tuple[int, ...]:
    """K of each stage of a quantiser, and of each group in it if there are such; one for those that
    have the same codes everywhere.

    Raises:
        TypeError: it does not say.
    """
    groups = getattr(quantizer, "rvqs", ())
    if groups:  # side by side in each stage
        of_group = codebook_sizes(groups[0])
        return tuple(k for k in of_group for _ in groups) if len(of_group) > 1 else of_group
    sizes = getattr(quantizer, "codebook_sizes", None) or getattr(quantizer, "codebook_size", None)
    if sizes is None and hasattr(quantizer, "codebooks"):
        sizes = quantizer.codebooks.shape[-2]
    if sizes is None:
        raise TypeError(f"a {type(quantizer).__name__} does not say how many codes it has")
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def num_stages(model: VQVAE) -> int:
    """How many codes the model's quantiser gives for each vector; the model must be in evaluation
    mode."""
    parameter = next(model.parameters())
    sizes = [2 * model.downsampling] * model.spatial_dims
    with torch.no_grad():
        return len(by_stage(model, model.encode(parameter.new_zeros(1, model.channels, *sizes))))


def stage_sizes(model: VQVAE, stages: int) -> list[int]:
    """K of each of the first stages.

    Raises:
        ValueError: the model's quantiser has fewer.
    """
    sizes = codebook_sizes(model.quantizer)
    if 1 < len(sizes) < stages:
        raise ValueError(f"the model's quantizer has {len(sizes)} stages, not {stages}")
    return list(sizes[:stages] if len(sizes) >= stages else sizes * stages)


def by_stage(model: VQVAE, indices: Tensor) -> Tensor:
    """Indices ``(B, *grid[, Q])`` as ``(Q, B, *grid)``, Q 1 where there is one stage."""
    stages = indices.dim() > 1 + model.spatial_dims
    return indices.movedim(-1, 0) if stages else indices[None]


def count_codes(model: VQVAE, indices: Tensor) -> list[Tensor]:
    """How often each code occurs: for each stage float64 ``(K,)``.

    Args:
        model: whose quantiser made them.
        indices: ``(B, *grid[, Q])``.
    """
    grids = by_stage(model, indices)
    return [
        torch.bincount(grid.flatten(), minlength=size).double()
        for grid, size in zip(grids, stage_sizes(model, len(grids)), strict=True)
    ]
