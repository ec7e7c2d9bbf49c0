"""Norms of other libraries' models, with the modulation and the gated residual beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations.binding import loaded_class
from mmfast.integrations.residuals import add, add_and_modulate
from mmfast.nn.layers import is_plain


def kind_of(norm: Any) -> str | None:
    """``"layer"``, ``"rms"``, or None for a norm of another kind."""
    if type(norm) is nn.LayerNorm:
        return "layer" if len(norm.normalized_shape) == 1 else None
    forward = type(norm).forward
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        fp32 = loaded_class("diffusers.models.normalization", "FP32LayerNorm")
        if len(norm.normalized_shape) != 1:
            return None
        if forward is nn.RMSNorm.forward:
            return "rms"
        return (
            "layer" if forward in (nn.LayerNorm.forward, getattr(fp32, "forward", None)) else None
        )
    theirs = loaded_class("diffusers.models.normalization", "RMSNorm")
    return "rms" if type(norm) is theirs else None


def is_computed(norm: nn.Module) -> bool:
    """Whether a call of it is no more than what our kernels compute; else it is to be called."""
    return kind_of(norm) is not None and is_plain(norm, type(norm))


def options(norm: Any, x: Tensor) -> dict[str, Any]:
    """What :func:`mmfast.layer_norm_modulate` is to be told of a norm, for ``x``."""
    eps = norm.eps
    if eps is None:  # of the dtype that torch.rms_norm computes in
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    weight, bias = norm.weight, getattr(norm, "bias", None)
    return {"norm": kind_of(norm), "eps": eps, "weight": weight, "bias": bias}


def modulated(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """``norm(x) (1 + scale) + shift``, (B, L, C)."""
    if is_computed(norm):
        return mmfast.layer_norm_modulate(x, shift, scale, **options(norm, x))
    return moved(norm(x), x.dtype, shift, scale)


def moved(y: Tensor, dtype: torch.dtype, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """``y (1 + scale) + shift``."""
    if scale is not None:
        y = y * (1 + _over_tokens(scale))
    if shift is not None:
        y = y + _over_tokens(shift)
    return y.to(dtype)


def _over_tokens(modulation: Tensor) -> Tensor:
    """One for each sample (B, C), as (B, 1, C); what has tokens already, as it is."""
    return modulation[:, None] if modulation.dim() == 2 else modulation


def next_branch(
    norm: nn.Module,
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x + gate y`` and ``norm(r) (1 + scale) + shift``, (B, L, C) both."""
    if is_computed(norm):
        return add_and_modulate(x, gate, y, shift, scale, **options(norm, x))
    x = add(x, gate, y)
    return x, modulated(norm, x, shift, scale)
