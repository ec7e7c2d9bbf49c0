"""What a guided output is made of: factors of its conditional and unconditional halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_device, check_floating
from mmfast.ops.per_sample import differences, rounding
from mmfast.registry import Arguments, Cost, Op, Sample, register


def guidance_factors(
    conditional: Tensor,
    unconditional: Tensor,
    *,
    guidance_scale: float,
    rescale: float = 0.0,
) -> Tensor:
    """Factors of classifier-free guidance with rescaling, for ``sampler_step(guidance=...)``.

    Guidance makes g = w c + (1 - w) u of the conditional c and the unconditional u. Rescaling gives
    it the conditional's standard deviation: f g, f = rescale std(c) / std(g) + 1 - rescale. The
    factors are f w and f (1 - w), so that the guided output itself is never written.

    Args:
        conditional, unconditional: ``(B, ...)``, float16, bfloat16, float32 or float64.
        guidance_scale: w.
        rescale: from 0 (none) to 1.

    Returns:
        ``(B, 2)`` float64, of c and of u. Standard deviations are over all of a sample, unbiased,
        in float64; no gradient.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or numbers do not fit.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023),
    eq. 14 to 16.
    """
    _check(conditional, unconditional)
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be from 0 to 1, got {rescale}")
    factors = conditional.new_empty((conditional.shape[0], 2), dtype=torch.float64)
    backends.call(
        OP, conditional, unconditional, float(guidance_scale), float(rescale), 1.0, math.inf, 0.0,
        False, None, factors,
    )  # fmt: skip
    return factors


def projected_guidance_factors(
    conditional: Tensor,
    unconditional: Tensor,
    *,
    guidance_scale: float,
    eta: float = 0.0,
    norm_threshold: float = math.inf,
    momentum: float = 0.0,
    average: Tensor | None = None,
) -> Tensor:
    """Factors of adaptive projected guidance, for ``sampler_step(guidance=...)``.

    With d = c - u, k = min(1, norm_threshold / |d|) and rho = d . c / |c|^2, the part of d along
    c is rho c, and the guided output

        c + (w - 1) k (d - (1 - eta) rho c)

    is ``1 + (w - 1) k (1 - (1 - eta) rho)`` times c and ``-(w - 1) k`` times u. With momentum d is
    a running average, d + momentum average, which is updated in place; the output is then
    ``1 - (w - 1) k (1 - eta) rho`` times c and ``(w - 1) k`` times the average: give
    ``sampler_step`` the average for ``unconditional``.

    Args:
        conditional, unconditional: c and u, ``(B, ...)``, float16, bfloat16, float32 or float64.
        guidance_scale: w; 1 is none.
        eta: how much of the part along c remains; 1 is ordinary guidance. The authors use 0.
        norm_threshold: the largest norm of the difference.
        momentum: of the average; the authors use a negative one.
        average: as ``conditional``, zeros at first; float32 keeps what half precision would lose.
            Changed. None: no momentum.

    Returns:
        ``(B, 2)`` float64. Norms and products are over all of a sample, in float64; no gradient.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or numbers do not fit, or ``momentum`` without ``average``.

    Source: Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance Scales in
    Diffusion Models" (2024), algorithm 1.
    """
    _check(conditional, unconditional)
    if average is not None:
        check_floating("average", average)
        check_device(conditional=conditional, average=average)
        if average.shape != conditional.shape:
            raise ValueError(
                f"average must have shape {tuple(conditional.shape)}, got {tuple(average.shape)}"
            )
    elif momentum:
        raise ValueError("not possible: momentum without average")
    if not norm_threshold > 0:
        raise ValueError(f"norm_threshold must be above 0, got {norm_threshold}")
    factors = conditional.new_empty((conditional.shape[0], 2), dtype=torch.float64)
    backends.call(
        OP, conditional, unconditional, float(guidance_scale), 0.0, float(eta),
        float(norm_threshold), float(momentum), True, average, factors,
    )  # fmt: skip
    return factors


def _check(conditional: Tensor, unconditional: Tensor) -> None:
    check_floating("conditional", conditional)
    check_floating("unconditional", unconditional)
    check_device(conditional=conditional, unconditional=unconditional)
    if conditional.dim() < 1:
        raise ValueError("conditional must be (B, ...), got a number")
    if unconditional.shape != conditional.shape:
        raise ValueError(
            f"unconditional must have shape {tuple(conditional.shape)}, "
            f"got {tuple(unconditional.shape)}"
        )


def _factors(
    conditional: Tensor,
    unconditional: Tensor,
    guidance_scale: float,
    rescale: float,
    eta: float,
    norm_threshold: float,
    project: bool,
    average: Tensor | None,
) -> Tensor:
    """From the average that was updated."""
    c, u = conditional.double().flatten(1), unconditional.double().flatten(1)  # [B, E]
    w = guidance_scale
    if not project:
        f = c.new_ones(c.shape[0])
        if rescale:
            f = rescale * c.std(1) / (w * c + (1 - w) * u).std(1) + 1 - rescale
        return torch.stack([f * w, f * (1 - w)], 1)
    d = c - u if average is None else average.double().flatten(1)
    norm, square = d.square().sum(1).sqrt(), c.square().sum(1)
    k = (w - 1) * torch.where(norm > norm_threshold, norm_threshold / norm, 1.0)
    rho = torch.where(square == 0, 0, (d * c).sum(1) / square)
    along = k * (1 - eta) * rho
    pair = [1 + k - along, -k] if average is None else [1 - along, k]
    return torch.stack(pair, 1)


def reference(
    conditional: Tensor,  # [B, ...]
    unconditional: Tensor,  # [B, ...]
    guidance_scale: float,
    rescale: float,
    eta: float,
    norm_threshold: float,
    momentum: float,
    project: bool,
    average: Tensor | None,  # [B, ...]
    factors: Tensor,  # [B, 2] float64
) -> None:
    """The specification, in float64."""
    if average is not None:
        d = conditional.double() - unconditional.double()
        average.copy_(d + momentum * average.double())
    made = _factors(
        conditional, unconditional, guidance_scale, rescale, eta, norm_threshold, project, average
    )
    factors.copy_(made)


def fake(*_: object) -> None:
    """There is no output: arguments change."""


def cost(
    conditional: Tensor,
    unconditional: Tensor,
    guidance_scale: float,
    rescale: float,
    eta: float,
    norm_threshold: float,
    momentum: float,
    project: bool,
    average: Tensor | None,
    factors: Tensor,
) -> Cost:
    """Both halves read once, the average read and written."""
    moved = conditional.nbytes + unconditional.nbytes + factors.nbytes
    moved += 0 if average is None else 2 * average.nbytes
    return Cost(bytes=moved, flops=8 * conditional.numel())


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """The average within its rounding; the factors, for that average, to 1e-9 of their terms."""
    conditional, unconditional, w, rescale, eta, threshold, momentum, project, average, _ = (
        arguments
    )
    complaints = []
    factors = result[-1]
    if average is not None:
        c, u, old = conditional.double(), unconditional.double(), average.double()
        size = c.abs() + u.abs() + abs(momentum) * old.abs()
        complaints += differences(
            "average", result[0], average, c - u + momentum * old, size,
            4 * rounding(torch.float64, is_drawn=False),
        )  # fmt: skip
    new = result[0] if average is not None else None
    wanted = _factors(conditional, unconditional, w, rescale, eta, threshold, project, new)
    if (factors.dtype, factors.shape) != (wanted.dtype, wanted.shape):
        return [*complaints, f"factors: {factors.dtype} {tuple(factors.shape)}"]
    if not torch.allclose(factors, wanted, rtol=1e-9, atol=1e-9 * (1 + abs(w)), equal_nan=True):
        complaints.append("factors differ from the reference")
    return complaints


def _sample(shape: tuple[int, ...], **options: float | bool | torch.dtype) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        c, u, average = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        momentum = options.get("momentum", 0.0)
        return (
            c.to(dtype),
            (0.7 * c + 0.5 * u).to(dtype),
            7.5,
            options.get("rescale", 0.0),
            options.get("eta", 1.0),
            options.get("norm_threshold", math.inf),
            momentum,
            "eta" in options,
            average.to(dtype) if momentum else None,
            torch.zeros(shape[0], 2, dtype=torch.float64, device=device),
        )

    numbers = math.prod(shape)
    name = "_".join((*(f"{k}{v}" for k, v in options.items()), "x".join(map(str, shape))))
    sizes = {"N": numbers, "K": 2, "D": numbers // max(shape[0], 1), "H": 1}
    return Sample(name, make, sizes, numbers >= 1 << 20)


def samples() -> Iterable[Sample]:
    """Latents of a video (``bench``) and odd shapes."""
    video = (1, 16, 21, 60, 104)
    yield _sample(video, rescale=0.7)
    yield _sample(video, eta=0.0, norm_threshold=15.0, momentum=-0.5)
    yield _sample((3, 5, 7), rescale=0.7)
    yield _sample((2, 9001), rescale=1.0)
    yield _sample((0, 3))
    yield _sample((2, 67), eta=0.0)
    yield _sample((3, 8193), eta=0.3, norm_threshold=2.5)
    yield _sample((2, 3, 43), eta=0.0, norm_threshold=2.5, momentum=-0.5)


def _load_triton() -> Callable[..., None]:
    from mmfast.kernels.guidance_factors import guidance_factors as launch

    return launch


OP = register(
    Op(
        name="guidance_factors",
        schema="(Tensor conditional, Tensor unconditional, float guidance_scale, float rescale, "
        "float eta, float norm_threshold, float momentum, bool project, Tensor(a!)? average, "
        "Tensor(b!) factors) -> ()",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("guidance_factors"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        mutates=(8, 9),
    )
)
