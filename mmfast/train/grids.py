"""Pictures of samples and reconstructions."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from mmfast.files import replacing


def grid(images: Tensor, *, columns: int | None = None, gap: int = 2) -> Tensor:
    """Images side by side, as one picture.

    Args:
        images: ``(N, C, H, W)``, C 1 or 3, in [-1, 1].
        columns: of the grid; about as many as rows by default.
        gap: between images, in pixels, white.

    Returns:
        ``(C, height, width)``, on the CPU.

    Raises:
        ValueError: ``images`` has another shape.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be (N, 1 or 3, H, W), got {tuple(images.shape)}")
    images = images.detach().float().cpu()
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    picture = images.new_ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[:, top : top + height, left : left + width] = image
    return picture


def write_png(path: Path, picture: Tensor) -> None:
    """Write a picture ``(C, H, W)``, C 1 or 3, in [-1, 1], as a PNG file, whole or not at all.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: the picture has another shape.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("Pillow is not installed: pip install 'mmfast[train]'") from None
    if picture.dim() != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"a picture must be (1 or 3, H, W), got {tuple(picture.shape)}")
    levels = (picture.detach().float().cpu() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    pixels = levels[0] if levels.shape[0] == 1 else levels.permute(1, 2, 0)
    with replacing(path) as temporary:
        Image.fromarray(pixels.numpy()).save(temporary, "PNG")
