"""Dynamic thresholding: how far the clean sample may go, from its own values."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.schedule.layout import Layout, M, X


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    ratio: float = 0.995,
    maximum: float = 1.0,
) -> Tensor:
    """The threshold of each sample, for :func:`mmfast.sampler_step`.

    The quantile ``ratio`` of the absolute values of the predicted clean sample, at least 1
    and then at most ``maximum`` (Saharia et al. 2022, arXiv 2205.11487, section 2.3).

    Args:
        x: (B, ...).
        model_output: (B, ...).
        row: (columns,) of the table; its prediction takes no noise.
        unconditional: (B, ...), as of the step.
        guidance: (1 or B, 2), as of the step.
        ratio: quantile, from 0 to 1.
        maximum: above 0; below 1 it is the threshold.

    Returns:
        (B,) float32, or float64 if x is.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    output = model_output.to(dtype).flatten(1)
    if unconditional is not None and guidance is not None:
        on = row[Layout.GUIDANCE].to(dtype)
        factors = guidance.to(dtype)
        output = (1 + on * (factors[:, :1] - 1)) * output
        output = output + on * factors[:, 1:] * unconditional.to(dtype).flatten(1)
    weights = row[Layout.DENOISED : Layout.DENOISED + 2].to(dtype)
    clean = weights[X] * x.to(dtype).flatten(1) + weights[M] * output
    return torch.quantile(clean.abs(), ratio, dim=1).clamp(1.0, maximum)
