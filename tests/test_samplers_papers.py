"""Samplers against the equations of their papers, written out in float64.

Every function below runs a sampler as its paper has it, for a model that predicts the noise: ``a``
and ``s`` are alpha and sigma of the points, ``lam`` their lambda = log(a / s), ``eps(x, i)`` the
noise that the model finds at point i, ``z[i]`` the noise that step i draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from sampling import NOISES, START, network, run
from torch import Tensor

import mmfast.schedule as S

VP = S.NoiseSchedule.from_betas()
STEPS = 7
NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)
z = NOISES


@dataclass
class Path:
    """Where a sampler goes; ``exploding``: in x / alpha, which the model gets scaled."""

    grid: S.Grid
    exploding: bool = False

    @property
    def a(self) -> list[float]:
        return [1.0] * (len(self.grid) + 1) if self.exploding else self.grid.alpha.tolist()

    @property
    def s(self) -> list[float]:
        alpha = self.grid.alpha if self.exploding else 1.0
        return (self.grid.sigma / alpha).tolist()

    @property
    def lam(self) -> list[float]:
        return [math.log(a / s) for a, s in zip(self.a, self.s, strict=True)]

    def eps(self, x: Tensor, i: int) -> Tensor:
        scale = self.grid.alpha[i] if self.exploding else 1.0
        return network(x * scale, self.grid.timestep(i))

    def clean(self, x: Tensor, i: int) -> Tensor:
        return (x - self.s[i] * self.eps(x, i)) / self.a[i]


Paper = Callable[[Path], Iterator[Tensor]]


def lagrange(nodes: list[float], j: int, at: np.ndarray) -> np.ndarray:
    """1 at node j, 0 at the others."""
    rest = [node for k, node in enumerate(nodes) if k != j]
    return np.prod([(at - node) / (nodes[j] - node) for node in rest], 0) * np.ones_like(at)


def weighted(rate: float, nodes: list[float], j: int, at: np.ndarray) -> np.ndarray:
    return np.exp(rate * at) * lagrange(nodes, j, at)


def integral(low: float, high: float, of: Callable[[np.ndarray], np.ndarray]) -> float:
    half = (high - low) / 2
    return half * float(WEIGHTS @ of(low + half * (NODES + 1)))


# Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16.


def ddim(path: Path, eta: float) -> Iterator[Tensor]:
    x, a, s = START, path.a, path.s
    for i in range(STEPS):
        std = eta * s[i + 1] / s[i] * math.sqrt(1 - a[i] ** 2 / a[i + 1] ** 2)
        noise = path.eps(x, i)
        mean = a[i + 1] * (x - s[i] * noise) / a[i] + math.sqrt(s[i + 1] ** 2 - std**2) * noise
        yield (x := mean + std * z[i])


# Karras et al. 2022, "Elucidating the Design Space", algorithms 1 (Heun) and 3 (midpoint), and
# Crowson's ancestral steps.


def euler(path: Path) -> Iterator[Tensor]:
    x, t = START, path.s
    for i in range(STEPS):
        d = (x - path.clean(x, i)) / t[i]
        yield (x := x + (t[i + 1] - t[i]) * d)


def ancestral(path: Path) -> Iterator[Tensor]:
    x, t = START, path.s
    for i in range(STEPS):
        up = math.sqrt(t[i + 1] ** 2 * (t[i] ** 2 - t[i + 1] ** 2) / t[i] ** 2)
        down = math.sqrt(t[i + 1] ** 2 - up**2)
        yield (x := x + (down - t[i]) * path.eps(x, i) + up * z[i])


def heun(path: Path) -> Iterator[Tensor]:
    x, t = START, path.s
    for i in range(STEPS):
        d = path.eps(x, i)
        yield (trial := x + (t[i + 1] - t[i]) * d)
        if i + 1 == STEPS:
            return
        yield (x := x + (t[i + 1] - t[i]) * (d + path.eps(trial, i + 1)) / 2)


def midpoint(path: Path, noisy: bool) -> Iterator[Tensor]:
    x, t, row = START, path.s, 0
    for i in range(STEPS):
        up = t[i + 1] * math.sqrt(1 - t[i + 1] ** 2 / t[i] ** 2) if noisy else 0.0
        down = math.sqrt(t[i + 1] ** 2 - up**2)
        middle = math.exp((math.log(t[i]) + math.log(down)) / 2)
        trial = x + (middle - t[i]) * path.eps(x, i)
        yield trial
        d = network(trial / math.sqrt(1 + middle**2), 0.0)
        yield (x := x + (down - t[i]) * d + up * z[row + 1])
        row += 2


# Linear multistep: the Lagrange polynomial through the last noises, integrated over sigma.


def lms(path: Path, order: int) -> Iterator[Tensor]:
    x, t, past = START, path.s, []
    for i in range(STEPS):
        past = [(t[i], path.eps(x, i)), *past][:order]
        nodes = [node for node, _ in past]
        for j, (_, noise) in enumerate(past):
            weight = integral(t[i], t[i + 1], partial(lagrange, nodes, j))
            x = x + weight * noise
        yield x


# Liu et al. 2022, "Pseudo Numerical Methods", equations 11 to 13; iPNDM as DEIS has it.


def transfer(path: Path, x: Tensor, noise: Tensor, i: int, j: int) -> Tensor:
    now, then = path.a[i] ** 2, path.a[j] ** 2
    denominator = math.sqrt((1 - then) * now) + math.sqrt((1 - now) * then)
    return math.sqrt(then / now) * x - (then - now) / (math.sqrt(now) * denominator) * noise


ADAMS = [(1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


def ipndm(path: Path) -> Iterator[Tensor]:
    x, past = START, []
    for i in range(STEPS):
        past = [path.eps(x, i), *past][:4]
        mixed = sum(w * e for w, e in zip(ADAMS[len(past) - 1], past, strict=True))
        yield (x := transfer(path, x, mixed, i, i + 1))


def pndm(path: Path) -> Iterator[Tensor]:
    """With a trapezoidal first step, of two calls."""
    x = START
    first = path.eps(x, 0)
    yield (trial := transfer(path, x, first, 0, 1))
    yield (x := transfer(path, x, (first + path.eps(trial, 1)) / 2, 0, 1))
    past = [first]
    for i in range(1, STEPS):
        past = [path.eps(x, i), *past][:4]
        mixed = sum(w * e for w, e in zip(ADAMS[len(past) - 1], past, strict=True))
        yield (x := transfer(path, x, mixed, i, i + 1))


# Zhang and Chen 2023, "Fast Sampling with Exponential Integrator" (DEIS), in lambda.


def deis(path: Path, order: int) -> Iterator[Tensor]:
    x, a, lam, past = START, path.a, path.lam, []
    for i in range(STEPS):
        past = [(lam[i], path.eps(x, i)), *past][:order]
        nodes = [node for node, _ in past]
        following = a[i + 1] / a[i] * x
        for j, (_, noise) in enumerate(past):
            weight = integral(lam[i], lam[i + 1], partial(weighted, -1.0, nodes, j))
            following = following - a[i + 1] * weight * noise
        yield (x := following)


# Lu et al. 2022, "DPM-Solver" and "DPM-Solver++"; multistep of order 3 as in the authors' code.


def dpm_multistep(path: Path, order: int, kind: str) -> Iterator[Tensor]:
    x, a, s, lam, m = START, path.a, path.s, path.lam, []
    for i in range(STEPS):
        h = lam[i + 1] - lam[i]
        plus = kind.endswith("++")
        m = [path.clean(x, i) if plus else path.eps(x, i), *m][:order]
        ratios = [(lam[i - k] - lam[i - k - 1]) / h for k in range(len(m) - 1)]
        slopes = [(m[k] - m[k + 1]) / r for k, r in enumerate(ratios)]
        if kind == "dpmsolver++":
            following = s[i + 1] / s[i] * x - a[i + 1] * math.expm1(-h) * m[0]
            if len(m) == 2:
                following = following - a[i + 1] * math.expm1(-h) * slopes[0] / 2
            if len(m) == 3:
                first, second = third_order(ratios, slopes)
                following = following + a[i + 1] * (math.expm1(-h) / h + 1) * first
                weight = (math.expm1(-h) + h) / h**2 - 0.5
                following = following - a[i + 1] * weight * second
        elif kind == "dpmsolver":
            following = a[i + 1] / a[i] * x - s[i + 1] * math.expm1(h) * m[0]
            if len(m) == 2:
                following = following - s[i + 1] * math.expm1(h) * slopes[0] / 2
            if len(m) == 3:
                first, second = third_order(ratios, slopes)
                following = following - s[i + 1] * (math.expm1(h) / h - 1) * first
                weight = (math.expm1(h) - h) / h**2 - 0.5
                following = following - s[i + 1] * weight * second
        elif kind == "sde-dpmsolver++":
            following = s[i + 1] / s[i] * math.exp(-h) * x
            mean = m[0] + (slopes[0] / 2 if slopes else 0)
            following = following - a[i + 1] * math.expm1(-2 * h) * mean
            following = following + s[i + 1] * math.sqrt(-math.expm1(-2 * h)) * z[i]
        else:
            mean = m[0] + (slopes[0] / 2 if slopes else 0)
            following = a[i + 1] / a[i] * x - 2 * s[i + 1] * math.expm1(h) * mean
            following = following + s[i + 1] * math.sqrt(math.expm1(2 * h)) * z[i]
        yield (x := following)


def third_order(ratios: list[float], slopes: list[Tensor]) -> tuple[Tensor, Tensor]:
    (r0, r1), (d0, d1) = ratios, slopes
    return d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)


def dpm_singlestep(path: Path, kind: str) -> Iterator[Tensor]:
    """DPM-Solver-2 and DPM-Solver++ (2S): algorithm 1 of each; the grid has the middle points."""
    x, a, s, lam = START, path.a, path.s, path.lam
    for i in range(0, STEPS - 1, 2):
        h = lam[i + 2] - lam[i]
        r = (lam[i + 1] - lam[i]) / h
        if kind == "dpmsolver":
            noise = path.eps(x, i)
            yield (u := a[i + 1] / a[i] * x - s[i + 1] * math.expm1(r * h) * noise)
            change = (path.eps(u, i + 1) - noise) / (2 * r)
            yield (x := a[i + 2] / a[i] * x - s[i + 2] * math.expm1(h) * (noise + change))
        else:
            clean = path.clean(x, i)
            yield (u := s[i + 1] / s[i] * x - a[i + 1] * math.expm1(-r * h) * clean)
            d = (1 - 1 / (2 * r)) * clean + path.clean(u, i + 1) / (2 * r)
            yield (x := s[i + 2] / s[i] * x - a[i + 2] * math.expm1(-h) * d)


# Zhao et al. 2023, "UniPC", algorithms 5 to 8: the coefficients solve R a = b.


def unipc(path: Path, order: int, variant: str) -> Iterator[Tensor]:
    a, s, lam = path.a, path.s, path.lam
    x, predicted, known, used = START, START, [], 0

    def solved(at: int, size: int, ahead: bool) -> tuple[float, float, np.ndarray, list[float]]:
        h = lam[at + 1] - lam[at]
        b_h = -h if variant == "bh1" else math.expm1(-h)
        r = [(lam[at - k] - lam[at]) / h for k in range(1, size)] + [1.0] * ahead
        phi, b = math.expm1(-h) / -h - 1, []
        for k in range(1, len(r) + 1):
            b.append(phi * math.factorial(k) / b_h)
            phi = phi / -h - 1 / math.factorial(k + 1)
        if len(r) == 1:
            return h, b_h, np.array([0.5]), r
        powers = np.vander(np.array(r), increasing=True).T
        return h, b_h, np.linalg.solve(powers, np.array(b)), r

    def moved(
        at: int, start: Tensor, clean: list[Tensor], size: int, ahead: Tensor | None
    ) -> Tensor:
        h, b_h, weights, r = solved(at, size, ahead is not None)
        base = s[at + 1] / s[at] * start - a[at + 1] * math.expm1(-h) * clean[0]
        others = clean[1:size] + ([] if ahead is None else [ahead])
        for weight, ratio, other in zip(weights, r, others, strict=False):
            base = base - a[at + 1] * b_h * weight * (other - clean[0]) / ratio
        return base

    for i in range(STEPS):
        clean = path.clean(predicted, i)
        x = moved(i - 1, x, known, used, clean) if i else predicted
        known = [clean, *known][: order + 1]
        used = min(order, len(known))
        yield (predicted := moved(i, x, known, used, None))


# Xue et al. 2023, "SA-Solver", equations 14 and 17, for a constant tau; in order 2 the slope is
# integrated as in the authors' code.


def sa_solver(path: Path, order: int, tau: float) -> Iterator[Tensor]:
    a, s, lam = path.a, path.s, path.lam
    x, predicted, known = START, START, []
    scale = 1 + tau**2

    def moved(at: int, start: Tensor, values: list[tuple[float, Tensor]], noise: Tensor) -> Tensor:
        h = lam[at + 1] - lam[at]
        following = s[at + 1] / s[at] * math.exp(-(tau**2) * h) * start
        following = following + s[at + 1] * math.sqrt(-math.expm1(-2 * tau**2 * h)) * noise
        nodes = [node for node, _ in values]
        if len(values) == 2:
            slope = (values[0][1] - values[1][1]) / (nodes[0] - nodes[1])
            (node, value), _ = values
            value = value + (lam[at] - node) * slope  # of the line, where the step begins
            total = -a[at + 1] * math.expm1(-scale * h) * value
            return following + total + a[at + 1] * scale * h**2 / 2 * slope
        for j, (_, value) in enumerate(values):
            weight = integral(lam[at], lam[at + 1], partial(weighted, scale, nodes, j))
            weight *= math.exp(-scale * lam[at + 1])
            following = following + a[at + 1] * scale * weight * value
        return following

    for i in range(STEPS):
        clean = (lam[i], path.clean(predicted, i))
        x = moved(i - 1, x, [clean, *known][:order], z[i - 1]) if i else predicted
        known = [clean, *known][:order]
        yield (predicted := moved(i, x, known, z[i]))


# Luo et al. 2023, "Latent Consistency Models"; Zheng et al. 2024, "Trajectory Consistency
# Distillation", algorithm 4.


def lcm(path: Path) -> Iterator[Tensor]:
    x = START
    for i in range(STEPS):
        t = 10.0 * path.grid.timestep(i)
        skip, out = 0.25 / (t**2 + 0.25), t / math.sqrt(t**2 + 0.25)
        consistent = skip * x + out * path.clean(x, i)
        yield (x := path.a[i + 1] * consistent + path.s[i + 1] * z[i])


def tcd(path: Path, gamma: float) -> Iterator[Tensor]:
    x = START
    for i in range(STEPS):
        between = path.a[i + 1], path.s[i + 1]
        if i + 1 < STEPS:
            between = VP.at(math.floor((1 - gamma) * path.grid.timestep(i + 1)))
        there = between[0] * path.clean(x, i) + between[1] * path.eps(x, i)
        ratio = path.a[i + 1] / between[0]
        yield (x := ratio * there + math.sqrt(max(1 - ratio**2, 0.0)) * z[i])


def zero(t: float) -> float:
    return 0.0


def half(t: float) -> float:
    return 0.5


FULL = {"lower_order_final": False}
CASES: list[tuple[str, dict, Paper, bool]] = [
    ("ddim", {}, lambda p: ddim(p, 0.0), False),
    ("ddim", {"eta": 0.7}, lambda p: ddim(p, 0.7), False),
    ("euler", {}, euler, True),
    ("euler_ancestral", {}, ancestral, True),
    ("heun", {}, heun, True),
    ("kdpm2", {}, lambda p: midpoint(p, False), True),
    ("kdpm2_ancestral", {}, lambda p: midpoint(p, True), True),
    *(("lms", {"order": k}, lambda p, k=k: lms(p, k), True) for k in (1, 2, 3, 4)),
    ("ipndm", {}, ipndm, False),
    ("pndm", {}, pndm, False),
    *(("deis", {"order": k, **FULL}, lambda p, k=k: deis(p, k), False) for k in (1, 2, 3, 4)),
    *(
        (
            "dpm_solver",
            {"order": k, "algorithm": kind, **FULL},
            lambda p, k=k, kind=kind: dpm_multistep(p, k, kind),
            False,
        )
        for kind, k in [
            *itertools.product(("dpmsolver", "dpmsolver++"), (1, 2, 3)),
            *itertools.product(("sde-dpmsolver", "sde-dpmsolver++"), (1, 2)),
        ]
    ),
    *(
        (
            "dpm_solver_singlestep",
            {"algorithm": kind, **FULL},
            lambda p, kind=kind: dpm_singlestep(p, kind),
            False,
        )
        for kind in ("dpmsolver", "dpmsolver++")
    ),
    *(
        (
            "unipc",
            {"order": k, "variant": variant, **FULL},
            lambda p, k=k, variant=variant: unipc(p, k, variant),
            False,
        )
        for k, variant in itertools.product((1, 2, 3), ("bh1", "bh2"))
    ),
    *(
        (
            "sa_solver",
            {"predictor_order": k, "corrector_order": k, "tau": tau, **FULL},
            lambda p, k=k, strength=strength: sa_solver(p, k, strength),
            False,
        )
        for k, (tau, strength) in itertools.product((1, 2, 3, 5), ((zero, 0.0), (half, 0.5)))
    ),
    ("lcm", {}, lcm, False),
    ("tcd", {"eta": 0.3}, lambda p: tcd(p, 0.3), False),
]


def same(table: S.SamplerTable, paper: Iterator[Tensor], least: int) -> None:
    for row, (ours, theirs) in enumerate(zip(run(table), paper, strict=False)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=f"row {row}")
    assert row + 1 >= least


@pytest.mark.parametrize(
    ("name", "options", "paper", "exploding"), CASES, ids=lambda v: v if type(v) is str else ""
)
def test_equations(name, options, paper, exploding):
    grid = VP.grid(STEPS, spacing="trailing", final="sigma_min")
    table = getattr(S, name)(grid, **options)
    same(table, paper(Path(grid, exploding)), len(table) - (name == "dpm_solver_singlestep"))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(variance):
    """Ho et al. 2020, algorithm 2 on all timesteps, with section 3.2's two variances."""
    betas = torch.linspace(0.02, 0.3, STEPS, dtype=torch.float64)
    schedule = S.NoiseSchedule.from_betas(betas)
    table = S.ddpm(schedule.grid(STEPS, spacing="leading"), variance=variance)
    bars = (1 - betas).cumprod(0).tolist()

    def paper() -> Iterator[Tensor]:
        x = START
        for row, t in enumerate(reversed(range(STEPS))):
            beta, bar, before = float(betas[t]), bars[t], bars[t - 1] if t else 1.0
            noise = network(x, float(t))
            mean = (x - beta / math.sqrt(1 - bar) * noise) / math.sqrt(1 - beta)
            large = variance == "fixed_large"
            squared = beta if large else (1 - before) / (1 - bar) * beta
            yield (x := mean + math.sqrt(squared) * (z[row] if t else 0))

    same(table, paper(), STEPS)


@pytest.mark.parametrize("trapezoidal", [False, True])
def test_flows(trapezoidal):
    """Lipman et al. 2023: dx / dt = v, by Euler's and Heun's methods."""
    grid = S.FlowSchedule(factor=3.0).grid(STEPS)
    t = grid.sigma.tolist()

    def paper() -> Iterator[Tensor]:
        x = START
        for i in range(STEPS):
            v = network(x, 0.0)
            yield (trial := x + (t[i + 1] - t[i]) * v)
            if not trapezoidal:
                x = trial
            elif i + 1 < STEPS:
                yield (x := x + (t[i + 1] - t[i]) / 2 * (v + network(trial, 0.0)))

    same((S.flow_heun if trapezoidal else S.flow_euler)(grid), paper(), STEPS)


@pytest.mark.parametrize("multistep", [False, True])
def test_edm(multistep):
    """Karras et al. 2022, table 1 and algorithm 1 without its correction; Lu et al. 2022 (2M)."""
    data = 0.5
    grid = S.EDMSchedule(sigma_data=data).grid(STEPS, final="sigma_min")
    t = grid.sigma.tolist()

    def denoised(x: Tensor, i: int) -> Tensor:
        total = t[i] ** 2 + data**2
        made = network(x / math.sqrt(total), 0.0)
        return data**2 / total * x + t[i] * data / math.sqrt(total) * made

    def paper() -> Iterator[Tensor]:
        x, old, before = START, None, 0.0
        for i in range(STEPS):
            clean = denoised(x, i)
            if not multistep:
                yield (x := x + (t[i + 1] - t[i]) * (x - clean) / t[i])
                continue
            h = math.log(t[i] / t[i + 1])
            d = clean if old is None else clean + h / (2 * before) * (clean - old)
            yield (x := t[i + 1] / t[i] * x - math.expm1(-h) * d)
            old, before = clean, h

    make = S.edm_dpm if multistep else S.edm_euler
    options = {"lower_order_final": False} if multistep else {}
    same(make(grid, **options), paper(), STEPS)


def test_every_sampler_has_its_equations():
    tested = {name for name, *_ in CASES}
    tested |= {"ddpm", "flow_euler", "flow_heun", "edm_euler", "edm_dpm"}
    from test_samplers import ALL

    assert tested == set(ALL)
