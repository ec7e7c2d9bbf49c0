"""Losses of reconstructions: what they measure, and in a VQVAE."""

from __future__ import annotations

import math

import pytest
import torch
from cases import normal

import mmfast.nn
from mmfast.models import VQVAE, load_model, save_model
from mmfast.models.losses import LOSSES, gradient, multi_scale, spectral, weighted


@pytest.mark.parametrize("sizes", [(300,), (6, 5), (3, 4, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_zero_for_the_same_and_else_not(name, sizes):
    if name == "spectral" and len(sizes) > 1:
        pytest.skip("of sounds")
    x = normal(2, 3, *sizes)
    made = (x + 0.1 * normal(2, 3, *sizes, seed=1)).requires_grad_()
    assert LOSSES[name](x, x) < 1e-6
    loss = LOSSES[name](made, x)
    assert loss > 0.005
    loss.backward()
    assert made.grad.isfinite().all()
    assert made.grad.count_nonzero() > 0


def test_gradient_sees_edges_and_no_offset():
    x = normal(2, 3, 6, 8)
    assert gradient(x + 2, x) < 1e-6
    ramp = x + torch.arange(8.0)
    torch.testing.assert_close(gradient(ramp, x), torch.tensor(0.5))  # 1 along, 0 across


def test_multi_scale_is_gentler_to_what_averages_out():
    x = normal(1, 1, 16, 16)
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    torch.testing.assert_close(multi_scale(x + checks, x), torch.tensor(0.25))
    torch.testing.assert_close(multi_scale(x + 1, x), torch.tensor(1.0))


def test_spectral_hears_pitch_and_loudness_not_phase():
    time, hiss = torch.arange(2048) / 2048, 0.05 * normal(2048)

    def tone(pitch, phase=0.0, loudness=1.0):
        return (loudness * torch.sin(2 * math.pi * pitch * time + phase) + hiss)[None, None]

    shifted, quiet, other = tone(100, phase=1.5), tone(100, loudness=0.5), tone(150)
    heard = [float(spectral(made, tone(100))) for made in (shifted, quiet, other)]
    seen = [float(LOSSES["l2"](made, tone(100))) for made in (shifted, quiet, other)]
    assert heard[0] < heard[1] < heard[2]
    assert seen[1] < seen[0]
    silence = torch.zeros(1, 1, 2048, requires_grad=True)
    spectral(silence, tone(100)).backward()
    assert silence.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"samples at least 256, got \(1, 1, 100\)"):
        spectral(silence[..., :100], silence[..., :100])


def test_in_a_vqvae(tmp_path):
    weights = {"l1": 1.0, "gradient": 0.5}
    quantizer = {"type": "VectorQuantize", "dim": 4, "codebook_size": 8}
    vqvae = VQVAE(quantizer, 4, widths=(4, 8), num_blocks=1, reconstruction=weights).eval()
    x = normal(2, 3, 8, 8)
    made = vqvae(x)
    expected = (made.reconstruction - x).abs().mean() + 0.5 * gradient(made.reconstruction, x)
    torch.testing.assert_close(made.reconstruction_loss, expected)
    save_model(vqvae, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")(x)
    torch.testing.assert_close(again.reconstruction_loss, expected)
    for wrong in ({}, {"l1": -1.0}, {"ssim": 1.0}):
        with pytest.raises(ValueError, match="reconstruction must"):
            weighted(wrong)
    assert isinstance(vqvae.quantizer, mmfast.nn.VectorQuantize)
