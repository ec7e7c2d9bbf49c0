"""Tiles of large samples: the result of the whole, in less memory."""

from __future__ import annotations

import pytest
import torch
from cases import normal

from mmfast.models import VQVAE, tiling
from mmfast.models.tiling import decode_in_tiles, encode_in_tiles, reach, side_of

D = 4
pytestmark = pytest.mark.usefixtures("one_thread")


def vqvae(spatial_dims=2, norm=None, quantizer=None, **options):
    torch.manual_seed(0)
    described = quantizer or {"type": "VectorQuantize", "dim": D, "codebook_size": 64}
    given = {"widths": (4, 6), "num_blocks": 1, "channels": 2, **options}
    return VQVAE(described, D, spatial_dims=spatial_dims, norm=norm, **given).eval()


@pytest.mark.parametrize(
    ("spatial_dims", "sizes", "tile", "options"),
    [
        (1, (150,), 10, {}),
        (2, (50, 86), 12, {}),
        (2, (34, 40), 2, {"shortcut": True}),
        (2, (80, 96), 16, {"widths": (4,), "patch_size": 4, "num_blocks": 2}),
        (2, (64, 96), 16, {"widths": (4, 4, 4)}),
        (3, (6, 36, 30), 12, {}),
        (
            2,
            (40, 44),
            8,
            {"quantizer": {"type": "ResidualFSQ", "levels": [5, 4], "dim": D, "num_quantizers": 2}},
        ),
    ],
)
def test_the_same_as_the_whole(spatial_dims, sizes, tile, options):
    """Without norms, what is beyond the tiles' surroundings does not matter."""
    model, x = vqvae(spatial_dims, **options).double(), normal(2, 2, *sizes).double()
    with torch.no_grad():
        indices = model.encode(x)
        whole = model.decode(indices)
    assert torch.equal(encode_in_tiles(model, x, tile), indices)
    decoded = decode_in_tiles(model, indices, tile)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, whole.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("widths", [(4,), (4, 4), (4, 4, 4)])
def test_reach(widths):
    """No cell beyond it has a gradient, and it is not much further than the last that has one."""
    model, side = vqvae(1, widths=widths, num_blocks=2).double(), 101
    latents = normal(1, D, side).double().requires_grad_(True)
    step = model.downsampling
    middle = model.decoder(latents)[..., 50 * step : 51 * step].sum()
    used = torch.autograd.grad(middle, latents)[0].abs().sum((0, 1)).nonzero()[:, 0]
    far = (used - 50).abs().max().item()
    assert reach(model) - 2 <= far <= reach(model)
    x = normal(1, 2, side * step).double().requires_grad_(True)
    used = torch.autograd.grad(model.latents(x)[..., 50].sum(), x)[0].abs().sum((0, 1))
    cells = used.nonzero()[:, 0] // step
    assert (cells - 50).abs().max() <= reach(model)


def test_norms_leave_no_seams():
    """With norms tiles differ from the whole, but pass into each other."""
    model = vqvae(norm="group")
    indices = torch.zeros(1, 40, 40, dtype=torch.int64)
    indices[:, :, 20:] = 50
    decoded = decode_in_tiles(model, indices, 20)
    with torch.no_grad():
        whole = model.decode(indices)
    assert not torch.allclose(decoded, whole)
    steps, smooth = (y.diff(dim=2).abs().max() for y in (decoded, whole))
    assert steps < smooth + 0.2 * (decoded - whole).abs().max() + 1e-6


def test_memory(monkeypatch):
    """What goes through the model at once is bounded, whatever the size."""
    model, seen = vqvae(), []
    monkeypatch.setattr(tiling, "LARGEST", 256)
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda module, x: seen.append(x[0][0, 0].numel()))
    indices = encode_in_tiles(model, normal(1, 2, 200, 120))
    largest = max(seen)
    halo = 2 * reach(model)
    assert largest == (16 + 2 * halo) ** 2
    assert len(seen) == 13 * 8
    seen.clear()
    decode_in_tiles(model, indices)
    assert max(seen) <= (8 + 2 * (reach(model) + 4)) ** 2
    encode_in_tiles(model, normal(1, 2, 200, 120), 0)
    assert seen[-1] == 200 * 120


def test_side():
    model = vqvae()
    assert side_of(model, (1000, 1000), None) >= 500
    assert side_of(model, (100000, 1000), None) == 724
    assert side_of(model, (100000, 1000), 0) >= 50000
    assert side_of(model, (100, 100), 1) == 1
    with pytest.raises(ValueError, match="tile must be at least 0, got -1"):
        side_of(model, (100, 100), -1)
