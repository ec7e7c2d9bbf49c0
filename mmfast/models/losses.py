"""Losses between a signal, image or video and its reconstruction, without networks of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.checks import check_choice

_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_SCALES = 3  # halvings of multi_scale
_WINDOWS = (256, 512, 1024)  # samples, of spectral
_LEAST = 1e-5  # of a spectrum's magnitudes, before their logarithm

Loss = Callable[[Tensor, Tensor], Tensor]


def gradient(made: Tensor, x: Tensor) -> Tensor:
    """Mean absolute difference of the steps between neighbours, ``()``: edges stay sharp.

    Args:
        made, x: ``(B, C, *sizes)``.

    Source: Mathieu et al., "Deep multi-scale video prediction beyond mean square error" (2016).
    """
    error = made - x
    dims = [dim for dim in range(2, x.dim()) if x.shape[dim] > 1]
    total = torch.stack([error.diff(dim=dim).abs().mean() for dim in dims] or [error.sum() * 0])
    return total.mean()


def multi_scale(made: Tensor, x: Tensor) -> Tensor:
    """Mean absolute difference, of the sizes as they are and halved up to three times, ``()``.

    Args:
        made, x: ``(B, C, *sizes)``.
    """
    error, found = made - x, [(made - x).abs().mean()]
    pool = _POOLS[x.dim() - 2]
    for _ in range(_SCALES):
        if min(error.shape[2:]) < 2:
            break
        error = pool(error, 2)
        found.append(error.abs().mean())
    return torch.stack(found).mean()


def spectral(made: Tensor, x: Tensor) -> Tensor:
    """Of sounds: differences of spectra with short and long windows, ``()``.

    For each window the relative difference of the magnitudes, and the mean absolute one of their
    logarithms. Computed in float32.

    Args:
        made, x: waveforms ``(B, C, samples)``.

    Raises:
        ValueError: they have other dimensions, or less samples than the shortest window.

    Source: Yamamoto et al., "Parallel WaveGAN" (2020), sec. 2.3.
    """
    if x.dim() != 3 or x.shape[2] < _WINDOWS[0]:
        raise ValueError(
            f"spectral needs (B, C, samples), samples at least {_WINDOWS[0]}, got {tuple(x.shape)}"
        )
    total = []
    for window in (w for w in _WINDOWS if w <= x.shape[2]):
        of_made, of_x = _magnitudes(made, window), _magnitudes(x, window)
        relative = (of_x - of_made).norm() / of_x.norm().clamp(min=_LEAST)
        logs = (of_x.clamp(min=_LEAST).log() - of_made.clamp(min=_LEAST).log()).abs().mean()
        total.append(relative + logs)
    return torch.stack(total).mean()


def _magnitudes(x: Tensor, window: int) -> Tensor:
    """Of the windowed Fourier transform, a quarter of a window apart."""
    hann = torch.hann_window(window, device=x.device)
    waves = x.float().flatten(0, 1)
    made = torch.stft(waves, window, window // 4, window=hann, return_complex=True)
    # The root of the squares would have no gradient where both are 0.
    return (made.real.square() + made.imag.square()).clamp(min=_LEAST**2).sqrt()


LOSSES: dict[str, Loss] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "gradient": gradient,
    "multi_scale": multi_scale,
    "spectral": spectral,
}


def weighted(description: str | Mapping[str, float]) -> Loss:
    """The loss called so, or the sum of several, each times its weight.

    Args:
        description: one of :data:`LOSSES`, or weights by such names: ``{"l1": 1, "spectral": 1}``.

    Raises:
        ValueError: an unknown name, none, or a weight below 0.
    """
    weights = {description: 1.0} if isinstance(description, str) else dict(description)
    if not weights or min(weights.values()) < 0:
        raise ValueError(f"reconstruction must have weights from 0 by name, got {weights}")
    for name in weights:
        check_choice("reconstruction", name, tuple(LOSSES))
    if isinstance(description, str):
        return LOSSES[description]

    def loss(made: Tensor, x: Tensor) -> Tensor:
        return torch.stack([w * LOSSES[name](made, x) for name, w in weights.items()]).sum()

    return loss
