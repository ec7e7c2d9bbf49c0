"""Sinusoidal embeddings of timesteps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, INDEX, check_dtype
from mmfast.ops.per_sample import differences
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register


def timestep_embedding(
    timesteps: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip_sin_to_cos: bool = True,
    downscale_freq_shift: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cosines and sines of timesteps at geometric frequencies.

    Of angles ``scale t max_period^(-i / (dim // 2 - downscale_freq_shift))``, i from 0 to
    dim // 2 - 1, the cosines and then the sines; an odd dim has a zero behind them. Computed in
    float64 and rounded once. Differentiable in timesteps.

    ============================================ ==================== =========================
    model                                        ``flip_sin_to_cos``  ``downscale_freq_shift``
    ============================================ ==================== =========================
    DiT, SD3, Flux, PixArt, Wan (the defaults)   True                 0
    diffusers' DiT (``Timesteps(256)`` there)    True                 1
    DDPM, diffusers' get_timestep_embedding      False                1
    ============================================ ==================== =========================

    Args:
        timesteps: ``(B,)``, floating or int64 or int32; fractions are fine.
        dim: of the embedding, at least 2.
        max_period: of the slowest angle's period, over 2 pi.
        flip_sin_to_cos: cosines first, else sines.
        downscale_freq_shift: see above.
        scale: of the angles.
        dtype: of the result.

    Returns:
        ``(B, dim)``.

    Raises:
        TypeError: timesteps are no tensor or have another dtype, or dtype is not floating.
        ValueError: they are not ``(B,)``, or dim is too small for the shift.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5; Ho et al., "Denoising
    Diffusion Probabilistic Models" (2020).
    """
    check_dtype("timesteps", timesteps, (*FLOATING, *INDEX))
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if timesteps.dim() != 1:
        raise ValueError(f"timesteps must be (B,), got {tuple(timesteps.shape)}")
    if dim < 2 or dim // 2 == downscale_freq_shift:
        raise ValueError(
            f"dim must be at least 2, and dim // 2 not downscale_freq_shift = "
            f"{downscale_freq_shift}, got {dim}"
        )
    options = dim, max_period, flip_sin_to_cos, downscale_freq_shift, scale, dtype
    return backends.call(OP, timesteps, *options)


def _frequencies(
    timesteps: Tensor, dim: int, max_period: float, downscale_freq_shift: float, scale: float
) -> Tensor:
    """[dim // 2], float64, on the timesteps' device."""
    half = dim // 2
    i = torch.arange(half, dtype=torch.float64, device=timesteps.device)
    return scale * torch.exp(i * (-math.log(max_period) / (half - downscale_freq_shift)))


def reference(
    timesteps: Tensor,  # [B]
    dim: int,
    max_period: float,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The specification."""
    frequencies = _frequencies(timesteps, dim, max_period, downscale_freq_shift, scale)
    angles = timesteps.double()[:, None] * frequencies  # [B, dim // 2]
    parts = [angles.sin(), angles.cos(), angles.new_zeros(len(angles), dim % 2)]
    if flip_sin_to_cos:
        parts[:2] = parts[1::-1]
    return torch.cat(parts, 1).to(dtype)


def fake(timesteps: Tensor, dim: int, *options: Any) -> Tensor:
    """The output without values."""
    return timesteps.new_empty((timesteps.shape[0], dim), dtype=options[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    timesteps, _, *ctx.options, _ = inputs
    ctx.save_for_backward(timesteps)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    (timesteps,) = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    return backends.call(BACKWARD, grad, timesteps, *ctx.options), *(None,) * 6


def reference_bwd(
    grad: Tensor,  # [B, dim]
    timesteps: Tensor,  # [B]
    max_period: float,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
) -> Tensor:
    """The gradient of timesteps, summed in float64."""
    dim = grad.shape[1]
    frequencies = _frequencies(timesteps, dim, max_period, downscale_freq_shift, scale)
    angles = timesteps.double()[:, None] * frequencies  # [B, dim // 2]
    to_sin, to_cos = grad.double()[:, : dim // 2 * 2].chunk(2, 1)
    if flip_sin_to_cos:
        to_sin, to_cos = to_cos, to_sin
    terms = (to_sin * angles.cos() - to_cos * angles.sin()) * frequencies
    return terms.sum(1).to(timesteps.dtype)


def fake_bwd(grad: Tensor, timesteps: Tensor, *_: Any) -> Tensor:
    """The output without values."""
    return timesteps.new_empty(timesteps.shape)


def cost(timesteps: Tensor, dim: int, *options: Any) -> Cost:
    """Timesteps read, embeddings written once; a sine or cosine is 20 operations."""
    numbers = timesteps.numel() * dim
    moved = timesteps.nbytes + numbers * options[-1].itemsize
    return Cost(bytes=moved, flops=21 * numbers)


def cost_bwd(grad: Tensor, timesteps: Tensor, *_: Any) -> Cost:
    """Gradients read once, one number of each sample written."""
    return Cost(bytes=grad.nbytes + 2 * timesteps.nbytes, flops=23 * grad.numel())


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Within the rounding of float64 angles, and of the result."""
    timesteps, dim, max_period, flip, shift, scale, _ = arguments
    want = reference(timesteps, dim, max_period, flip, shift, scale, torch.float64)
    angles = timesteps.double().abs()[:, None] * _frequencies(
        timesteps, dim, max_period, shift, abs(scale)
    )
    size = torch.nn.functional.pad(torch.cat((angles, angles), 1), (0, dim % 2)) + 1
    eps = 16 * torch.finfo(torch.float64).eps
    return differences("embeddings", result, fake(*arguments), want, size, eps)


def compare_bwd(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Likewise."""
    grad, timesteps, max_period, _, shift, scale = arguments
    want = reference_bwd(grad, timesteps.double(), *arguments[2:])
    dim = grad.shape[1]
    frequencies = _frequencies(timesteps, dim, max_period, shift, abs(scale))
    size = timesteps.double().abs()[:, None] * frequencies + 1
    to_sin, to_cos = grad.double()[:, : dim // 2 * 2].abs().chunk(2, 1)
    size = ((to_sin + to_cos) * size * frequencies).sum(1)
    eps = 32 * torch.finfo(torch.float64).eps
    return differences("gradients", result, fake_bwd(*arguments), want, size, eps)


def _timesteps(batch: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1000 * torch.rand(batch, generator=generator)).to(device, dtype)


def _sample(batch: int, dim: int, *options: Any, whole: bool = False) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        times = _timesteps(batch, device, torch.int64 if whole else dtype, seed)
        return times, dim, *options, dtype

    flip, shift, scale = options[1:]
    name = f"{'cos' if flip else 'sin'}_{shift:g}_{scale:g}{'_whole' * whole}_{batch}x{dim}"
    sizes = {"N": batch, "K": 2, "D": dim, "H": 1}
    return Sample(name, make, sizes, batch * dim >= 1 << 16)


def samples() -> Iterable[Sample]:
    """A training batch, and odd ones."""
    yield _sample(256, 256, 10000.0, True, 0.0, 1.0)
    yield _sample(3, 256, 10000.0, True, 0.0, 1000.0)
    yield _sample(5, 37, 10000.0, False, 1.0, 1.0)
    yield _sample(2, 19, 300.0, True, 0.5, -3.0, whole=True)
    yield _sample(1, 2, 10000.0, True, 0.0, 1.0)
    yield _sample(0, 8, 10000.0, True, 0.0, 1.0)


def _sample_bwd(batch: int, dim: int, *options: Any) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed + 1)
        grad = torch.randn(batch, dim, generator=generator).to(device, dtype)
        return grad, _timesteps(batch, device, dtype, seed), *options

    sizes = {"N": batch, "K": 2, "D": dim, "H": 1}
    name = f"{'cos' if options[1] else 'sin'}_{batch}x{dim}"
    return Sample(name, make, sizes, batch * dim >= 1 << 16)


def samples_bwd() -> Iterable[Sample]:
    """A training batch, and odd ones."""
    yield _sample_bwd(256, 256, 10000.0, True, 0.0, 1.0)
    yield _sample_bwd(5, 37, 10000.0, False, 1.0, 1.0)
    yield _sample_bwd(3, 16, 300.0, True, 0.0, 2.0)
    yield _sample_bwd(0, 8, 10000.0, True, 0.0, 1.0)


def _load_triton() -> Callable[..., Tensor]:
    from mmfast.kernels.timestep_embedding import timestep_embedding as launch

    return launch


OP = register(
    Op(
        name="timestep_embedding",
        schema="(Tensor timesteps, int dim, float max_period, bool flip_sin_to_cos, "
        "float downscale_freq_shift, float scale, ScalarType dtype) -> Tensor",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("timestep_embedding"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients),
    )
)

BACKWARD = register(
    Op(
        name="timestep_embedding_bwd",
        schema="(Tensor grad, Tensor timesteps, float max_period, bool flip_sin_to_cos, "
        "float downscale_freq_shift, float scale) -> Tensor",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={},
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
