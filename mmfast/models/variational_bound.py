"""The variational bound's term of a timestep, for models that predict variances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast.schedule.noise_schedule import NoiseSchedule
from mmfast.schedule.predictions import denoised_from

_BIN = 1 / 255  # half the distance of two of 256 levels from -1 to 1
_LEAST = 1e-12  # of a probability


def bound_rows(schedule: NoiseSchedule, prediction: str) -> Tensor:
    """What :func:`variational_bound` needs at each of T timesteps.

    Returns:
        (T, 5) float64, rows [a, b, c, small, large]: x0 is predicted as a x + b output, the mean of
        q(x_{t-1} | x_t, x0) grows with c x0, and the variance's logarithm lies between ``small``,
        the posterior's, and ``large``, that of the forward step.
    """
    now = schedule.alphas_cumprod
    before = torch.cat([now.new_ones(1), now[:-1]])
    forward = 1 - now / before
    posterior = forward * (1 - before) / (1 - now)
    # The first is 0: as Nichol and Dhariwal have it, the second is taken for its logarithm.
    posterior[:1] = posterior[1:2] if len(now) > 1 else forward[:1]
    of_clean = before.sqrt() * forward / (1 - now)
    points = zip(schedule.alpha.tolist(), schedule.sigma.tolist(), strict=True)
    denoised = torch.tensor([denoised_from(prediction, *point) for point in points]).to(now)
    return torch.cat([denoised, torch.stack([of_clean, posterior.log(), forward.log()], 1)], 1)


def variational_bound(
    rows: Tensor,
    first: Tensor,
    x0: Tensor,
    noisy: Tensor,
    prediction: Tensor,
    variance: Tensor,
) -> Tensor:
    """L_t in bits per number, ``(B,)``: a divergence, or at the first timestep the likelihood.

    The likelihood is that of 256 levels from -1 to 1. Gradients pass to ``variance`` alone.

    Args:
        rows: ``(B, 5)``, of :func:`bound_rows`, float32.
        first: ``(B,)``, bool: whose timestep is 0.
        x0, noisy: ``(B, ...)``.
        prediction: of the model, ``(B, ...)``.
        variance: of the model, ``(B, ...)``: -1 is the posterior's, 1 the forward step's.

    Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), eq.
    14 to 16; Ho et al., "Denoising Diffusion Probabilistic Models" (2020), eq. 13.
    """
    lead = (-1, *[1] * (x0.dim() - 1))
    a, b, c, small, large = (column.view(lead) for column in rows.unbind(1))
    x0, noisy, variance = x0.float(), noisy.float(), variance.float()
    denoised = a * noisy + b * prediction.detach().float()
    log_variance = small + (variance + 1) / 2 * (large - small)
    ratio = small - log_variance
    squares = (c * (x0 - denoised)).square() * (-log_variance).exp()
    divergence = 0.5 * (ratio.exp() - ratio - 1 + squares)
    scale = (-0.5 * log_variance).exp()
    upper, lower = (scale * (x0 - denoised + side) for side in (_BIN, -_BIN))
    below = torch.special.ndtr(upper)
    above = torch.special.ndtr(-lower)
    inside = below - torch.special.ndtr(lower)
    probability = torch.where(x0 < -0.999, below, torch.where(x0 > 0.999, above, inside))
    likelihood = -probability.clamp(min=_LEAST).log()
    bound = torch.where(first.view(lead), likelihood, divergence)
    return bound.flatten(1).mean(1) / math.log(2)
