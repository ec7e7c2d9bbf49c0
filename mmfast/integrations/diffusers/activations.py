"""diffusers: the activations of its feed-forwards, with the gating, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import mmfast
from mmfast.integrations.binding import Library, Method, Swap, method_of


class GELU:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """(..., C)"""
        name = "gelu" if self.approximate == "none" else "gelu_tanh"
        return mmfast.gated_activation(self.proj(hidden_states), activation=name)


class GEGLU:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., C) of a projection (..., 2 C)."""
        if args or kwargs.get("scale") is not None:
            return type(self).forward(self, hidden_states, *args, **kwargs)
        return mmfast.geglu(self.proj(hidden_states))


class SwiGLU:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """(..., C) of a projection (..., 2 C)."""
        return mmfast.swiglu(self.proj(hidden_states))


_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "GELU": GELU.forward,
    "GEGLU": GEGLU.forward,
    "SwiGLU": SwiGLU.forward,
}


def _match(module: nn.Module) -> Method | None:
    return method_of(module, "diffusers.models.activations", _ACTIVATIONS)


def matches(module: nn.Module) -> bool:
    return _match(module) is not None


def swap(module: nn.Module) -> Swap:
    method = _match(module)
    assert method is not None  # it matched
    return Swap((method,), done="activation")


LIBRARY = Library("diffusers", tuple(_ACTIVATIONS), matches, swap)
