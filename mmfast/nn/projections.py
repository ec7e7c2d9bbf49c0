"""What lookup-free quantisers have around the quantisation itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def projection(dim_in: int, dim_out: int, bias: bool, wanted: bool) -> nn.Module:
    """A linear layer, or nothing where none is ``wanted``."""
    return nn.Linear(dim_in, dim_out, bias=bias) if wanted else nn.Identity()


def random_rotation(dim: int) -> Tensor:
    """An orthogonal matrix ``(dim, dim)``."""
    matrix = torch.empty(dim, dim)
    nn.init.orthogonal_(matrix)
    return matrix


def soft_clamp(x: Tensor, value: Tensor | float) -> Tensor:
    """x bent to stay within plus and minus ``value``."""
    return (x / value).tanh() * value


def check_stages(given: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]]) -> None:
    """The options ``given`` for the stages of a residual quantiser are ``allowed``, else
    ValueError."""
    for name, values in allowed.items():
        if given.get(name, values[0]) not in values:
            raise ValueError(
                f"{name} must be {values[0]} in a residual quantiser, got {given[name]}"
            )


def check_last(x: Tensor, dim: int) -> None:
    """The last dimension of x, channels having been moved there, has the size ``dim``."""
    if x.dim() < 2:
        raise ValueError(f"x must be of samples with {dim} channels, got shape {tuple(x.shape)}")
    if x.shape[-1] != dim:
        raise ValueError(f"x must have {dim} channels, got {x.shape[-1]}")
