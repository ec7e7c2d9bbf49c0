"""How near a reconstruction is to its original."""

from __future__ import annotations

import torch
from torch import Tensor

_WINDOW = 7  # side of the windows that SSIM compares


def psnr(x: Tensor, y: Tensor, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio of two tensors of one shape, in dB; infinite if they are equal.

    Args:
        x, y: any numbers.
        peak: between their least and largest value: 2 for [-1, 1], 255 for bytes.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {tuple(x.shape)}, {tuple(y.shape)}")
    error = (x.double() - y.double()).square().mean()
    return float(10 * torch.log10(peak**2 / error))


def ssim(x: Tensor, y: Tensor) -> float | None:
    """Structural similarity of two images ``(C, height, width)`` in [-1, 1]: 1 if they are equal.

    That of scikit-image. None for images of less than 7 pixels in height or width.

    Raises:
        ImportError: scikit-image is not installed.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity"
    (2004).
    """
    from mmfast.data.errors import needed

    metrics = needed("skimage.metrics", "examples")
    if min(x.shape[1:]) < _WINDOW:
        return None
    images = x.cpu().numpy(), y.cpu().numpy()
    return float(metrics.structural_similarity(*images, channel_axis=0, data_range=2.0))
