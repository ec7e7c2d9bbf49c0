"""Real data: patches of the photographs that scikit-image ships, and codebooks learned on them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

import mmfast

COUNT = 65536
PATCH = 4
DIMENSIONS = PATCH * PATCH * 3

_ITERATIONS = 8


def photographs() -> list[np.ndarray]:
    """uint8 (height, width, 3) each."""
    from skimage import data

    left, right, _ = data.stereo_motorcycle()
    return [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), left, right]


@functools.cache
def patches() -> Tensor:
    """(COUNT, DIMENSIONS) float32 in 0 to 1, in a random order that never changes."""
    rows = []
    for picture in photographs():
        height, width = (size // PATCH * PATCH for size in picture.shape[:2])
        grid = picture[:height, :width].reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3)
        rows.append(grid.transpose(0, 2, 1, 3, 4).reshape(-1, DIMENSIONS))
    everything = torch.from_numpy(np.concatenate(rows))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    return everything[order[:COUNT]].float() / 255


@functools.cache
def codebook(num_codes: int) -> Tensor:
    """(num_codes, DIMENSIONS) float32, by k-means on :func:`patches`."""
    return mmfast.kmeans(patches(), num_codes, iterations=_ITERATIONS, tolerance=0).codebook
