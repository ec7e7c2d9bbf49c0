"""layer_norm_modulate against PyTorch's own samples of its norms."""

from __future__ import annotations

import pytest
import torch
from cases import backends_here, device_of, normal
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

import mmfast
from mmfast.ops import layer_norm_modulate

SAMPLED = {
    op.name: op for op in op_db if op.name in ("nn.functional.layer_norm", "nn.functional.rms_norm")
}


@pytest.mark.parametrize("backend", backends_here(layer_norm_modulate.OP))
@pytest.mark.parametrize("name", SAMPLED)
def test_samples_of_torch(backend, name):
    checked = 0
    for sample in SAMPLED[name].sample_inputs("cpu", torch.float64, requires_grad=False):
        x, (shape, *more) = sample.input, sample.args
        weight, bias, *_ = (*more, None, None)
        weight = sample.kwargs.get("weight", weight)
        bias = sample.kwargs.get("bias", bias)
        eps = sample.kwargs.get("eps")
        if len(shape) != 1 or x.dim() < 2 or x.shape[-1] == 0 or (eps is not None and eps < 0):
            continue
        norm = "layer" if "layer" in name else "rms"
        eps = eps if eps is not None else 1e-5
        if norm == "layer":
            want = F.layer_norm(x, shape, weight, bias, eps)
        else:
            bias, want = None, F.rms_norm(x, shape, weight, eps)
        device = device_of(backend)
        x, weight, bias = (t if t is None else t.to(device) for t in (x, weight, bias))
        with mmfast.use_backend(backend):
            got = mmfast.layer_norm_modulate(
                x, None, None, eps=eps, norm=norm, weight=weight, bias=bias
            )
        torch.testing.assert_close(got.cpu(), want)
        checked += 1
    assert checked


def test_permuted_images():
    """(B, C, H, W) as (B, H, W, C)."""
    image = normal(2, 24, 5, 7)
    shift, scale = normal(2, 48, seed=1).chunk(2, -1)
    x = image.permute(0, 2, 3, 1)
    got = mmfast.layer_norm_modulate(x, shift, scale)
    assert torch.equal(got, mmfast.layer_norm_modulate(x.contiguous(), shift, scale))
    assert got.shape == x.shape
