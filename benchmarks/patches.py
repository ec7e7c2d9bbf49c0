"""Real data: patches of the photographs that scikit-image ships, and codebooks learned on them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

import mmfast

COUNT = 65536
PATCH = 4
STEP = 4  # pixels from one patch to the next; larger patches overlap

_ITERATIONS = 8


def photographs() -> list[np.ndarray]:
    """uint8 (height, width, 3) each."""
    from skimage import data

    left, right, _ = data.stereo_motorcycle()
    return [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), left, right]


def dimensions(patch: int = PATCH) -> int:
    """Of so many pixels squared."""
    return patch * patch * 3


@functools.cache
def patches(patch: int = PATCH) -> Tensor:
    """(COUNT, dimensions) float32 in 0 to 1, in a random order that never changes."""
    rows = []
    for picture in photographs():
        windows = np.lib.stride_tricks.sliding_window_view(picture, (patch, patch), axis=(0, 1))
        grid = windows[::STEP, ::STEP].transpose(0, 1, 3, 4, 2)  # colours last
        rows.append(grid.reshape(-1, dimensions(patch)))
    everything = torch.from_numpy(np.concatenate(rows))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    return everything[order[:COUNT]].float() / 255


@functools.cache
def codebook(num_codes: int, patch: int = PATCH) -> Tensor:
    """(num_codes, dimensions) float32, by k-means on :func:`patches`, on a GPU if there is one."""
    vectors = patches(patch).to("cuda" if torch.cuda.is_available() else "cpu")
    return mmfast.kmeans(vectors, num_codes, iterations=_ITERATIONS, tolerance=0).codebook.cpu()
