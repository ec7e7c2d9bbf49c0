"""layer_norm_modulate beside PyTorch's norms."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import backends_here, device_of, normal, samples_of_pytorch
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


@pytest.mark.parametrize("backend", backends_here(layer_norm_modulate.OP))
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_samples_of_pytorch(backend, norm):
    function, count = getattr(F, f"{norm}_norm"), 0
    default = 1e-5 if norm == "layer" else torch.finfo(torch.float64).eps
    for inputs, options in samples_of_pytorch(
        f"nn.functional.{norm}_norm", torch.float64, device_of(backend)
    ):
        x, sizes, *given = inputs
        options = dict(zip(("weight", "bias", "eps"), given, strict=False)) | options
        if len(sizes) != 1 or x.dim() < 2:  # a norm of more dimensions than the last
            continue
        eps = options.pop("eps", None)
        tensors = [x, options.get("weight"), options.get("bias")]
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        weight, bias = leaves[1:]
        affine = (weight, bias) if norm == "layer" else (weight,)
        want = function(leaves[0], sizes, *affine, default if eps is None else eps)
        with mmfast.use_backend(backend):
            got = mmfast.layer_norm_modulate(
                leaves[0], None, None, weight=weight, bias=bias, norm=norm,
                eps=default if eps is None else eps,
            )  # fmt: skip
            torch.testing.assert_close(got, want)
            grad, wanted = normal(*x.shape).to(want), [t for t in leaves if t is not None]
            gradients = torch.autograd.grad(got, wanted, grad)
        torch.testing.assert_close(gradients, torch.autograd.grad(want, wanted, grad))
        count += 1
    assert count > 1


def test_permuted_images():
    """(B, C, H, W) as (B, H, W, C)."""
    image = normal(2, 24, 5, 7)
    shift, scale = normal(2, 48, seed=1).chunk(2, -1)
    x = image.permute(0, 2, 3, 1)
    got = mmfast.layer_norm_modulate(x, shift, scale)
    assert torch.equal(got, mmfast.layer_norm_modulate(x.contiguous(), shift, scale))
    assert got.shape == x.shape
