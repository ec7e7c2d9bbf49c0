"""What the adaLN ops share: how modulations lie along the tokens, their sums, comparison.

Inside the ops the activations are (B, L, C) and all modulations of a call (B, F, C), where each of
the F frames has L / F tokens: F = 1 for one modulation per sample, F = L for one per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mmfast.checks import check_device, check_floating

NORMS = ("layer", "rms")
GATES = ("linear", "tanh")


def check_tokens(x: Tensor, **same: Tensor) -> None:
    """x is (B, ..., C) with at least one channel, and ``same`` have its shape, dtype, device."""
    check_floating("x", x)
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"x must be (B, ..., C), C at least 1, got shape {tuple(x.shape)}")
    for name, tensor in same.items():
        check_floating(name, tensor)
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.shape != x.shape:
            raise ValueError(
                f"{name} must have x's shape {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
    check_device(x=x, **same)


def check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """weight and bias are (C,) where there are any; eps is a finite number that is not negative."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_floating(name, tensor)
        check_device(x=x, **{name: tensor})
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be (C,) = ({x.shape[-1]},), got {tuple(tensor.shape)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def tokens_of(x: Tensor) -> Tensor:
    """(B, L, C) of (B, ..., C)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def modulations_of(x: Tensor, given: Mapping[str, Tensor | None]) -> list[Tensor | None]:
    """Each of ``given`` as (B, F, C), with one F for all; views wherever they agree on F.

    Args:
        x: (B, ..., C).
        given: by name, each (C,), (B, C), (B, F, C) with F a divisor of the number of tokens, or
            x's shape, or that with ones in place of trailing dimensions of tokens. B may be 1.

    Raises:
        TypeError: one is no tensor, or of another dtype.
        ValueError: a shape or device does not fit.
    """
    framed = {
        name: None if tensor is None else _framed(name, x, tensor) for name, tensor in given.items()
    }
    counts = [t.shape[1] for t in framed.values() if t is not None]
    if all(count == counts[0] for count in counts):
        return list(framed.values())
    frames = math.lcm(*counts)
    return [
        t
        if t is None or t.shape[1] == frames
        else t.repeat_interleave(frames // t.shape[1], 1, output_size=frames)
        for t in framed.values()
    ]


def _framed(name: str, x: Tensor, tensor: Tensor) -> Tensor:
    check_floating(name, tensor)
    check_device(x=x, **{name: tensor})
    batch, *middle, channels = x.shape
    length, shape = math.prod(middle), tensor.shape
    found = None
    if shape[-1:] == (channels,) and (tensor.dim() == 1 or shape[0] in (1, batch)):
        if tensor.dim() <= 2:
            found = tensor.reshape(-1, 1, channels)
        elif tensor.dim() == 3 and shape[1] and length % shape[1] == 0:
            found = tensor
        elif tensor.dim() == x.dim():
            own = list(shape[1:-1])
            while own and own[-1] == 1:
                own.pop()
            if own == middle[: len(own)]:
                found = tensor.flatten(1, -2)
    if found is None:
        raise ValueError(
            f"{name} must be (B, C), (B, F, C) with F a divisor of L, or (B, L, C), "
            f"where B = {batch}, L = {length}, C = {channels}, got {tuple(shape)}"
        )
    return found.expand(batch, -1, -1)


def frames_of(*modulations: Tensor | None) -> int:
    """F of (B, F, C); 1 without any."""
    return next((m.shape[1] for m in modulations if m is not None), 1)


def along_tokens(modulation: Tensor, length: int) -> Tensor:
    """(B, L, C) float64 of (B, F, C)."""
    each = length // max(modulation.shape[1], 1)
    return modulation.double().repeat_interleave(each, 1)


def over_frames(terms: Tensor, frames: int) -> Tensor:
    """(B, F, C): the sums of (B, L, C) over the tokens of each frame."""
    batch, length, channels = terms.shape
    return terms.reshape(batch, frames, length // max(frames, 1), channels).sum(2)


def eps_of(x: Tensor) -> float:
    """Of the arithmetic for activations like x."""
    return torch.finfo(wide_of(x)).eps


def wide_of(x: Tensor) -> torch.dtype:
    """dtype of the arithmetic for activations like x, and of the statistics of its rows."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bytes_of(*tensors: Tensor | None) -> int:
    """All together."""
    return sum(t.nbytes for t in tensors if t is not None)


def drawn(
    generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int
) -> Tensor:
    """Standard normal numbers for a sample."""
    return torch.randn(shape, generator=generator).to(device, dtype)
