"""Norms of other libraries' models, with the modulation and the gated residual beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations.binding import loaded_class
from mmfast.integrations.residuals import add, add_and_modulate
from mmfast.nn.layers import is_bare


def kind_of(norm: Any) -> str | None:
    """``"layer"``, ``"rms"``, or None for a norm of another kind."""
    if type(norm) is nn.LayerNorm:
        return "layer" if len(norm.normalized_shape) == 1 else None
    forward = type(norm).forward
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        if len(norm.normalized_shape) != 1:
            return None
        if forward is nn.RMSNorm.forward:
            return "rms"
        if forward is nn.LayerNorm.forward:
            return "layer"
        fp32 = loaded_class("diffusers.models.normalization", "FP32LayerNorm")
        return "layer" if forward is getattr(fp32, "forward", None) else None
    theirs = loaded_class("diffusers.models.normalization", "RMSNorm")
    return "rms" if type(norm) is theirs else None


def is_computed(norm: nn.Module) -> bool:
    """Whether a call of it is no more than what our kernels compute; else it is to be called."""
    return _kind_if_computed(norm) is not None


def _kind_if_computed(norm: Any) -> str | None:
    kind = kind_of(norm)
    return None if kind is None or "forward" in vars(norm) or not is_bare(norm) else kind


def options(norm: Any, x: Tensor) -> dict[str, Any]:
    """What :func:`mmfast.layer_norm_modulate` is to be told of a norm, for ``x``."""
    return _options(norm, kind_of(norm), x.dtype)


def _options(norm: Any, kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    eps = norm.eps
    if eps is None:  # of the dtype that torch.rms_norm computes in
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return {
        "norm": kind,
        "eps": eps,
        "weight": _parameter(norm, "weight"),
        # torch's has none, and would be long in looking for it.
        "bias": None if isinstance(norm, nn.RMSNorm) else _parameter(norm, "bias"),
    }


def _parameter(norm: nn.Module, name: str) -> Any:
    """An attribute, None where there is none; modules look for a parameter last, and slowly."""
    parameters = norm._parameters
    if name in parameters and name not in vars(norm):
        return parameters[name]
    return getattr(norm, name, None)


def modulated(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """``norm(x) (1 + scale) + shift``, (B, L, C)."""
    kind = _kind_if_computed(norm)
    if kind is not None:
        return mmfast.layer_norm_modulate(x, shift, scale, **_options(norm, kind, x.dtype))
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
    kind = _kind_if_computed(norm)
    if kind is not None:
        options = _options(norm, kind, torch.promote_types(x.dtype, y.dtype))
        return add_and_modulate(x, gate, y, shift, scale, **options)
    x = add(x, gate, y)
    return x, modulated(norm, x, shift, scale)
