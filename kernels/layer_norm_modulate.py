"""A modulated norm in Triton: the kernels of ``gated_residual_modulate`` without the branch."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.gated_residual_modulate import backward, forward, needed


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend ``triton`` of ``mmfast::layer_norm_modulate``."""
    from mmfast.ops.layer_norm_modulate import fake

    outputs = fake(x, shift, scale, weight, bias, eps, norm)
    forward(x, None, None, shift, scale, weight, bias, eps, norm, False, None, *outputs)
    return outputs


def layer_norm_modulate_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    """Backend ``triton`` of ``mmfast::layer_norm_modulate_bwd``."""
    from mmfast.ops.layer_norm_modulate import GRADIENTS, fake_bwd
    from mmfast.ops.modulation import frames_of

    outputs = fake_bwd(grad, x, mean, rstd, shift, scale, weight, bias, norm, *needs)
    backward(
        None, grad, x, mean, rstd, None, None, scale, weight, bias, frames_of(shift, scale), norm,
        False, needed(GRADIENTS, outputs, needs),
    )  # fmt: skip
    return outputs
