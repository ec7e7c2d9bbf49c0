"""Tables of cosines and sines for rotary position embeddings of one or more axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor | Sequence[int],
    dims: int | Sequence[int],
    *,
    theta: float = 10000.0,
    linear_factor: float = 1.0,
    ntk_factor: float = 1.0,
    before: int = 0,
    after: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin for :func:`mmfast.qk_norm_rope`, a number for each pair.

    Pair i of an axis that has d numbers of a head is rotated by position / linear_factor times
    (ntk_factor theta)^(-2i / d). The axes' pairs follow one another. Angles are float64.

    ================ ========================================= ====================================
    model            positions                                 dims
    ================ ========================================= ====================================
    Flux             ids, ``(L, 3)``                           ``(16, 56, 56)``
    Wan              frames, height, width, in patches         ``(E - 2d, d, d)``, d = 2 (E // 6)
    HunyuanVideo     frames, height, width, in patches         ``(16, 56, 56)``, theta 256
    CogVideoX        frames, height, width, in patches         ``(E / 4, 3E / 8, 3E / 8)``, before
    Lumina2          ids, ``(B, L, 3)``                        ``(32, 32, 32)``
    a language model ``(L,)``                                  ``E``
    ================ ========================================= ====================================

    Args:
        positions: the sizes of a grid, whose tokens are numbered with the last axis fastest; or
            the tokens' positions, ``(L, axes)`` or ``(B, L, axes)``, of any real dtype.
        dims: numbers of a head that each axis rotates: even, R together.
        theta: the base of the frequencies.
        linear_factor: by which positions are divided.
        ntk_factor: by which theta is multiplied.
        before, after: tokens that are not rotated, in front of the others and behind them.
        dtype, device: of the tables; the device of given positions is theirs.

    Returns:
        cos and sin, ``(L, R / 2)`` or ``(B, L, R / 2)``, with ``before`` and ``after`` among L.

    Raises:
        ValueError: dims are odd or not one for each axis, or a size is negative.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), eq.
    15; for several axes Heo et al., "Rotary Position Embedding for Vision Transformer" (2024).
    """
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    if not dims or any(d % 2 or d < 0 for d in dims):
        raise ValueError(f"dims must be even and at least 0, got {dims}")
    if isinstance(positions, Tensor):
        if positions.dim() not in (2, 3) or positions.shape[-1] != len(dims):
            raise ValueError(
                f"positions must be (L, axes) or (B, L, axes) with {len(dims)} axes, one for each "
                f"of dims, got {tuple(positions.shape)}"
            )
        # As each axis is another column: [..., L]
        axes = positions.to(device or positions.device, torch.float64).unbind(-1)
    else:
        sizes = tuple(positions)
        if len(sizes) != len(dims) or any(size < 0 for size in sizes):
            raise ValueError(f"sizes must be {len(dims)}, one for each of dims, got {sizes}")
        ranges = [torch.arange(size, dtype=torch.float64, device=device) for size in sizes]
        axes = tuple(axis.reshape(-1) for axis in torch.meshgrid(*ranges, indexing="ij"))
    if min(before, after) < 0:
        raise ValueError(f"before and after must be at least 0, got {before} and {after}")
    angles = []
    for axis, d in zip(axes, dims, strict=True):
        exponents = torch.arange(0, d, 2, dtype=torch.float64, device=axis.device) / max(d, 1)
        frequencies = torch.exp(exponents * -math.log(theta * ntk_factor)) / linear_factor
        angles.append(axis.unsqueeze(-1) * frequencies)  # [..., L, d / 2]
    # A position of 0 is no rotation.
    angle = torch.nn.functional.pad(torch.cat(angles, -1), (0, 0, before, after))
    return angle.cos().to(dtype), angle.sin().to(dtype)
