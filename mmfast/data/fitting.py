"""Pictures scaled and cut to a size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator

from mmfast.data.errors import needed

Size = tuple[int, int]
Box = tuple[float, float, float, float]

FITS = ("crop", "stretch")


def checked_size(size: int | Sequence[int]) -> Size:
    """``(height, width)``, equal where one number is given.

    Raises:
        ValueError: it is neither, or below 1.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size must be a side or (height, width), at least 1, got {size}")
    return sides


def kept(have: Size, want: Size, fit: str, generator: Generator | None = None) -> Box:
    """The part of a picture that is scaled to ``want``: left, top, right and bottom.

    Args:
        have: height and width of the picture.
        want: height and width of the result.
        fit: ``"stretch"`` keeps all; ``"crop"`` the largest part that has the shape of ``want``.
        generator: where that part lies; in the middle if None.
    """
    if fit == "stretch":
        return 0.0, 0.0, float(have[1]), float(have[0])
    scale = max(w / h for w, h in zip(want, have, strict=True))
    height, width = (min(w / scale, h) for w, h in zip(want, have, strict=True))
    share = (0.5, 0.5) if generator is None else torch.rand(2, generator=generator).tolist()
    top, left = share[0] * (have[0] - height), share[1] * (have[1] - width)
    return left, top, min(left + width, have[1]), min(top + height, have[0])


def resized(
    frames: Sequence[np.ndarray], want: Size, fit: str = "crop", generator: Generator | None = None
) -> list[np.ndarray]:
    """Frames of one size, uint8 ``(height, width, 3)``, all of them scaled and cut alike."""
    box = kept(frames[0].shape[:2], want, fit, generator)
    image = needed("PIL.Image")
    return [np.asarray(fitted(image.fromarray(frame), want, box)) for frame in frames]


def fitted(image: Any, want: Size, box: Box) -> Any:
    """That part of a ``PIL.Image.Image``, scaled bicubically with antialiasing."""
    return image.resize(want[::-1], needed("PIL.Image").Resampling.BICUBIC, box=box)
