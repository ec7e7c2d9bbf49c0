"""Residual quantisers side by side, each for a part of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast.checks import check_floating
from mmfast.nn.quantize_dropout import draw_seed
from mmfast.nn.ranks import several
from mmfast.nn.residual_vq import ResidualVQ


class GroupedResidualVQ(nn.Module):
    """G residual quantisers, each for dim / G of the channels.

    Takes the place of ``vector_quantize_pytorch.GroupedResidualVQ``: arguments, results, state
    dict, and from the same seed the same parameters.

    Args:
        dim: of the vectors.
        groups: G, which divides dim.
        accept_image_fmap: vectors are ``(B, dim, height, width)`` instead of ``(B, L, dim)``.
        kwargs: for :class:`ResidualVQ`.

    Raises:
        ValueError: groups does not divide dim; and as :class:`ResidualVQ`.

    Source: Yang et al., "HiFi-Codec: Group-residual Vector quantization for High Fidelity Audio
    Codec" (2023), sec. 3.2.
    """

    def __init__(
        self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups != 0:
            raise ValueError(f"groups must divide dim = {dim}, got {groups}")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs)
            for _ in range(groups)
        )

    @property
    def _groups(self) -> list[ResidualVQ]:
        return cast(list[ResidualVQ], list(self.rvqs))

    @property
    def codebooks(self) -> Tensor:
        """``(G, Q, K, D)``, of stages of one size."""
        return torch.stack([cast(Tensor, rvq.codebooks) for rvq in self._groups])

    @property
    def split_dim(self) -> int:
        """The dimension of the channels."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The codes ``(G, Q, ..., D)`` at ``indices`` (G, ..., Q), zero where they are -1."""
        return torch.stack(
            [
                rvq.get_codes_from_indices(of_group)
                for rvq, of_group in zip(self._groups, indices, strict=True)
            ]
        )

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The vectors ``(..., dim)`` at ``indices`` (G, ..., Q); channels are last, of images
        too."""
        outputs = [
            rvq.get_output_from_indices(of_group)
            for rvq, of_group in zip(self._groups, indices, strict=True)
        ]
        return torch.cat(outputs, -1)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Quantise ``x``; arguments and results are those of :meth:`ResidualVQ.forward`.

        All groups drop the same stages.

        Args:
            indices: ``(G, B, L, Q)``.

        Returns:
            Quantised vectors of x's shape; indices ``(G, B, L, Q)``; losses ``(G, Q)``; and the
            codes ``(Q, B, L, D)`` of each group if asked for. If indices are given: quantised
            vectors and the loss ``()``.

        Raises:
            ValueError: x has another number of channels, or there are indices of another number
                of groups; and as :class:`ResidualVQ`.
        """
        check_floating("x", x)
        if x.dim() < 2 or x.shape[self.split_dim] != self.dim:
            expected = (
                f"(B, {self.dim}, height, width)"
                if self.accept_image_fmap
                else f"(B, L, {self.dim}) or (B, {self.dim})"
            )
            raise ValueError(f"x must be {expected}, got shape {tuple(x.shape)}")
        given: Sequence[Tensor | None] = [None] * self.groups
        if indices is not None and len(indices) > 0:
            if len(indices) != self.groups:
                raise ValueError(
                    f"indices must be of {self.groups} groups, got {len(indices)} of them"
                )
            given = list(indices)
        # Drawn also where nothing is dropped, if that is free: as the library's, so that the same
        # numbers follow.
        seed = None
        free = not several() and not torch.compiler.is_compiling()
        if self.training and (free or self._groups[0].quantize_dropout):
            seed = draw_seed(x.device)
        results = [
            rvq(
                part,
                mask=mask,
                indices=of_group,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for rvq, part, of_group in zip(
                self._groups, x.chunk(self.groups, self.split_dim), given, strict=True
            )
        ]
        quantized, *rest = zip(*results, strict=True)
        joined = torch.cat(quantized, self.split_dim)
        if given[0] is not None:
            return joined, torch.stack(rest[0]).sum()
        indices, losses, *codes = rest
        return joined, torch.stack(indices), torch.stack(losses), *codes
