"""Residual quantisers side by side, each on a part of the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.checks import check_floating
from mmfast.nn import quantize_dropout as dropout


class GroupedResidual(nn.Module):
    """G residual quantisers, each of ``dim`` / G channels. All use the same stages.

    Args:
        dim: channels, a multiple of ``groups``.
        groups: G.
        accept_image_fmap: the channels are dimension 1.
        make: the quantiser of so many channels.

    Raises:
        ValueError: ``dim`` is no multiple of ``groups``.
    """

    def __init__(
        self, dim: int, groups: int, accept_image_fmap: bool, make: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"dim must be a multiple of groups = {groups}, got {dim}")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self.rvqs: Any = nn.ModuleList(make(dim // groups) for _ in range(groups))

    @property
    def codebooks(self) -> Tensor:
        """The groups' codebooks, ``(G, Q, K, D)``."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    @property
    def split_dim(self) -> int:
        """The dimension of the channels."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The groups' codes ``(G, Q, B, ..., D)`` of indices as ``forward`` returns them."""
        pairs = zip(self.rvqs, indices, strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in pairs])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` made of the vectors with these indices."""
        pairs = zip(self.rvqs, indices, strict=True)
        outputs = [rvq.get_output_from_indices(index) for rvq, index in pairs]
        return torch.cat(outputs, self.split_dim)

    def _each(self, x: Tensor, *args: object) -> tuple[Any, ...]:
        """The groups' outputs for their part of x: vectors side by side, indices and losses
        stacked. ``args`` go to each group, ``return_all_codes`` as the last of them."""
        check_floating("x", x)
        seed = dropout.draw_seed(x.device) if self.training else None
        if x.dim() < 2:
            raise ValueError(
                f"x must be of samples with {self.dim} channels, got shape {tuple(x.shape)}"
            )
        if x.shape[self.split_dim] != self.dim:
            raise ValueError(f"x must have {self.dim} channels, got {x.shape[self.split_dim]}")
        parts = zip(self.rvqs, x.chunk(self.groups, self.split_dim), strict=True)
        quantized, *others = zip(*(rvq(part, *args, seed) for rvq, part in parts), strict=True)
        codes = [others.pop()] if args[-1] else []
        stacked = [torch.stack(other) for other in others]
        return torch.cat(quantized, self.split_dim), *stacked, *codes
