"""A gated residual in Triton: the kernels of ``gated_residual_modulate`` without the norm."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.gated_residual_modulate import backward, forward, needed


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, gate_activation: str) -> Tensor:
    """Backend ``triton`` of ``mmfast::gated_residual``."""
    out = x.new_empty(x.shape)
    tanh = gate_activation == "tanh"
    forward(x, gate, y, None, None, None, None, 0.0, None, tanh, out, None, None, None)
    return out


def gated_residual_bwd(
    grad: Tensor, gate: Tensor, y: Tensor, gate_activation: str, need_gate: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Backend ``triton`` of ``mmfast::gated_residual_bwd``."""
    from mmfast.ops.gated_residual import fake_bwd

    outputs = fake_bwd(grad, gate, y, gate_activation, need_gate, need_y)
    backward(
        grad, None, grad, None, None, gate, y, None, None, None, gate.shape[1], None,
        gate_activation == "tanh", needed(("gate", "y"), outputs, (need_gate, need_y)),
    )  # fmt: skip
    return outputs
