"""Weights of the loss, and densities of the training times, all float64.

A weight is a function of the signal-to-noise ratio SNR = (alpha / sigma)^2 and stands for the loss
on the clean sample: :meth:`mmfast.schedule.NoiseSchedule.noising_table` turns it into the one on
what the model predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.checks import check_choice


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """(alpha / sigma)^2."""
    return (alpha.double() / sigma.double()) ** 2


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556)."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float = 4.0) -> Tensor:
    """gamma SNR / (gamma + SNR) (Crowson et al. 2024, arXiv 2401.11605, section 4.1)."""
    return gamma / (1 + gamma / snr)


def max_snr(snr: Tensor, gamma: float = 1.0) -> Tensor:
    """max(SNR, gamma): truncated SNR (Salimans and Ho 2022, arXiv 2202.00512, section 4)."""
    return snr.clamp(min=gamma)


NAMED = {"min_snr": min_snr, "soft_min_snr": soft_min_snr, "max_snr": max_snr}
Weighting = Callable[[Tensor], Tensor] | str


def weighting_of(weighting: Weighting) -> Callable[[Tensor], Tensor]:
    """The function, or the one called so, with its own gamma: one of :data:`NAMED`.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(weighting, str):
        return weighting
    check_choice("weighting", weighting, tuple(NAMED))
    return NAMED[weighting]


def edm(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, arXiv 2206.00364)."""
    sigma = sigma.double()
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def logit_normal_density(t: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The density of sigmoid(normal) at t in (0, 1) (Esser et al. 2024, arXiv 2403.03206)."""
    t = t.double()
    normal = torch.exp(-((torch.logit(t) - mean) ** 2) / (2 * std**2)) / (
        std * math.sqrt(2 * math.pi)
    )
    return normal / (t * (1 - t))


def logit_normal_quantile(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times of that density from uniform u in (0, 1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double()))


def mode_quantile(u: Tensor, scale: float = 1.29) -> Tensor:
    """Times with heavy tails from uniform u in [0, 1] (Esser et al. 2024, arXiv 2403.03206).

    Raises:
        ValueError: ``scale`` is not from -1 to 2 / (pi - 2), where this is monotonic.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale must be from -1 to {2 / (math.pi - 2):.3f}, got {scale}")
    u = u.double()
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def mode_density(t: Tensor, scale: float = 1.29) -> Tensor:
    """The density of those times at t in [0, 1]: 1 over the slope of the quantile where it is t."""
    t = t.double()
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):  # the quantile falls in u
        middle = (low + high) / 2
        above = mode_quantile(middle, scale) > t
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    u = (low + high) / 2
    return 1 / (1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * u))).abs()


def cosmap_density(t: Tensor) -> Tensor:
    """2 / (pi (1 - 2t + 2t^2)) (Esser et al. 2024, arXiv 2403.03206)."""
    t = t.double()
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
