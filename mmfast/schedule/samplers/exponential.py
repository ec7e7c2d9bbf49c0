"""Exponential integrators: the part that DPM-Solver, DEIS, UniPC and SA-Solver share.

With lambda = log(alpha / sigma), the diffusion ODE and its SDEs are solved but for an integral over
the model (Lu et al. 2022, arXiv 2206.00927 and 2211.01095; Xue et al. 2023, arXiv 2309.05019,
equation 14). From s to t, h = lambda_t - lambda_s, for the clean sample x0 and for the noise n:

    x_t = sigma_t / sigma_s e^(-tau^2 h) x_s + alpha_t k I[x0] + sigma_t sqrt(1 - e^(-2 tau^2 h)) z
    x_t = alpha_t / alpha_s x_s + sigma_t (1 + tau^2) k I[n] + tau sigma_t sqrt(e^(2h) - 1) z

    I[f] = integral of e^(-k (1 - u)) f(u) over u from 0 to 1

where k = (1 + tau^2) h for x0 and k = -h for n, u = (lambda - lambda_s) / h, and z is new noise.
A solver replaces f by a polynomial, and differs from others in which one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmfast.schedule.grid import Grid
from mmfast.schedule.table import Linear


def log_ratio(grid: Grid, i: int) -> float:
    """lambda at point i."""
    alpha, sigma = grid.point(i)
    if alpha == 0:
        return -math.inf
    return math.inf if sigma == 0 else math.log(alpha / sigma)


def moments(k: float, count: int) -> list[float]:
    """k I[u^j] for j below ``count``."""
    if abs(k) < 4:  # a series: the recursion below loses all or, of high orders, much there

        def series(j: int) -> float:
            term = total = k / (j + 1)
            n = 0
            while abs(term) > 1e-18 * abs(total):
                n += 1
                term *= -k / (j + n + 1)
                total += term
            return total

        return [series(j) for j in range(count)]
    values = [-math.expm1(-k)]
    for j in range(1, count):
        values.append(1 - j / k * values[-1])
    return values


def polynomial(nodes: Sequence[float], values: Sequence[Linear]) -> list[Linear]:
    """Coefficients of 1, u, u^2, ... of the polynomial through values at nodes.

    Nodes at infinity, whose values tell nothing of the slope, are left out, and of equal ones all
    but the first.
    """
    first: dict[float, Linear] = {}
    for node, value in zip(nodes, values, strict=True):
        if math.isfinite(node):
            first.setdefault(node, value)
    finite = list(first.items())
    total = [Linear({})] * len(finite)
    for i, (u, value) in enumerate(finite):
        basis = [1.0]  # Lagrange's: 1 at this node, 0 at the others
        for k, (root, _) in enumerate(finite):
            if k != i:
                shifted = zip([0.0, *basis], [*basis, 0.0], strict=True)
                basis = [(below - root * c) / (u - root) for below, c in shifted]
        total = [t + c * value for t, c in zip(total, basis, strict=True)]
    return total


class Interval:
    """The step from point i to point j of a grid.

    Args:
        grid: the grid.
        i: where from.
        j: where to; there is noise left.
        tau: how much of the noise is new: 0 is the ODE.
        of_noise: the integral is over the noise, not the clean sample.

    Raises:
        ValueError: of the noise, from alpha = 0.
    """

    def __init__(
        self, grid: Grid, i: int, j: int, *, tau: float = 0.0, of_noise: bool = False
    ) -> None:
        self.grid = grid
        self.start = i
        self.origin = log_ratio(grid, i)
        self.h = h = log_ratio(grid, j) - self.origin
        (alpha_s, sigma_s), (alpha_t, sigma_t) = grid.point(i), grid.point(j)
        if of_noise:
            if alpha_s == 0:
                raise ValueError(
                    "integrals over the noise can't start where alpha is 0: integrate the clean "
                    "sample, or use a schedule with a floor for alphas_cumprod"
                )
            self.k = -h
            self.gain = sigma_t * (1 + tau**2)
            self.linear = alpha_t / alpha_s
            self.noise = tau * sigma_t * math.sqrt(max(math.expm1(2 * h), 0.0))
        else:
            self.k = (1 + tau**2) * h
            self.gain = alpha_t
            self.linear = sigma_t / sigma_s * (math.exp(-(tau**2) * h) if tau else 1.0)
            self.noise = sigma_t * math.sqrt(max(-math.expm1(-2 * tau**2 * h), 0.0)) if tau else 0.0

    def node(self, i: int) -> float:
        """u of point i."""
        if i == self.start:
            return 0.0
        distance = log_ratio(self.grid, i) - self.origin
        return distance / self.h if self.h else math.copysign(math.inf, distance)

    def through(self, values: Sequence[tuple[int, Linear]]) -> list[Linear]:
        """Coefficients of the polynomial in u through values at points."""
        return polynomial([self.node(i) for i, _ in values], [value for _, value in values])

    def weights(self, count: int) -> list[float]:
        """What 1, u, u^2, ... add to the sample."""
        return [self.gain * m for m in moments(self.k, count)]

    def integral(
        self, coefficients: Sequence[Linear], weights: Sequence[float] | None = None
    ) -> Linear:
        """What a polynomial adds to the sample; with ``weights``, by these instead."""
        if weights is None:
            weights = self.weights(len(coefficients))
        terms = zip(coefficients, weights, strict=True)
        return sum((c * w for c, w in terms), Linear({}))
