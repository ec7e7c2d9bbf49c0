"""Ranges of a schedule in which ``mmfast evaluate`` measures losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.models import Noising

_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, without their whole part, follow no pattern


class Ranges(NamedTuple):
    """Equal ranges of a schedule's rows, and the places in them at which samples are measured.

    Attributes:
        diffusion: whose schedule it is.
        parts: how many ranges.
        samples: N. The places of N samples are spread evenly over each range, in an order that has
            nothing to do with theirs, and the same in every run.
    """

    diffusion: Noising
    parts: int
    samples: int

    @property
    def edges(self) -> list[int]:
        """Rows, one more than ranges."""
        return [self.diffusion.num_steps * i // self.parts for i in range(self.parts + 1)]

    def rows(self, part: int, first: int, count: int) -> Tensor:
        """Of samples ``first`` to ``first + count - 1``, in a range: int64 ``(count,)``."""
        low, high = self.edges[part : part + 2]
        order = (torch.arange(self.samples).double() * _GOLDEN).frac().argsort().argsort()
        share = (order[first : first + count].double() + 0.5) / self.samples
        return low + (share * (high - low)).long()

    def timesteps(self, part: int) -> list[float]:
        """The first and the last of a range."""
        low, high = self.edges[part : part + 2]
        ends = torch.tensor([low, max(low, high - 1)])
        times: list[float] = self.diffusion.on(ends.device, "times")[ends].tolist()
        return times

    def table(self, sums: Sequence[float], count: float) -> dict[str, Any]:
        """The mean ``loss`` over ``count`` samples, and ``parts``: each with its ``timesteps``,
        from and to, and the ``loss``; ``sums`` are over samples, of each range."""
        means = [total / count for total in sums]
        return {
            "loss": sum(means) / len(means),
            "parts": [
                {"timesteps": self.timesteps(i), "loss": loss} for i, loss in enumerate(means)
            ],
        }
