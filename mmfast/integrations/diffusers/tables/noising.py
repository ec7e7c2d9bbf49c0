"""Tables that add noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.ops.add_noise import ALPHA, SIGMA, WEIGHT
from mmfast.schedule.table import Linear, TableBuilder, model_output, x


def noising(points: Sequence[tuple[float, float]]) -> Tensor:
    """A table of :func:`mmfast.add_noise`, of alpha and sigma alone."""
    rows = torch.zeros(len(points), 5, dtype=torch.float64)
    rows[:, [ALPHA, SIGMA]] = torch.tensor(points, dtype=torch.float64).view(-1, 2)
    rows[:, WEIGHT] = 1.0
    return rows


def sums(points: Sequence[tuple[float, float]]) -> Tensor:
    """A table of :func:`mmfast.sampler_step`, of alpha x + sigma m."""
    builder = TableBuilder()
    for alpha, sigma in points:
        known = math.isfinite(alpha + sigma)
        builder.row(0.0, next=alpha * x + sigma * model_output if known else Linear({}))
    table = builder.build().coefficients
    unknown = [not math.isfinite(alpha + sigma) for alpha, sigma in points]
    table[torch.tensor(unknown)] = math.nan
    return table
