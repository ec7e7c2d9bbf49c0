"""Gated residuals of modules that may run under autocast, where a branch has a lower dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mmfast


def _promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their sum."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def add(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """``x + gate y``, (B, L, C)."""
    x, y = _promoted(x, y)
    return mmfast.gated_residual(x, gate, y)


def add_and_modulate(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    **norm: Any,
) -> tuple[Tensor, Tensor]:
    """``r = x + gate y`` and ``norm(r) (1 + scale) + shift``, (B, L, C) both.

    Args:
        norm: keyword arguments of :func:`mmfast.gated_residual_modulate`.
    """
    x, y = _promoted(x, y)
    return mmfast.gated_residual_modulate(x, gate, y, shift, scale, **norm)
