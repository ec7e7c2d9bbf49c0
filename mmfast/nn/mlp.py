"""The feed-forward part of a transformer's block."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.checks import check_choice
from mmfast.nn.layers import linear
from mmfast.ops.gated_activation import ACTIVATIONS, geglu, swiglu

GATED = ("geglu", "geglu_tanh", "swiglu")


class MLP(nn.Module):
    """Two linear layers around an activation; ``fc1`` and ``fc2``, as in timm's ``Mlp``.

    Args:
        dim: of the tokens.
        hidden_dim: between the layers; 4 ``dim`` by default.
        activation: ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``; or with a gate, for which ``fc1``
            makes twice ``hidden_dim``: ``"geglu"``, ``"geglu_tanh"`` or ``"swiglu"``.
        gate: which half of ``fc1``'s output the gate is: ``"last"``, as in diffusers, or
            ``"first"``, as in Flux 2.
        bias: whether the layers have one.
        out_dim: of the result; ``dim`` by default.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        activation: str = "gelu_tanh",
        gate: str = "last",
        bias: bool = True,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, (*ACTIVATIONS, *GATED))
        check_choice("gate", gate, ("first", "last"))
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.activation, self.gate = activation, gate
        self.fc1 = nn.Linear(dim, hidden_dim * (2 if activation in GATED else 1), bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim, bias=bias)

    def extra_repr(self) -> str:
        """The activation."""
        return self.activation + f", gate={self.gate}" * (self.activation in GATED)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` to ``(..., out_dim)``."""
        hidden = linear(self.fc1, x)
        if self.activation == "swiglu":
            hidden = swiglu(hidden, gate=self.gate)
        elif self.activation in GATED:
            approximate = "none" if self.activation == "geglu" else "tanh"
            hidden = geglu(hidden, approximate=approximate, gate=self.gate)
        else:
            return linear(self.fc2, hidden, self.activation)
        return linear(self.fc2, hidden)
