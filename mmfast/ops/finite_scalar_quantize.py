"""Finite scalar quantisation: every dimension rounded to one of its own few levels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice, check_device, check_floating, check_integer
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register
from mmfast.results import exportable

VARIANTS = ("bound", "symmetric")

_MARGIN = 1e-3  # by which "bound" reaches beyond its outermost levels
_MOST_CODES = 2**31 - 1  # indices are int32


@exportable
class FiniteScalarQuantized(NamedTuple):
    """What :func:`finite_scalar_quantize` returns.

    Attributes:
        quantized: values of the levels, from -1 to 1; z's shape and dtype.
        indices: of the codes, ``z.shape[:-1]``, int32; the first dimension varies fastest.
    """

    quantized: Tensor
    indices: Tensor


class Dimension(NamedTuple):
    """How one dimension is quantised.

    Attributes:
        thresholds: a number's level is how many of them it reaches, ascending.
        shift: what is added before the tanh (or the clamp).
        gain: derivative of the quantised value by that of the tanh, the rounding left out.
        width: level l has the value (2 l - width) / width.
    """

    thresholds: tuple[float, ...]
    shift: float
    gain: float
    width: int


def finite_scalar_quantize(
    z: Tensor,
    levels: Sequence[int],
    *,
    variant: str = "bound",
    hard_clamp: bool = False,
    noise: Tensor | None = None,
) -> FiniteScalarQuantized:
    """Bound every dimension and round it to one of its levels, differentiably.

    The levels of dimension d are ``levels[d]`` numbers from -1 to 1. ``"bound"`` rounds
    tanh(z + shift) half_l - offset and divides by ``levels[d] // 2``, so that an even number of
    levels is not symmetric; ``"symmetric"`` spreads them evenly over [-1, 1]. Both are monotonic
    in z: a level is found by comparing z with thresholds, computed once in float64, and no tanh
    is evaluated. A level is therefore exact, and the same on every backend.

    Args:
        z: ``(..., D)``. Any strides; float16, bfloat16, float32 or float64.
        levels: D numbers, each at least 2, or 3 for ``"bound"``; their product at most 2^31 - 1.
        variant: ``"bound"`` or ``"symmetric"``.
        hard_clamp: a clamp to [-1, 1] in the place of the tanh.
        noise: added to the quantised values, which are clamped to [-1, 1] again; z's shape, for
            ``"symmetric"``. 0 where there is to be none. It gets no gradient.

    Returns:
        :class:`FiniteScalarQuantized`. The gradient of ``quantized`` goes straight through the
        rounding, and through the tanh (and the clamps) as it is. NaN stays NaN and counts as
        level 0.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices, ``levels`` or ``variant`` do not fit.

    Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2023), appendix A.1;
    Parker et al., "Scaling Transformers for Low-Bitrate High-Quality Speech Coding" (2024),
    sec. 3.2, for the symmetric variant and the noise.
    """
    check_floating("z", z)
    check_choice("variant", variant, VARIANTS)
    if isinstance(levels, int):
        raise TypeError(f"levels must be ints, one for each dimension, got {levels}")
    for n in levels:
        check_integer("each of levels", n)
    levels = [int(n) for n in levels]
    least = 3 if variant == "bound" else 2
    if not levels or min(levels) < least:
        raise ValueError(
            f"levels must be at least one number, each at least {least} with variant {variant!r}, "
            f"got {levels}"
        )
    if math.prod(levels) > _MOST_CODES:
        raise ValueError(f"levels must make at most {_MOST_CODES} codes, got {math.prod(levels)}")
    if z.dim() < 1 or z.shape[-1] != len(levels):
        raise ValueError(f"z must be (..., D) with D = {len(levels)}, got shape {tuple(z.shape)}")
    if noise is not None:
        check_floating("noise", noise)
        check_device(z=z, noise=noise)
        if variant != "symmetric":
            raise ValueError(f"noise is for variant 'symmetric', got {variant!r}")
        if noise.shape != z.shape:
            raise ValueError(f"noise must have shape {tuple(z.shape)}, got {tuple(noise.shape)}")
    return FiniteScalarQuantized(*backends.call(OP, z, levels, variant, hard_clamp, noise))


@functools.cache
def dimension(num_levels: int, variant: str, hard_clamp: bool) -> Dimension:
    """How a dimension of so many levels is quantised."""
    inverse: Callable[[float], float] = float if hard_clamp else math.atanh
    if variant == "symmetric":
        width = num_levels - 1
        # floor(width (tanh(z) + 1) / 2 + 1 / 2) >= l + 1
        thresholds = (inverse((2 * i + 1) / width - 1) for i in range(width))
        return Dimension(tuple(thresholds), 0.0, 1.0, width)
    half = (num_levels - 1) * (1 + _MARGIN) / 2
    offset = 0.5 if num_levels % 2 == 0 else 0.0
    shift = inverse(offset / half)
    middle = num_levels // 2
    # round(half tanh(z + shift) - offset) + middle >= l + 1
    thresholds = (
        inverse((i + 0.5 - middle + offset) / half) - shift for i in range(num_levels - 1)
    )
    return Dimension(tuple(thresholds), shift, half / middle, 2 * middle)


def dimensions(levels: Sequence[int], variant: str, hard_clamp: bool) -> list[Dimension]:
    """:func:`dimension` of each."""
    return [dimension(n, variant, hard_clamp) for n in levels]


def _levels_of(z: Tensor, dims: Sequence[Dimension]) -> Tensor:
    """Level of each number of z (N, D) float64, int64."""
    result = z.new_empty(z.shape, dtype=torch.int64)
    for d, spec in enumerate(dims):
        thresholds = z.new_tensor(spec.thresholds)  # [L - 1]
        column = z[:, d].contiguous()  # [N]
        result[:, d] = torch.searchsorted(thresholds, column, right=True)
    return torch.where(z.isnan(), 0, result)


def _values_of(level: Tensor, dims: Sequence[Dimension]) -> Tensor:
    """Values of levels (N, D), float64."""
    width = torch.tensor([d.width for d in dims], device=level.device)
    return (2 * level - width).double() / width


def reference(
    z: Tensor, levels: Sequence[int], variant: str, hard_clamp: bool, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification."""
    quantized, indices = fake(z, levels, variant, hard_clamp, noise)
    dims = dimensions(levels, variant, hard_clamp)
    rows = z.reshape(-1, len(levels)).double()  # [N, D]
    level = _levels_of(rows, dims)  # [N, D]
    value = torch.where(rows.isnan(), rows, _values_of(level, dims))
    if noise is not None:
        value = (value + noise.reshape(rows.shape).double()).clamp(-1, 1)
    quantized.copy_(value.view(z.shape))
    basis = level.new_tensor([math.prod(levels[:d]) for d in range(len(levels))])  # [D]
    indices.copy_((level * basis).sum(1).view(indices.shape))
    return quantized, indices


def fake(
    z: Tensor, levels: Sequence[int], variant: str, hard_clamp: bool, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    return z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, ctx.levels, ctx.variant, ctx.hard_clamp, noise = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, noise)


def _gradients(ctx: Any, quantized: Tensor | None, indices: None) -> tuple[Tensor | None, ...]:
    z, noise = ctx.saved_tensors
    if quantized is None or not ctx.needs_input_grad[0]:
        return None, None, None, None, None
    grad = backends.call(BACKWARD, quantized, z, ctx.levels, ctx.variant, ctx.hard_clamp, noise)
    return grad, None, None, None, None


def reference_bwd(
    grad: Tensor,
    z: Tensor,
    levels: Sequence[int],
    variant: str,
    hard_clamp: bool,
    noise: Tensor | None,
) -> Tensor:
    """The gradient of z from that of the quantised values."""
    dims = dimensions(levels, variant, hard_clamp)
    rows = z.reshape(-1, len(levels)).double()  # [N, D]
    u = rows + rows.new_tensor([d.shift for d in dims])
    if hard_clamp:
        slope = torch.where((u >= -1) & (u <= 1), 1.0, 0.0).double()
    else:
        e = (-2 * u.abs()).exp()
        slope = 4 * e / (1 + e).square()  # 1 - tanh(u)^2, without its cancellation
    slope = slope * rows.new_tensor([d.gain for d in dims])
    if noise is not None:
        value = _values_of(_levels_of(rows, dims), dims) + noise.reshape(rows.shape).double()
        slope = torch.where((value >= -1) & (value <= 1), slope, 0)
    slope = torch.where(u.isnan(), u, slope)
    result = fake_bwd(grad, z, levels, variant, hard_clamp, noise)
    return result.copy_(grad * slope.view(z.shape))


def fake_bwd(
    grad: Tensor,
    z: Tensor,
    levels: Sequence[int],
    variant: str,
    hard_clamp: bool,
    noise: Tensor | None,
) -> Tensor:
    """The output without values."""
    return z.new_empty(z.shape)


def cost(
    z: Tensor, levels: Sequence[int], variant: str, hard_clamp: bool, noise: Tensor | None
) -> Cost:
    """z (and the noise) read once, quantised values and indices written once."""
    moved = 2 * z.nbytes + 4 * z.shape[:-1].numel() + (0 if noise is None else noise.nbytes)
    return Cost(bytes=moved, flops=z.shape[:-1].numel() * (sum(levels) + 3 * len(levels)))


def cost_bwd(
    grad: Tensor,
    z: Tensor,
    levels: Sequence[int],
    variant: str,
    hard_clamp: bool,
    noise: Tensor | None,
) -> Cost:
    """z, its gradient's source (and the noise) read once, the gradient written once."""
    moved = 2 * z.nbytes + grad.nbytes + (0 if noise is None else noise.nbytes)
    return Cost(bytes=moved, flops=20 * z.numel())


def compare(
    result: tuple[Tensor, Tensor],
    arguments: Arguments,
    expected: tuple[Tensor, Tensor] | None = None,
) -> list[str]:
    """Indices and quantised values must equal the reference's; with noise there is a rounding."""
    expected = expected or reference(*arguments)
    noise = arguments[-1]
    complaints = []
    for name, got, want in zip(("quantized", "indices"), result, expected, strict=True):
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            complaints.append(
                f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
            )
            continue
        same = (got == want) | (got.isnan() & want.isnan())
        if name == "quantized" and noise is not None:
            same |= (got - want).abs() <= 2 * torch.finfo(got.dtype).eps
        if not bool(same.all()):
            complaints.append(f"{int((~same).sum())} of {same.numel()} {name} differ")
    return complaints


def compare_bwd(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Within a few roundings of the reference, element by element."""
    expected = reference_bwd(*arguments) if expected is None else expected
    if (result.dtype, result.shape) != (expected.dtype, expected.shape):
        return [f"{result.dtype} {tuple(result.shape)}, expected {expected.dtype}"]
    grad, z = arguments[:2]
    info = torch.finfo(result.dtype)
    # exp has a relative error that grows with its argument.
    tolerance = (16 + 4 * z.abs()) * info.eps * expected.abs() + 1e-30 * grad.abs()
    tolerance = tolerance + info.smallest_normal
    same = (result - expected).abs() <= tolerance
    same |= (result == expected) | (result.isnan() & expected.isnan())
    return [] if bool(same.all()) else [f"{int((~same).sum())} gradients differ"]


def _sample(
    n: int,
    levels: tuple[int, ...],
    variant: str = "bound",
    hard_clamp: bool = False,
    noisy: bool = False,
) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, len(levels), generator=generator).to(device, dtype)
        noise = None
        if noisy:
            noise = torch.rand(z.shape, generator=generator).sub(0.5).to(device, dtype)
        return z, list(levels), variant, hard_clamp, noise

    name = f"n{n}_l{'x'.join(map(str, levels))}_{variant}{'_hard' * hard_clamp}{'_noise' * noisy}"
    shape = {"N": n, "K": math.prod(levels), "D": len(levels)}
    return Sample(name, make, shape, bench=n >= 4096)


def samples() -> Iterable[Sample]:
    """Shapes of the field (``bench``) and odd ones."""
    yield _sample(65536, (8, 5, 5, 5))
    yield _sample(1 << 20, (8, 8, 8, 5, 5, 5))
    for n, levels in ((0, (3, 4)), (1, (3,)), (33, (8, 5, 5, 5)), (7, (3,) * 9), (65, (64, 9))):
        yield _sample(n, levels)
    yield _sample(33, (8, 3, 5), hard_clamp=True)
    yield _sample(65, (2, 3, 4), "symmetric")
    yield _sample(33, (17, 4, 5), "symmetric", noisy=True)
    yield _sample(63, (5, 4), "symmetric", hard_clamp=True, noisy=True)


def samples_bwd() -> Iterable[Sample]:
    """Gradients of the forward's samples."""

    def of(sample: Sample) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            z, *others = sample.make(device, dtype, seed)
            generator = torch.Generator().manual_seed(seed + 1)
            grad = torch.randn(z.shape, generator=generator).to(z)
            return grad, z, *others

        return Sample(sample.name, make, sample.shape, sample.bench)

    return [of(sample) for sample in samples()]


def _load_triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from mmfast.kernels.finite_scalar_quantize import finite_scalar_quantize as launch

    return launch


def _load_triton_bwd() -> Callable[..., Tensor]:
    from mmfast.kernels.finite_scalar_quantize import finite_scalar_quantize_bwd as launch

    return launch


OP = register(
    Op(
        name="finite_scalar_quantize",
        schema="(Tensor z, int[] levels, str variant, bool hard_clamp, Tensor? noise)"
        " -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("finite_scalar_quantize"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients),
    )
)

BACKWARD = register(
    Op(
        name="finite_scalar_quantize_bwd",
        schema="(Tensor grad, Tensor z, int[] levels, str variant, bool hard_clamp, "
        "Tensor? noise) -> Tensor",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("finite_scalar_quantize_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
