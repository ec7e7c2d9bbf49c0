"""Heights and widths of pictures: what to scale to, and what to cut off."""

from __future__ import annotations

from collections.abc import Sequence

Size = tuple[int, int]


def checked_size(size: int | Sequence[int]) -> Size:
    """``(height, width)``, equal where one number is given.

    Raises:
        ValueError: it is neither, or below 1.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size must be a side or (height, width), at least 1, got {size}")
    return sides


def covering(have: Size, want: Size) -> Size:
    """The smallest size of the same shape as ``have`` that covers ``want``."""
    scale = max(want[0] / have[0], want[1] / have[1])
    return max(round(have[0] * scale), want[0]), max(round(have[1] * scale), want[1])
