"""The numbers of the steps since the last row of the log."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.nn.ranks import several
from mmfast.train.distributed import mean_over_processes

_NEVER = (1 << 62) + 1


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite."""


class Window:
    """Means of named numbers, and the first step of which one was not finite.

    Nothing is read from the device before :meth:`check` and :meth:`means`.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._bad = torch.full((), _NEVER, dtype=torch.int64, device=device)

    def add(self, step: int, numbers: Mapping[str, Tensor]) -> None:
        """Numbers ``()`` of the step ``step``, counted from 0; ``"loss"`` and ``"grad_norm"`` must
        be finite."""
        for name, value in numbers.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
            if name in ("loss", "grad_norm"):
                bad = torch.where(value.isfinite(), _NEVER, step)
                self._bad = torch.minimum(self._bad, bad)

    def check(self, stop: bool) -> bool:
        """Whether a process is to stop. All processes must ask.

        Args:
            stop: this one is.

        Raises:
            NonFiniteError: a number was not finite, on any of them.
        """
        said = torch.stack([self._bad, torch.full_like(self._bad, -int(stop))])
        if several():
            dist.all_reduce(said, dist.ReduceOp.MIN)
        bad, stops = said.tolist()
        if bad != _NEVER:
            raise NonFiniteError(f"the loss or its gradient was not finite in step {bad + 1}")
        return stops < 0

    def means(self) -> dict[str, float]:
        """The means over steps and processes, which start anew. All processes must ask."""
        if not self._sums:
            return {}
        stacked = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
        found = dict(zip(self._sums, mean_over_processes(stacked).tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return found
