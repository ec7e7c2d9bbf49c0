"""Variances of the steps of a discrete diffusion, (T,) float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.checks import check_choice, check_integer

BETAS = ("linear", "scaled_linear", "squared_cosine", "sigmoid", "laplace", "exponential")


def linear(num_steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Evenly spaced (Ho et al. 2020, arXiv 2006.11239)."""
    return torch.linspace(start, end, num_steps, dtype=torch.float64)


def scaled_linear(num_steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Their roots evenly spaced (Rombach et al. 2022, arXiv 2112.10752)."""
    return torch.linspace(start**0.5, end**0.5, num_steps, dtype=torch.float64) ** 2


def sigmoid(num_steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Along a sigmoid from -6 to 6 (Xu et al. 2022, arXiv 2203.02923)."""
    ramp = torch.linspace(-6.0, 6.0, num_steps, dtype=torch.float64).sigmoid()
    return start + (end - start) * ramp


def squared_cosine(num_steps: int, cap: float = 0.999) -> Tensor:
    """alpha_bar(t) = cos(pi/2 (t + 0.008) / 1.008)^2 (Nichol, Dhariwal 2021, arXiv 2102.09672)."""
    return _from_alpha_bar(
        num_steps, cap, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    )


def laplace(num_steps: int, cap: float = 0.999) -> Tensor:
    """Half of log SNR follows a Laplace distribution (Hang et al. 2024, arXiv 2407.03297)."""

    def alpha_bar(t: float) -> float:
        side = math.copysign(1.0, 0.5 - t)
        snr = math.exp(-0.5 * side * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
        return math.sqrt(snr / (1 + snr))

    return _from_alpha_bar(num_steps, cap, alpha_bar)


def exponential(num_steps: int, cap: float = 0.999) -> Tensor:
    """alpha_bar(t) = exp(-12 t)."""
    return _from_alpha_bar(num_steps, cap, lambda t: math.exp(-12.0 * t))


def _from_alpha_bar(num_steps: int, cap: float, alpha_bar: Callable[[float], float]) -> Tensor:
    values = [alpha_bar(i / num_steps) for i in range(num_steps + 1)]
    betas = [min(1 - after / before, cap) for before, after in itertools.pairwise(values)]
    return torch.tensor(betas, dtype=torch.float64)


def make_betas(name: str, num_steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """The betas called ``name``: one of :data:`BETAS`. Returns (T,) float64.

    ``start`` and ``end`` are of linear, scaled_linear and sigmoid.

    Raises:
        ValueError: an unknown name, or no step.
    """
    check_choice("betas", name, BETAS)
    check_integer("num_steps", num_steps)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if name == "linear":
        return linear(num_steps, start, end)
    if name == "scaled_linear":
        return scaled_linear(num_steps, start, end)
    if name == "sigmoid":
        return sigmoid(num_steps, start, end)
    by_alpha_bar = {
        "squared_cosine": squared_cosine,
        "laplace": laplace,
        "exponential": exponential,
    }
    return by_alpha_bar[name](num_steps)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale the roots so that the last is 0 and the first stays.

    Lin et al. 2024 (arXiv 2305.08891), algorithm 1, on cumulative products. Returns (T,) float64.
    """
    roots = alphas_cumprod.double().sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))) ** 2
