"""Noise levels for S steps, (S,) float64, falling; and shifts of those of flow matching."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast.checks import check_choice

SIGMAS = ("karras", "exponential", "lu", "beta")


def karras(num_steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Evenly spaced in sigma^(1/rho) (Karras et al. 2022, arXiv 2206.00364, equation 5)."""
    ramp = torch.linspace(high ** (1 / rho), low ** (1 / rho), num_steps, dtype=torch.float64)
    return ramp**rho


def exponential(num_steps: int, low: float, high: float) -> Tensor:
    """Evenly spaced in log sigma, or lambda (Lu et al. 2022, arXiv 2206.00927, section 3.4)."""
    return torch.linspace(math.log(high), math.log(low), num_steps, dtype=torch.float64).exp()


def beta(num_steps: int, low: float, high: float, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of a Beta distribution between low and high (Lee et al. 2024, arXiv 2407.12173)."""
    quantiles = torch.linspace(1.0, 0.0, num_steps, dtype=torch.float64)
    return low + (high - low) * _beta_quantile(quantiles, a, b)


def make_sigmas(name: str, num_steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """The levels called ``name``: one of :data:`SIGMAS`. ``rho`` is of karras.

    Raises:
        ValueError: an unknown name, not 0 < low <= high, or ``rho`` is 0 or not finite.
    """
    check_choice("sigmas", name, SIGMAS)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"sigmas must lie in 0 < low <= high < infinity, got {low} to {high}")
    if name == "karras":
        if not rho or not math.isfinite(rho):
            raise ValueError(f"rho must be a finite number other than 0, got {rho}")
        return karras(num_steps, low, high, rho)
    if name == "beta":
        return beta(num_steps, low, high)
    return exponential(num_steps, low, high)


def shift(sigmas: Tensor, factor: float) -> Tensor:
    """s t / (1 + (s - 1) t): more steps at high noise, for more tokens.

    Esser et al. 2024 (arXiv 2403.03206), equation 23. The factor exp(mu) is the dynamic shift.
    """
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def dynamic_mu(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_mu: float = 0.5,
    max_mu: float = 1.15,
) -> float:
    """mu for a number of tokens, on the line through (base_tokens, base_mu), (max_tokens, max_mu).

    Black Forest Labs 2024, Flux.1: the defaults are its values.
    """
    return base_mu + (tokens - base_tokens) * (max_mu - base_mu) / (max_tokens - base_tokens)


def stretch_to_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """Scale 1 - sigma so that the last is ``terminal`` (HaCohen et al. 2024, arXiv 2501.00103)."""
    if sigmas[-1] == 1:  # a single step, which stays where it is
        return sigmas
    return 1 - (1 - sigmas) * ((1 - terminal) / (1 - sigmas[-1]))


def _beta_cdf(x: Tensor, a: float, b: float) -> Tensor:
    # x^a / a 2F1(a, 1 - b; a + 1; x) / B(a, b). Up to 1/2 the series gains a bit with each term.
    def below(x: Tensor, a: float, b: float) -> Tensor:
        term = torch.full_like(x, 1 / a)
        total = term.clone()
        for n in range(60):
            term = term * x * ((n + 1 - b) * (a + n) / ((n + 1) * (a + n + 1)))
            total += term
        return x**a * total

    whole = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    left, right = x.clamp(max=0.5), (1 - x).clamp(max=0.5)
    return torch.where(x <= 0.5, below(left, a, b) / whole, 1 - below(right, b, a) / whole)


def _beta_quantile(q: Tensor, a: float, b: float) -> Tensor:
    low, high = torch.zeros_like(q), torch.ones_like(q)
    for _ in range(60):
        middle = (low + high) / 2
        too_low = _beta_cdf(middle, a, b) < q
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.where(q <= 0, 0.0, torch.where(q >= 1, 1.0, (low + high) / 2))
