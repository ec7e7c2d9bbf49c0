"""A quick comparison with plain PyTorch that an installation can run: ``mmfast bench``.

The repository's ``benchmarks`` measure every op, against every peer, much more carefully.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast.schedule import NoiseSchedule, dpm_solver

_TOLERANCE = 1e-5  # of the largest number of a result; float32 sums of these sizes stay below
_MIN_ROUNDS = 3
COUNT = 6  # of cases

Call = Callable[..., Tensor]


class Case(NamedTuple):
    """An op beside what one writes without it; all three take ``arguments`` and return a tensor.

    Attributes:
        op: name of the op.
        shape: of the problem, for people.
        own: mmfast's.
        plain: PyTorch's.
        truth: what both should return.
        arguments: float32 where floating.
    """

    op: str
    shape: str
    own: Call
    plain: Call
    truth: Call
    arguments: tuple[Any, ...]


class Measured(NamedTuple):
    """Seconds of a call, medians of rounds; what is wrong with the results, empty if nothing."""

    op: str
    shape: str
    own: float
    plain: float
    own_match: str
    plain_match: str


def in_float64(plain: Call) -> Call:
    """``plain`` on the same numbers in float64."""

    def run(*arguments: Any) -> Tensor:
        return plain(
            *(
                a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in arguments
            )
        )

    return run


def cases(device: torch.device) -> Iterable[Case]:
    """The problems, one at a time: their tensors go when the next one comes."""

    def normal(*shape: int) -> Tensor:
        return mmfast.randn(shape, seed=len(shape), offset=sum(shape), device=device)

    for n, k, d in ((16384, 1024, 64), (8192, 8192, 32)):
        yield Case(
            "nearest_code",
            f"N {n}, K {k}, D {d}",
            lambda x, codes: mmfast.nearest_code(x, codes)[0],
            lambda x, codes: torch.cdist(x, codes).argmin(1),
            _nearest,
            (normal(n, d), normal(k, d)),
        )
    qkv = normal(2, 16, 256, 72), normal(2, 16, 256, 72) + 0.1, normal(2, 16, 256, 72) - 0.1
    attend = F.scaled_dot_product_attention
    yield Case(
        "scaled_dot_product_attention",
        "B 2, H 16, L 256, E 72",
        mmfast.scaled_dot_product_attention,
        attend,
        in_float64(attend),
        qkv,
    )
    tokens, condition = normal(4, 256, 1152), normal(4, 1, 1152)
    yield Case(
        "layer_norm_modulate",
        "B 4, L 256, C 1152",
        lambda x, c: mmfast.layer_norm_modulate(x, c, c),
        _modulated,
        in_float64(_modulated),
        (tokens, condition),
    )
    yield Case(
        "geglu",
        "B 4, L 256, C 4608",
        mmfast.geglu,
        _gated,
        in_float64(_gated),
        (normal(4, 256, 2 * 4608),),
    )
    sample, output, other = normal(4, 16, 64, 64), normal(4, 16, 4096), normal(4, 65536)
    yield _step(sample, output.view_as(sample), other.view_as(sample))


def _nearest(x: Tensor, codes: Tensor) -> Tensor:
    with mmfast.use_backend("reference"):
        return mmfast.nearest_code(x, codes)[0]


def _modulated(x: Tensor, condition: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + condition) + condition


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def _step(x: Tensor, output: Tensor, unconditional: Tensor) -> Case:
    """A step of DPM-Solver++ with guidance, with history."""
    grid = NoiseSchedule.from_betas("scaled_linear", start=0.00085, end=0.012).grid(20)
    table = dpm_solver(grid)
    coefficients = table.coefficients.to(x.device)
    row, scale = 10, 7.5
    (alpha, sigma), (alpha_next, sigma_next) = grid.point(row), grid.point(row + 1)
    before = grid.point(row - 1)
    # Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    now, then, last = (
        torch.tensor(a / s).log().item()
        for a, s in ((alpha, sigma), (alpha_next, sigma_next), before)
    )
    h, ratio = then - now, (now - last) / (then - now)
    decay = torch.tensor(-h).expm1().item()

    def own(x: Tensor, output: Tensor, unconditional: Tensor, history: Tensor) -> Tensor:
        return mmfast.sampler_step(
            x,
            output,
            coefficients,
            row,
            unconditional=unconditional,
            guidance_scale=scale,
            history=history.clone(),
        )

    def plain(x: Tensor, output: Tensor, unconditional: Tensor, history: Tensor) -> Tensor:
        guided = unconditional + scale * (output - unconditional)
        denoised = (x - sigma * guided) / alpha
        mixed = (1 + 0.5 / ratio) * denoised - 0.5 / ratio * history.clone()[0]
        return sigma_next / sigma * x - alpha_next * decay * mixed

    arguments = x, output, unconditional, x.flip(0)[None]
    shape = "B 4, C 16, 64 x 64"
    return Case("sampler_step", shape, own, plain, in_float64(plain), arguments)


def judge(result: Tensor, truth: Tensor) -> str:
    """What is wrong with ``result``; empty when nothing."""
    if result.shape != truth.shape:
        return f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    if not truth.is_floating_point():
        wrong = int((result != truth).sum())
        return f"{wrong} of {truth.numel()} wrong" if wrong else ""
    error = float((result.double() - truth).abs().max() / truth.abs().max())
    return "" if error <= _TOLERANCE else f"off by {error:.1e}"


def measure(case: Case, seconds: float) -> Measured:
    """Judge both, then time them in turns for about ``seconds``, at least three rounds."""
    truth = case.truth(*case.arguments)
    calls = case.own, case.plain
    matches = [judge(call(*case.arguments), truth) for call in calls]
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < _MIN_ROUNDS:
        for call, found in zip(calls, times, strict=True):
            _synchronize(case.arguments)
            start = time.perf_counter()
            call(*case.arguments)
            _synchronize(case.arguments)
            found.append(time.perf_counter() - start)
    own, plain = map(statistics.median, times)
    return Measured(case.op, case.shape, own, plain, *matches)


def _synchronize(arguments: tuple[Any, ...]) -> None:
    if arguments[0].device.type == "cuda":
        torch.cuda.synchronize(arguments[0].device)
