"""timestep_embedding: conventions, large angles, gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from cases import backends_here, device_of

import mmfast
from mmfast.ops import timestep_embedding


@pytest.fixture(params=backends_here(timestep_embedding.OP))
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shift", "scale", "period"), [(1, 1, 10000), (0, 1000, 300)])
@pytest.mark.parametrize("dim", [256, 37])
def test_diffusers(backend, dim, flip, shift, scale, period):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    times = torch.tensor([0.0, 0.5, 0.999, 1.0], device=device_of(backend)) * 1000 / scale
    got = mmfast.timestep_embedding(
        times, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift, scale=scale,
        max_period=period,
    )  # fmt: skip
    expected = embeddings.get_timestep_embedding(times, dim, flip, shift, scale, period)
    # The angles there are float32.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_defaults_are_those_of_dit(backend):
    times = torch.tensor([3, 999], device=device_of(backend))
    half = 8
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half).to(times.device)
    angles = times[:, None] * frequencies[None]
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros_like(angles[:, :1])], -1)
    torch.testing.assert_close(mmfast.timestep_embedding(times, 17), expected, rtol=0, atol=1e-4)


def test_any_angle(backend):
    """Also those from which quarter turns cannot be taken off exactly."""
    times = [0.0, -2.5, 1e3, 1e5, 999999.0, 1000001.0, -1e7, 1e15, torch.inf, -torch.inf, torch.nan]
    times = torch.tensor(times, dtype=torch.float64, device=device_of(backend))
    for factor in (1.0, 0.7853981633974483):
        got = mmfast.timestep_embedding(factor * times, 2, dtype=torch.float64)
        angle = factor * times
        expected = torch.stack((angle.cos(), angle.sin()), 1)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13, equal_nan=True)


def test_gradcheck():
    """The gradients are torch's everywhere."""
    times = torch.tensor([0.3, 2.0, 7.0], dtype=torch.float64)
    for flip in (False, True):

        def embed(t, flip=flip):
            return mmfast.timestep_embedding(t, 7, flip_sin_to_cos=flip, dtype=torch.float64)

        assert torch.autograd.gradcheck(embed, times.clone().requires_grad_())


def test_compile():
    def embed(t):
        return mmfast.timestep_embedding(t, 16, dtype=torch.bfloat16) * 2

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (1, 4):
        times = torch.arange(n)
        assert torch.equal(compiled(times), embed(times))


def test_refusals():
    t = torch.zeros(3)
    with pytest.raises(ValueError, match=r"timesteps must be \(B,\), got \(\)"):
        mmfast.timestep_embedding(t[0], 8)
    with pytest.raises(TypeError, match="timesteps must be float32"):
        mmfast.timestep_embedding(t.bool(), 8)
    with pytest.raises(TypeError, match="dtype must be"):
        mmfast.timestep_embedding(t, 8, dtype=torch.int64)
    for dim, shift in ((1, 0.0), (2, 1.0)):
        with pytest.raises(ValueError, match="dim must be at least 2"):
            mmfast.timestep_embedding(t, dim, downscale_freq_shift=shift)
