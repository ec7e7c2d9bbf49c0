"""Pictures of samples and reconstructions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def as_images(samples: Tensor, *, frames: int = 4) -> Tensor:
    """Samples of any modality as images.

    Args:
        samples: images ``(N, C, H, W)``, C 1, 3 or 4, whose fourth is the opacity; videos
            ``(N, C, T, H, W)``, of which some frames are put side by side; spectrograms
            ``(N, bands, T)``, the lowest band at the bottom; or waveforms ``(N, 1, T)``, drawn as
            what they cover. Values are from -1 to 1.
        frames: of a video.

    Returns:
        ``(N, 1 or 3, H, W)``.

    Raises:
        ValueError: the samples are of another shape.
    """
    if samples.dim() == 5:
        count = min(frames, samples.shape[2])
        chosen = torch.linspace(0, samples.shape[2] - 1, count).round().long()
        return torch.cat([samples[:, :, i] for i in chosen.tolist()], dim=3)
    if samples.dim() == 3 and samples.shape[1] > 1:
        return samples[:, None].flip(2)
    if samples.dim() == 3:
        return _drawn(samples[:, 0])
    if samples.dim() != 4 or samples.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"samples must be images (N, 1, 3 or 4, H, W), videos or signals, "
            f"got {tuple(samples.shape)}"
        )
    if samples.shape[1] == 4:  # on white
        opaque = (samples[:, 3:].clamp(-1, 1) + 1) / 2
        return torch.lerp(torch.ones_like(samples[:, :3]), samples[:, :3], opaque)
    return samples


def _drawn(waveforms: Tensor, height: int = 64, width: int = 256) -> Tensor:
    """Waveforms ``(N, T)`` in black on white: each column from the least value to the largest."""
    pieces = waveforms.float().cpu().tensor_split(min(width, waveforms.shape[1]), dim=1)
    low, high = (
        torch.stack([by(piece, 1) for piece in pieces], 1)[:, None]
        for by in (torch.amin, torch.amax)
    )
    rows = torch.linspace(1, -1, height)[None, :, None]
    half = 1 / height
    covered = (rows >= low - half) & (rows <= high + half)  # [N, height, columns]
    return 1 - 2 * covered[:, None].float()
