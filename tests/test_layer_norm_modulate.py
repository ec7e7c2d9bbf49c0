"""layer_norm_modulate beside PyTorch's norms."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import backends_here, device_of, normal
from torch.nn import functional as F

import mmfast
from mmfast.ops import layer_norm_modulate


@pytest.mark.parametrize("backend", backends_here(layer_norm_modulate.OP))
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (2, 3), (2, 2, 3), (0, 1), (2, 0, 3), (1, 2, 3, 5)]
)
def test_norms_of_torch(backend, norm, shape):
    device, sizes = device_of(backend), shape[-1:]
    x = normal(*shape, dtype=torch.float64).to(device)
    for has_weight, has_bias, eps in itertools.product((0, 1), (0, norm == "layer"), (1e-6, 0.5)):
        weight = normal(*sizes, seed=1, dtype=torch.float64).to(device) if has_weight else None
        bias = normal(*sizes, seed=2, dtype=torch.float64).to(device) if has_bias else None
        if norm == "layer":
            want = F.layer_norm(x, sizes, weight, bias, eps)
        else:
            want = F.rms_norm(x, sizes, weight, eps)
        with mmfast.use_backend(backend):
            got = mmfast.layer_norm_modulate(
                x, None, None, eps=eps, norm=norm, weight=weight, bias=bias
            )
        torch.testing.assert_close(got, want)


def test_permuted_images():
    """(B, C, H, W) as (B, H, W, C)."""
    image = normal(2, 24, 5, 7)
    shift, scale = normal(2, 48, seed=1).chunk(2, -1)
    x = image.permute(0, 2, 3, 1)
    got = mmfast.layer_norm_modulate(x, shift, scale)
    assert torch.equal(got, mmfast.layer_norm_modulate(x.contiguous(), shift, scale))
    assert got.shape == x.shape
