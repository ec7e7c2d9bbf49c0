"""Images, videos and signals as tokens, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice, check_floating
from mmfast.ops.unequal import unequal
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register

ORDERS = ("channels_first", "channels_last")
MOST_DIMS = 3


def patchify(
    x: Tensor, patch_size: int | Sequence[int], *, order: str = "channels_first"
) -> Tensor:
    """Cut x into patches, which become tokens.

    Patches follow each other as their places do, the last dimension fastest.

    Args:
        x: ``(B, C, W)``, ``(B, C, H, W)`` or ``(B, C, F, H, W)``, float16, bfloat16, float32 or
            float64. Any strides.
        patch_size: of each spatial dimension, or one number for all.
        order: of the numbers of a token. ``"channels_first"``: (C, patch), as in the weights of a
            convolution, so that ``linear(patchify(x), weight.flatten(1))`` is the convolution, and
            in Flux's packed latents. ``"channels_last"``: (patch, C), as in the output of the final
            layers of DiT, SD3 and PixArt.

    Returns:
        ``(B, L, C prod(patch_size))``, contiguous.

    Raises:
        TypeError: x is no tensor, or has another dtype.
        ValueError: x's sizes are no multiples of ``patch_size``, or there is no such order.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), section 3.1.
    """
    check_floating("x", x)
    check_choice("order", order, ORDERS)
    dims = x.dim() - 2
    if not 1 <= dims <= MOST_DIMS:
        raise ValueError(
            f"x must be (B, C, W), (B, C, H, W) or (B, C, F, H, W), got shape {tuple(x.shape)}"
        )
    patch = _patch(patch_size, dims)
    _check_multiples("x's sizes", x.shape[2:], patch)
    return backends.call(OP, x, patch, order == "channels_last")


def unpatchify(
    tokens: Tensor,
    patch_size: int | Sequence[int],
    sizes: Sequence[int],
    *,
    order: str = "channels_first",
) -> Tensor:
    """The inverse of :func:`patchify`.

    Args:
        tokens: ``(B, L, C prod(patch_size))``. Any strides.
        patch_size: of each spatial dimension, or one number for all.
        sizes: ``(W,)``, ``(H, W)`` or ``(F, H, W)``, of the result.
        order: of the numbers of a token, as it was cut.

    Returns:
        ``(B, C, *sizes)``, contiguous.

    Raises:
        TypeError: ``tokens`` is no tensor, or has another dtype.
        ValueError: its shape, ``patch_size`` or ``sizes`` do not fit, or there is no such order.
    """
    check_floating("tokens", tokens)
    check_choice("order", order, ORDERS)
    sizes = list(sizes)
    if not 1 <= len(sizes) <= MOST_DIMS:
        raise ValueError(f"sizes must be (W,), (H, W) or (F, H, W), got {tuple(sizes)}")
    patch = _patch(patch_size, len(sizes))
    _check_multiples("sizes", sizes, patch)
    length = math.prod([s // p for s, p in zip(sizes, patch, strict=True)])
    numbers = math.prod(patch)
    if tokens.dim() != 3 or tokens.shape[1] != length or tokens.shape[2] % numbers:
        raise ValueError(
            f"tokens must be (B, {length}, C * {numbers}) for sizes {tuple(sizes)} and patches "
            f"{tuple(patch)}, got shape {tuple(tokens.shape)}"
        )
    return backends.call(INVERSE, tokens, patch, sizes, order == "channels_last")


def _patch(patch_size: int | Sequence[int], dims: int) -> list[int]:
    patch = [patch_size] * dims if isinstance(patch_size, int) else list(patch_size)
    if len(patch) != dims or min(patch) < 1:
        raise ValueError(
            f"patch_size must be a number or {dims} numbers, at least 1, got {patch_size}"
        )
    return patch


def _check_multiples(name: str, sizes: Sequence[int], patch: list[int]) -> None:
    if any(s % p for s, p in zip(sizes, patch, strict=True)):
        raise ValueError(
            f"{name} must be multiples of patch_size {tuple(patch)}, got {tuple(sizes)}"
        )


def _token_axes(dims: int, channels_last: bool) -> list[int]:
    """Of x as (B, C, places and patch of each dimension by turns): the axes in a token's order."""
    places, patch = ([first + 2 * d for d in range(dims)] for first in (2, 3))
    return [0, *places, *([*patch, 1] if channels_last else [1, *patch])]


def reference(
    x: Tensor,  # [B, C, *sizes]
    patch: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The specification."""
    split = [n for s, p in zip(x.shape[2:], patch, strict=True) for n in (s // p, p)]
    cut = x.reshape(*x.shape[:2], *split)  # [B, C, place, patch, place, patch, ...]
    ordered = cut.permute(_token_axes(len(patch), channels_last))
    # A copy, even where the order is the same.
    return ordered.clone(memory_format=torch.contiguous_format).view(fake(x, patch).shape)


def fake(x: Tensor, patch: Sequence[int], channels_last: bool = False) -> Tensor:
    """The output without values."""
    length = math.prod(s // p for s, p in zip(x.shape[2:], patch, strict=True))
    return x.new_empty((x.shape[0], length, x.shape[1] * math.prod(patch)))


def reference_unpatchify(
    tokens: Tensor,  # [B, L, C prod(patch)]
    patch: Sequence[int],
    sizes: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The specification of the inverse."""
    dims, batch, channels = len(patch), tokens.shape[0], tokens.shape[2] // math.prod(patch)
    of_axis = [batch, channels]
    of_axis += [n for s, p in zip(sizes, patch, strict=True) for n in (s // p, p)]
    axes = _token_axes(dims, channels_last)
    cut = tokens.reshape([of_axis[a] for a in axes])
    back = cut.permute([axes.index(a) for a in range(len(axes))])
    copy = back.clone(memory_format=torch.contiguous_format)
    return copy.view(batch, channels, *sizes)


def fake_unpatchify(
    tokens: Tensor, patch: Sequence[int], sizes: Sequence[int], channels_last: bool
) -> Tensor:
    """The output without values."""
    return tokens.new_empty((tokens.shape[0], tokens.shape[2] // math.prod(patch), *sizes))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.patch, ctx.channels_last = inputs
    ctx.sizes = x.shape[2:]


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    sizes = list(ctx.sizes)
    return backends.call(INVERSE, grad, ctx.patch, sizes, ctx.channels_last), None, None


def _setup_unpatchify(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.patch, _, ctx.channels_last = inputs


def _gradients_unpatchify(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None
    return backends.call(OP, grad, ctx.patch, ctx.channels_last), None, None, None


def cost(x: Tensor, *_: Any) -> Cost:
    """Everything read once and written once."""
    return Cost(bytes=2 * x.nbytes, flops=0)


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Every number must be in its place."""
    return unequal(result, reference(*arguments) if expected is None else expected)


def compare_unpatchify(
    result: Tensor, arguments: Arguments, expected: Tensor | None = None
) -> list[str]:
    """Likewise."""
    return unequal(result, reference_unpatchify(*arguments) if expected is None else expected)


def _sample(shape: tuple[int, ...], patch: tuple[int, ...], channels_last: bool) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x, list(patch), channels_last

    name = f"{'x'.join(map(str, shape))}_by_{'x'.join(map(str, patch))}"
    numbers = math.prod(shape)
    sizes = {"N": numbers // max(1, shape[1]), "K": 2, "D": shape[1], "H": 1}
    return Sample(name + "_last" * channels_last, make, sizes, numbers >= 1 << 18)


def samples() -> Iterable[Sample]:
    """Latents (``bench``) and odd shapes."""
    yield _sample((8, 16, 128, 128), (2, 2), False)
    yield _sample((2, 16, 8, 60, 104), (1, 2, 2), True)
    for last in (False, True):
        yield _sample((2, 3, 6, 10), (3, 2), last)
        yield _sample((1, 1, 8), (4,), last)
        yield _sample((2, 5, 4, 6, 9), (2, 1, 3), last)
        yield _sample((2, 4, 8, 32), (8, 8), last)
        yield _sample((2, 19, 3, 70), (1, 1), last)
    yield _sample((0, 4, 4, 4), (2, 2), False)
    yield _sample((2, 4, 0, 4), (2, 2), True)


def samples_unpatchify() -> Iterable[Sample]:
    """What the forward's samples become."""

    def of(sample: Sample) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            x, patch, channels_last = sample.make(device, dtype, seed)
            return reference(x, patch, channels_last), patch, list(x.shape[2:]), channels_last

        return Sample(sample.name, make, sample.shape, sample.bench)

    return [of(sample) for sample in samples()]


def _supported(tensor: Tensor, *_: Any) -> list[str]:
    if tensor.shape[1:].numel() < 1 << 31:
        return []
    return [f"samples must have less than 2^31 numbers, got {tensor.shape[1:].numel()}"]


def _load_triton() -> Callable[..., Tensor]:
    from mmfast.kernels.patchify import patchify as launch

    return launch


def _load_triton_unpatchify() -> Callable[..., Tensor]:
    from mmfast.kernels.patchify import unpatchify as launch

    return launch


OP = register(
    Op(
        name="patchify",
        schema="(Tensor x, int[] patch, bool channels_last) -> Tensor",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("patchify"),
            "triton": backends.triton(_load_triton, _supported),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients, differentiable=True),
    )
)

INVERSE = register(
    Op(
        name="unpatchify",
        schema="(Tensor tokens, int[] patch, SymInt[] sizes, bool channels_last) -> Tensor",
        reference=reference_unpatchify,
        fake=fake_unpatchify,
        backends={
            "cpp": backends.cpp("unpatchify"),
            "triton": backends.triton(_load_triton_unpatchify, _supported),
        },
        samples=samples_unpatchify,
        cost=cost,
        compare=compare_unpatchify,
        dtypes=FLOATING,
        backward=Backward(_setup_unpatchify, _gradients_unpatchify, differentiable=True),
    )
)
