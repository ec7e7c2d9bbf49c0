"""Rows of coefficients for training, shared by the schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.schedule.predictions import denoised_from, target_of
from mmfast.schedule.weights import Weighting, weighting_of


def noising_rows(
    alpha: Tensor,
    sigma: Tensor,
    target: str,
    weighting: Weighting | None,
    sigma_data: float | None = None,
) -> Tensor:
    """(T, 5) rows [alpha, sigma, target_x0, target_noise, weight] for T alphas and sigmas."""
    rows = []
    weights = None if weighting is None else weighting_of(weighting)((alpha / sigma) ** 2)
    for i, (a, s) in enumerate(zip(alpha.tolist(), sigma.tolist(), strict=True)):
        weight = 1.0
        if weights is not None:
            # The error of x0 = a x + b m, where x is given, is b times that of m.
            _, b = denoised_from(target, a, s, sigma_data)
            weight = float(weights[i]) * b * b
        rows.append([a, s, *target_of(target, a, s, sigma_data), weight])
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 5)
    if not bool(table.isfinite().all()):
        bad = int((~table.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"target {target!r} has no finite coefficients and weight at row {bad}")
    return table


def remembered(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A schedule's ``noising_table``, which makes the table of a target and a weighting once."""

    @functools.wraps(method)
    def table(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) > 2:
            return method(self, *args, **kwargs)
        tables = self.__dict__.setdefault("_tables", {})
        if args not in tables:
            tables[args] = method(self, *args)
        found: Tensor = tables[args]
        return found

    return table
