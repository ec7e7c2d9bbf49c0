"""diffusers: adaptive layer norms, each in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations.binding import Library, Method, Swap, method_of
from mmfast.integrations.norms import is_computed, kind_of, modulated, moved


class AdaLayerNormZero:
    def forward(
        self: Any,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Modulated tokens (B, L, C), and the gate, shift, scale, gate (B, C) for what follows."""
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulated(self.norm, x, shift, scale), *rest


class AdaLayerNormZeroSingle:
    def forward(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Modulated tokens (B, L, C) and the gate (B, C)."""
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return modulated(self.norm, x, shift, scale), gate


class AdaLayerNormContinuous:
    def forward(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """Modulated tokens (B, L, C)."""
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = emb.chunk(2, dim=1)
        return modulated(self.norm, x, shift, scale)


class SD35AdaLayerNormZeroX:
    def forward(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        """Tokens modulated for two attentions, and what AdaLayerNormZero gives besides."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.linear(
            self.silu(emb)
        ).chunk(9, dim=1)
        if is_computed(self.norm):
            first = modulated(self.norm, hidden_states, shift, scale)
            second = modulated(self.norm, hidden_states, shift2, scale2)
        else:  # called once, as its hooks expect
            normed, dtype = self.norm(hidden_states), hidden_states.dtype
            first = moved(normed, dtype, shift, scale)
            second = moved(normed, dtype, shift2, scale2)
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


_NORMS: dict[str, Callable[..., Any]] = {
    "AdaLayerNormZero": AdaLayerNormZero.forward,
    "AdaLayerNormZeroSingle": AdaLayerNormZeroSingle.forward,
    "AdaLayerNormContinuous": AdaLayerNormContinuous.forward,
    "SD35AdaLayerNormZeroX": SD35AdaLayerNormZeroX.forward,
}


def _match(module: nn.Module) -> Method | None:
    return method_of(module, "diffusers.models.normalization", _NORMS)


def matches(module: nn.Module) -> bool:
    return _match(module) is not None


def swap(module: nn.Module) -> Swap:
    method = _match(module)
    assert method is not None  # it matched
    if kind_of(module.norm) is None:
        return Swap(left=f"its norm is a {type(module.norm).__name__}")
    return Swap((method,), done="norm and modulation")


LIBRARY = Library("diffusers", tuple(_NORMS), matches, swap)
