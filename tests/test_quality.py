"""PSNR and SSIM by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from cases import normal

from mmfast.quality import psnr, ssim


def test_psnr():
    x = torch.zeros(3, 4)
    assert psnr(x, x + 0.02) == pytest.approx(40, rel=1e-5)
    assert psnr(x.to(torch.uint8), torch.full((3, 4), 255, dtype=torch.uint8), 255) == 0
    assert psnr(x, x) == math.inf
    with pytest.raises(ValueError, match=r"one shape, got \(3, 4\), \(4, 3\)"):
        psnr(x, x.T)


def test_ssim():
    pytest.importorskip("skimage.metrics")
    x, noise = normal(3, 16, 12).clamp(-1, 1), normal(3, 16, 12, seed=1)
    assert ssim(x, x) == pytest.approx(1)
    near, far = (ssim(x, (x + s * noise).clamp(-1, 1)) for s in (0.1, 0.5))
    assert 1 > near > far > 0
    assert ssim(x[:, :6], x[:, :6]) is None
