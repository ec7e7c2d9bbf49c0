"""EDM: data with noise of any level added, and a preconditioned network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast.checks import check_choice, check_integer
from mmfast.schedule.grid import Grid
from mmfast.schedule.noising import noising_rows, remembered
from mmfast.schedule.sigmas import SIGMAS, make_sigmas
from mmfast.schedule.weights import Weighting


class EDMSchedule:
    """x = x0 + sigma n; the network gets c_in x and log(sigma) / 4.

    Karras et al. 2022 (arXiv 2206.00364), table 1.

    Args:
        sigma_min: the least noise.
        sigma_max: the most, where sampling starts.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: not 0 < sigma_min <= sigma_max, or sigma_data not above 0.
    """

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5
    ) -> None:
        if not (0 < sigma_min <= sigma_max < math.inf and sigma_data > 0):
            raise ValueError(
                "0 < sigma_min <= sigma_max and 0 < sigma_data must hold, got "
                f"{sigma_min}, {sigma_max} and {sigma_data}"
            )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def at(self, timestep: float) -> tuple[float, float]:
        """alpha and sigma."""
        return 1.0, math.exp(4 * timestep)

    def timestep_of(self, ratio: float) -> float:
        """The timestep of a noise level."""
        return math.log(ratio) / 4

    def input_scale(self, ratio: float) -> float:
        """Of x / alpha, when the model gets it where sigma / alpha is ``ratio``."""
        return 1 / math.hypot(self.sigma_data, ratio)

    def grid(
        self,
        num_steps: int,
        *,
        sigmas: str = "karras",
        rho: float = 7.0,
        final: str = "zero",
        start: int = 0,
    ) -> Grid:
        """The points that a sampler of S steps visits.

        Args:
            num_steps: S.
            sigmas: "karras", "exponential", "lu" or "beta".
            rho: of karras.
            final: sigma of the result: "zero" or "sigma_min".
            start: leave so many steps out, to start from an image.

        Raises:
            ValueError: an unknown name, or numbers out of range.
        """
        check_choice("sigmas", sigmas, SIGMAS)
        check_choice("final", final, ("zero", "sigma_min"))
        check_integer("num_steps", num_steps)
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        levels = make_sigmas(sigmas, num_steps, self.sigma_min, self.sigma_max, rho)
        last = 0.0 if final == "zero" else self.sigma_min
        sigma = torch.cat([levels, torch.tensor([last], dtype=torch.float64)])
        grid = Grid(
            levels.log() / 4,
            torch.ones_like(sigma),
            sigma,
            (sigma**2 + self.sigma_data**2).rsqrt(),
            self,
            sigma_data=self.sigma_data,
            initial_scale=float(sigma[0]),
        )
        return grid.skip(start) if start else grid

    @remembered
    def noising_table(
        self,
        target: str = "edm",
        weighting: Weighting | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        """What training needs at noise levels, as :meth:`NoiseSchedule.noising_table` has it.

        Args:
            target: what the network predicts.
            weighting: of the loss on the clean sample, a function of sigma^-2; EDM's own is the one
                that makes all weights of its target 1, as without.
            levels: (T,) sigmas; 1000 of the Karras spacing, rising, without.

        Returns:
            (T, 5) float64, rows [alpha, sigma, target_x0, target_noise, weight]. The noisy sample
            is the network's input: alpha is c_in, and sigma is c_in times the level.
        """
        if levels is None:
            levels = make_sigmas("karras", 1000, self.sigma_min, self.sigma_max).flip(0)
        sigma = levels.double().cpu()
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return noising_rows(c_in, c_in * sigma, target, weighting, self.sigma_data)
