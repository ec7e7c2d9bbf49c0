"""Convolutional encoders and decoders of signals, images and videos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.models.repeating import repeatable

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_GROUPS = 32  # of channels that are normalised together, at most


def convolution(dims: int, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
    """Over 1, 2 or 3 dimensions, with as much padding as keeps sizes at stride 1."""
    return _CONVOLUTIONS[dims](inputs, outputs, size, stride, padding=(size - 1) // 2)


def _norm(channels: int, norm: str | None) -> nn.Module:
    if norm is None:
        return nn.Identity()
    groups = next(g for g in range(min(_GROUPS, channels), 0, -1) if channels % g == 0)
    return _GroupNorm(groups, channels)


class _GroupNorm(nn.GroupNorm):
    """Also of groups of a single value, as tiny samples have, which PyTorch's module refuses."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut: ``(B, C, ...)`` to ``(B, outputs, ...)``."""

    def __init__(self, dims: int, inputs: int, outputs: int, norm: str | None = "group") -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(inputs, norm),
            nn.SiLU(),
            convolution(dims, inputs, outputs),
            _norm(outputs, norm),
            nn.SiLU(),
            convolution(dims, outputs, outputs),
        )
        self.shortcut = (
            nn.Identity() if inputs == outputs else convolution(dims, inputs, outputs, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


class Downsample(nn.Module):
    """Halves the sizes of all dimensions; odd ones are rounded up."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.convolution = convolution(dims, channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


class Upsample(nn.Module):
    """Doubles the sizes of all dimensions."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.convolution = convolution(dims, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Fold(nn.Module):
    """Blocks as channels: ``(B, C, *sizes)`` to ``(B, C patch^dims, *sizes / patch)``."""

    def __init__(self, dims: int, patch: int) -> None:
        super().__init__()
        self.dims, self.patch = dims, patch

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.dims):
            x = x.unflatten(2 + 2 * i, (-1, self.patch)).movedim(3 + 2 * i, 2 + i)
        return x.flatten(1, 1 + self.dims)  # (B, C, patch, patch, ..., *sizes / patch) before


class Unfold(nn.Module):
    """The way back of :class:`Fold`."""

    def __init__(self, dims: int, patch: int) -> None:
        super().__init__()
        self.dims, self.patch = dims, patch

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, *(self.patch,) * self.dims))
        for i in reversed(range(self.dims)):
            x = x.movedim(2 + i, 3 + 2 * i).flatten(2 + 2 * i, 3 + 2 * i)
        return x


class Layers(nn.Sequential):
    """One layer behind the other.

    Attributes:
        gradient_checkpointing: compute what is inside of the layers again in the backward, instead
            of keeping it.
    """

    gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = repeatable(layer, self.gradient_checkpointing)(x)
        return x


def encoder(
    dims: int,
    channels: int,
    widths: Sequence[int],
    num_blocks: int,
    latent_dim: int,
    patch: int = 1,
    norm: str | None = "group",
) -> Layers:
    """``(B, channels, ...)`` to ``(B, latent_dim, ...)``, each size halved once per width after
    the first; before that, blocks of ``patch`` become channels."""
    layers: list[nn.Module] = [Fold(dims, patch)] if patch > 1 else []
    layers.append(convolution(dims, channels * patch**dims, widths[0]))
    width = widths[0]
    for level, wider in enumerate(widths):
        if level:
            layers.append(Downsample(dims, width))
        for _ in range(num_blocks):
            layers.append(ResidualBlock(dims, width, wider, norm))
            width = wider
    return Layers(*layers, _norm(width, norm), nn.SiLU(), convolution(dims, width, latent_dim))


def decoder(
    dims: int,
    channels: int,
    widths: Sequence[int],
    num_blocks: int,
    latent_dim: int,
    patch: int = 1,
    norm: str | None = "group",
) -> Layers:
    """The way back of :func:`encoder`."""
    width = widths[-1]
    layers: list[nn.Module] = [convolution(dims, latent_dim, width)]
    for level, narrower in enumerate(reversed(widths)):
        if level:
            layers.append(Upsample(dims, width))
        for _ in range(num_blocks):
            layers.append(ResidualBlock(dims, width, narrower, norm))
            width = narrower
    layers += [_norm(width, norm), nn.SiLU(), convolution(dims, width, channels * patch**dims)]
    return Layers(*layers, *([Unfold(dims, patch)] if patch > 1 else []))
