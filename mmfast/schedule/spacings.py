"""Which timesteps of T a sampler of S steps visits: (S,) float64, falling."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.checks import check_choice, check_integer

SPACINGS = ("linspace", "leading", "trailing")


def linspace(
    total: int, num_steps: int, *, skip_last: bool = False, rounded: bool = True
) -> Tensor:
    """Evenly from T - 1 to 0, both included; with ``skip_last`` one more placed, 0 left out."""
    points = torch.linspace(0, total - 1, num_steps + skip_last, dtype=torch.float64)
    if rounded:
        points = points.round()
    return points.flip(0)[:num_steps]


def leading(total: int, num_steps: int, *, skip_last: bool = False, offset: int = 0) -> Tensor:
    """Multiples of a whole stride from 0, plus ``offset``; with ``skip_last`` not the lowest."""
    stride = total // (num_steps + skip_last)
    points = torch.arange(num_steps + skip_last, dtype=torch.float64) * stride
    return points.flip(0)[:num_steps] + offset


def trailing(total: int, num_steps: int, *, highest: int | None = None) -> Tensor:
    """T - 1 and down by T / S, rounded (Lin et al. 2024, arXiv 2305.08891).

    With ``highest`` below T it starts there, and has fewer steps.
    """
    stride = total / num_steps
    points = (total if highest is None else highest) - torch.arange(num_steps).double() * stride
    return points[points > stride * 1e-6].round() - 1


def consistency(
    total: int, num_steps: int, *, original_steps: int = 50, strength: float = 1.0
) -> Tensor:
    """Every so manyth of the steps that a consistency model was distilled for.

    Luo et al. 2023 (arXiv 2310.04378), latent consistency models; trajectory consistency
    distillation has the same. ``strength`` below 1 keeps the less noisy part, for editing an image.

    Raises:
        ValueError: there are fewer of those than ``num_steps``.
    """
    stride = total // original_steps
    distilled = torch.arange(int(original_steps * strength), 0, -1).double() * stride - 1
    if not 1 <= num_steps <= len(distilled):
        raise ValueError(
            f"num_steps must be from 1 to original_steps * strength = {len(distilled)}, "
            f"got {num_steps}"
        )
    chosen = torch.arange(num_steps) * len(distilled) // num_steps
    return distilled[chosen]


def spaced(
    name: str,
    total: int,
    num_steps: int,
    *,
    skip_last: bool = False,
    offset: int = 0,
    rounded: bool = True,
    highest: int | None = None,
) -> Tensor:
    """The spacing called ``name``: one of :data:`SPACINGS`.

    Args:
        total: T, the steps of training.
        num_steps: S.
        skip_last: place S + 1 points and leave the lowest out, as multistep solvers do.
        offset: added to leading timesteps.
        rounded: linspace gives whole timesteps.
        highest: how many of the T timesteps may be used, where not all.

    Raises:
        ValueError: an unknown name, or S not from 1 to T.
    """
    check_choice("spacing", name, SPACINGS)
    check_integer("num_steps", num_steps)
    usable = total if highest is None else highest
    if not 1 <= num_steps <= usable:
        raise ValueError(f"num_steps must be from 1 to {usable}, got {num_steps}")
    if name == "linspace":
        return linspace(usable, num_steps, skip_last=skip_last, rounded=rounded)
    if name == "leading":
        return leading(usable, num_steps, skip_last=skip_last, offset=offset)
    return trailing(total, num_steps, highest=highest)
