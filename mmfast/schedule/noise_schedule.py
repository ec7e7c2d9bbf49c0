"""Discrete diffusion: T steps that keep the variance (DDPM and what follows it)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.schedule.betas import make_betas, zero_terminal_snr
from mmfast.schedule.grid import Grid, check_final
from mmfast.schedule.noising import noising_rows, remembered
from mmfast.schedule.sigmas import make_sigmas
from mmfast.schedule.spacings import spaced
from mmfast.schedule.weights import Weighting


class NoiseSchedule:
    """x_t = alpha_t x0 + sigma_t n with alpha_t^2 = alphas_cumprod and alpha_t^2 + sigma_t^2 = 1.

    Ho et al. 2020 (arXiv 2006.11239), equation 4.

    Args:
        alphas_cumprod: (T,), falling, in [0, 1).
        floor: the least value of alphas_cumprod. Samplers that divide by alpha need it above 0
            (2^-24 is usual) where the terminal SNR is zero.

    Raises:
        ValueError: ``alphas_cumprod`` isn't so.
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float], *, floor: float = 0.0) -> None:
        values = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        if values.dim() != 1 or len(values) < 1:
            raise ValueError(f"alphas_cumprod must be (T,), got shape {tuple(values.shape)}")
        falling = bool((values[1:] < values[:-1]).all())
        if not (falling and float(values[-1]) >= 0 and float(values[0]) < 1):
            raise ValueError("alphas_cumprod must fall, from below 1 to 0 or above")
        self.alphas_cumprod = values.clamp(min=floor)
        self.alpha = self.alphas_cumprod.sqrt()
        self.sigma = (1 - self.alphas_cumprod).sqrt()
        self.ratio = self.sigma / self.alpha

    @classmethod
    def from_betas(
        cls,
        betas: str | Tensor | Sequence[float] = "linear",
        num_steps: int = 1000,
        *,
        start: float = 1e-4,
        end: float = 0.02,
        zero_snr: bool = False,
        floor: float = 0.0,
    ) -> NoiseSchedule:
        """From the variances of the steps, or their name in :data:`mmfast.schedule.betas.BETAS`.

        Args:
            betas: (T,), or a name, for which the next three are.
            num_steps: T.
            start: the first of linear, scaled_linear and sigmoid.
            end: the last.
            zero_snr: rescale to no signal at the last step (Lin et al. 2024, arXiv 2305.08891).
            floor: the least value of alphas_cumprod.
        """
        if isinstance(betas, str):
            betas = make_betas(betas, num_steps, start, end)
        alphas_cumprod = (1 - torch.as_tensor(betas, dtype=torch.float64)).cumprod(0)
        if zero_snr:
            alphas_cumprod = zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, floor=floor)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def snr(self) -> Tensor:
        """(T,) signal-to-noise ratios alpha^2 / sigma^2."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def at(self, timestep: float) -> tuple[float, float]:
        """alpha and sigma; between timesteps sigma / alpha is interpolated linearly.

        Raises:
            ValueError: not from 0 to T - 1.
        """
        if not 0 <= timestep <= len(self) - 1:
            raise ValueError(f"timestep must be from 0 to {len(self) - 1}, got {timestep}")
        low = int(timestep)
        part = timestep - low
        if part == 0:
            return float(self.alpha[low]), float(self.sigma[low])
        ratio = float(self.ratio[low]) * (1 - part) + float(self.ratio[low + 1]) * part
        alpha = 1 / math.hypot(1.0, ratio)
        return alpha, ratio * alpha

    def timestep_of(self, ratio: float) -> float:
        """Where sigma / alpha is ``ratio``: interpolated in its logarithm, within 0 to T - 1."""
        logs = self.ratio.log()
        target = math.log(max(ratio, 1e-10))
        low = int(torch.searchsorted(logs, target, right=True)) - 1
        low = min(max(low, 0), max(len(self) - 2, 0))
        high = min(low + 1, len(self) - 1)
        gap = float(logs[high] - logs[low])
        part = (target - float(logs[low])) / gap if gap else 0.0
        return low + min(max(part, 0.0), 1.0)

    def input_scale(self, ratio: float) -> float:
        """Of x / alpha, when the model gets it where sigma / alpha is ``ratio``."""
        return 1 / math.hypot(1.0, ratio)

    def grid(
        self,
        num_steps: int | None = None,
        *,
        spacing: str = "linspace",
        skip_last: bool = False,
        offset: int = 0,
        rounded: bool = True,
        least_lambda: float = -math.inf,
        timesteps: Tensor | Sequence[float] | None = None,
        sigmas: str | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        final: str | float = "zero",
        start: int = 0,
    ) -> Grid:
        """The points that a sampler of S steps visits.

        Args:
            num_steps: S.
            spacing: of the timesteps: "linspace", "leading" or "trailing".
            skip_last: place S + 1 timesteps and leave the lowest out, as multistep solvers do.
            offset: added to leading timesteps.
            rounded: linspace gives whole timesteps.
            least_lambda: use only timesteps with log(alpha / sigma) from here.
            timesteps: (S,) falling, in place of a spacing.
            sigmas: "karras", "exponential", "lu" or "beta": place sigma / alpha by this instead. It
                runs over the range of the timesteps; with ``skip_last`` over the schedule's.
            sigma_min: the least sigma / alpha of that, in place of the range's.
            sigma_max: the largest.
            rho: of karras.
            final: sigma / alpha of the result: "zero", "sigma_min" (that of timestep 0), "last"
                (that of the last timestep), or a number.
            start: leave so many steps out, to start from an image.

        Raises:
            ValueError: an unknown name, or numbers out of range.
        """
        if (num_steps is None) == (timesteps is None):
            raise ValueError("one of num_steps and timesteps must be given")
        if timesteps is not None:
            visited = torch.as_tensor(timesteps, dtype=torch.float64)
            if visited.dim() != 1 or not len(visited) or bool((visited[1:] >= visited[:-1]).any()):
                raise ValueError("timesteps must be (S,) and falling")
        else:
            assert num_steps is not None
            usable = int((self.ratio.log() <= -least_lambda).sum())
            visited = spaced(
                spacing,
                len(self),
                num_steps,
                skip_last=skip_last,
                offset=offset,
                rounded=rounded,
                highest=None if usable == len(self) else usable,
            )
        points = [self.at(float(t)) for t in visited]
        if sigmas is not None:
            ends = (self.at(0), self.at(len(self) - 1)) if skip_last else (points[-1], points[0])
            low = ends[0][1] / ends[0][0] if sigma_min is None else sigma_min
            if sigma_max is None and ends[1][0] == 0:
                raise ValueError("sigmas need sigma_max, or a floor: alphas_cumprod ends at 0")
            high = ends[1][1] / ends[1][0] if sigma_max is None else sigma_max
            placed = make_sigmas(sigmas, len(visited), low, high, rho).tolist()
            visited = torch.tensor([self.timestep_of(r) for r in placed], dtype=torch.float64)
            points = [self._of_ratio(r) for r in placed]
        points.append(self._final(final, points[-1]))
        alpha, sigma = torch.tensor(points, dtype=torch.float64).unbind(1)
        grid = Grid(
            visited,
            alpha,
            sigma,
            torch.ones_like(alpha),
            self,
            unit_start=spacing == "leading",
        )
        return grid.skip(start) if start else grid

    @remembered
    def noising_table(self, target: str = "epsilon", weighting: Weighting | None = None) -> Tensor:
        """What training needs at each timestep: noisy samples, targets and weights of the loss.

        Args:
            target: what the model predicts: "epsilon", "sample", "v_prediction", "flow_prediction".
            weighting: of the loss on the clean sample, a function of the (T,) signal-to-noise
                ratios such as :func:`mmfast.schedule.weights.min_snr`, or "min_snr",
                "soft_min_snr" or "max_snr"; the table has the weight of the same loss on the
                target. Without it all weights are 1.

        Returns:
            (T, 5) float64, rows [alpha, sigma, target_x0, target_noise, weight]: the noisy sample
            is alpha x0 + sigma n, the target target_x0 x0 + target_noise n.

        Raises:
            ValueError: an unknown target, or a weight that is not finite.
        """
        return noising_rows(self.alpha, self.sigma, target, weighting)

    def _of_ratio(self, ratio: float) -> tuple[float, float]:
        alpha = 1 / math.hypot(1.0, ratio)
        return alpha, ratio * alpha

    def _final(self, final: str | float, last: tuple[float, float]) -> tuple[float, float]:
        if not isinstance(final, str):
            return self._of_ratio(check_final(final))
        known = {"zero": (1.0, 0.0), "sigma_min": self.at(0), "last": last}
        if final not in known:
            raise ValueError(f"final must be one of {', '.join(known)} or a number, got {final!r}")
        return known[final]
