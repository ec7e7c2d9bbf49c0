"""Flow matching: straight lines from data to noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.checks import check_integer
from mmfast.schedule.grid import Grid, check_final
from mmfast.schedule.noising import noising_rows, remembered
from mmfast.schedule.sigmas import make_sigmas, shift, stretch_to_terminal
from mmfast.schedule.weights import Weighting


class FlowSchedule:
    """x_t = (1 - t) x0 + t n.

    Lipman et al. 2023 (arXiv 2210.02747); Liu et al. 2023 (arXiv 2209.03003).

    Args:
        num_steps: T: the model is told t T.
        factor: s of the static shift t -> s t / (1 + (s - 1) t).

    Raises:
        ValueError: not above 0.
    """

    def __init__(self, num_steps: int = 1000, factor: float = 1.0) -> None:
        if num_steps < 1 or not factor > 0:
            raise ValueError(f"num_steps and factor must be above 0, got {num_steps} and {factor}")
        self.num_steps = num_steps
        self.factor = factor

    def __len__(self) -> int:
        return self.num_steps

    @property
    def sigmas(self) -> Tensor:
        """(T,) shifted levels 1 / T, 2 / T, ... 1."""
        ramp = torch.arange(1, self.num_steps + 1, dtype=torch.float64) / self.num_steps
        return shift(ramp, self.factor)

    def at(self, timestep: float) -> tuple[float, float]:
        """alpha and sigma."""
        sigma = timestep / self.num_steps
        return 1 - sigma, sigma

    def timestep_of(self, ratio: float) -> float:
        """The timestep where sigma / alpha is ``ratio``."""
        return self.num_steps if math.isinf(ratio) else ratio / (1 + ratio) * self.num_steps

    def input_scale(self, ratio: float) -> float:
        """Of x / alpha, when the model gets it where sigma / alpha is ``ratio``."""
        return 1 / (1 + ratio)

    def grid(
        self,
        num_steps: int | None = None,
        *,
        levels: Tensor | Sequence[float] | None = None,
        mu: float | None = None,
        terminal: float | None = None,
        sigmas: str | None = None,
        rho: float = 7.0,
        final: str | float = "zero",
        start: int = 0,
    ) -> Grid:
        """The points that a sampler of S steps visits.

        Args:
            num_steps: S: levels evenly from 1 to the lowest of :attr:`sigmas`, before the shift.
            levels: (S,) falling, in (0, 1], in their place; they are shifted too.
            mu: shift by exp(mu) instead of the static shift: see :func:`dynamic_mu`.
            terminal: stretch so that the last level is this one.
            sigmas: then place them by "karras", "exponential", "lu" or "beta" in the same range.
            rho: of karras.
            final: sigma of the result: "zero", "last" (that of the last step), or a number.
            start: leave so many steps out, to start from an image.

        Raises:
            ValueError: an unknown name, or numbers out of range.
        """
        if (num_steps is None) == (levels is None):
            raise ValueError("one of num_steps and levels must be given")
        if levels is None:
            assert num_steps is not None
            check_integer("num_steps", num_steps)
            if num_steps < 1:
                raise ValueError(f"num_steps must be at least 1, got {num_steps}")
            lowest = float(self.sigmas[0])
            visited = torch.linspace(1.0, lowest, num_steps, dtype=torch.float64)
        else:
            visited = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
            inside = (
                visited.dim() == 1 and len(visited) and bool(((visited > 0) & (visited <= 1)).all())
            )
            if not inside or bool((visited[1:] >= visited[:-1]).any()):
                raise ValueError("levels must be (S,), falling, above 0 and at most 1")
        if mu is not None and not math.isfinite(mu):
            raise ValueError(f"mu must be finite, got {mu}")
        visited = shift(visited, self.factor if mu is None else math.exp(mu))
        if terminal is not None:
            if not 0 <= terminal < 1:
                raise ValueError(f"terminal must be from 0 to below 1, got {terminal}")
            visited = stretch_to_terminal(visited, terminal)
        if sigmas is not None:
            visited = make_sigmas(sigmas, len(visited), float(visited[-1]), float(visited[0]), rho)
        known = {"zero": 0.0, "last": float(visited[-1])}
        if isinstance(final, str) and final not in known:
            raise ValueError(f"final must be one of {', '.join(known)} or a number, got {final!r}")
        last = known[final] if isinstance(final, str) else check_final(final, 1.0)
        sigma = torch.cat([visited, torch.tensor([last], dtype=torch.float64)])
        grid = Grid(visited * self.num_steps, 1 - sigma, sigma, torch.ones_like(sigma), self)
        return grid.skip(start) if start else grid

    @remembered
    def noising_table(
        self,
        target: str = "flow_prediction",
        weighting: Weighting | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        """What training needs at each level, as :meth:`NoiseSchedule.noising_table` has it.

        Args:
            target: what the model predicts.
            weighting: of the loss on the clean sample, as there.
            levels: (T,) noise levels; :attr:`sigmas` without.

        Returns:
            (T, 5) float64, rows [alpha, sigma, target_x0, target_noise, weight].
        """
        sigma = self.sigmas if levels is None else levels.double().cpu()
        return noising_rows(1 - sigma, sigma, target, weighting)
