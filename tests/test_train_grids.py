"""Pictures of samples of each modality."""

from __future__ import annotations

import pytest
import torch
from cases import normal

from mmfast.train import as_images, grid


def test_grid():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 10
    picture = grid(images, columns=2, gap=1)
    assert picture.shape == (1, 3 * 3 - 1, 2 * 4 - 1)
    for i in range(5):
        top, left = i // 2 * 3, i % 2 * 4
        assert torch.equal(picture[:, top : top + 2, left : left + 3], images[i])
    between = [picture[0, 2], picture[0, 5], picture[0, :, 3], picture[0, 6:, 4:]]
    assert all((white == 1).all() for white in between)
    assert grid(images[:1]).shape == (1, 2, 3)
    assert grid(images).shape == (1, 2 * 4 - 2, 3 * 5 - 2)


def test_images_of_modalities():
    images = normal(2, 3, 4, 5)
    assert as_images(images) is images
    video = normal(2, 1, 7, 4, 5)
    got = as_images(video, frames=3)
    assert torch.equal(got, torch.cat([video[:, :, i] for i in (0, 3, 6)], 3))
    assert as_images(video[:, :, :2]).shape == (2, 1, 4, 2 * 5)
    mel = normal(2, 6, 9)
    assert torch.equal(as_images(mel), mel[:, None].flip(2))


def test_waveforms():
    """A sine is drawn where it is: the black of each column covers its values."""
    wave = torch.sin(torch.linspace(0, 6.28, 1024)).view(1, 1, -1)
    picture = as_images(wave)[0, 0]
    assert picture.shape == (64, 256)
    assert set(picture.unique().tolist()) == {-1.0, 1.0}
    rows = torch.linspace(1, -1, 64)
    for column in (0, 63, 128, 200):
        black = rows[picture[:, column] < 0]
        values = wave[0, 0, 4 * column : 4 * column + 4]
        assert black.min() - 1 / 32 <= values.min() <= values.max() <= black.max() + 1 / 32
        assert black.max() - black.min() < 0.2


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 4, 4), (0, 1, 4, 4)])
def test_refuses(shape):
    with pytest.raises(ValueError, match=r"images must be \(N, 1 or 3, H, W\), got"):
        grid(torch.zeros(shape))
    if shape != (0, 1, 4, 4):
        with pytest.raises(ValueError, match="samples must be images"):
            as_images(torch.zeros(shape))
