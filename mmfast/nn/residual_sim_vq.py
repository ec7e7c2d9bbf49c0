"""Stages of SimVQ, each quantising what the ones before it left over."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast.checks import check_floating
from mmfast.nn.quantize_dropout import (
    check_dropout,
    draw_num_stages,
    is_dropped,
    stack_stages,
    undo_dropped,
)
from mmfast.nn.residual_codes import codes_at, with_all_stages, without_dropped
from mmfast.nn.sim_vq import SimVQ


class ResidualSimVQ(nn.Module):
    """Residual quantisation with Q stages of :class:`SimVQ`.

    Takes the place of ``vector_quantize_pytorch.ResidualSimVQ``: arguments, results, state dict,
    and from the same seed the same parameters.

    Args:
        dim: D, of the vectors.
        num_quantizers: Q.
        codebook_size: K, of each stage.
        heads: 1.
        quantize_dropout: each training batch uses a random number of the first stages.
        quantize_dropout_cutoff_index: the last stage that is always used.
        quantize_dropout_multiple_of: the number of stages used is a multiple of this, or Q.
        channel_first: vectors are ``(B, D, ...)`` instead of ``(B, ..., D)``.
        rotation_trick, sim_vq_kwargs: for :class:`SimVQ`.

    Raises:
        ValueError: heads is not 1, or the dropout's settings make no sense.

    Source: Zeghidour et al., "SoundStream" (2021), algorithm 1; for the stages, see
    :class:`SimVQ`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads must be 1 in a residual quantiser, got {heads}")
        self.channel_first = channel_first
        self.num_quantizers = num_quantizers
        self.layers = nn.ModuleList(
            SimVQ(
                dim=dim,
                codebook_size=codebook_size,
                rotation_trick=rotation_trick,
                channel_first=channel_first,
                **sim_vq_kwargs,
            )
            for _ in range(num_quantizers)
        )
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        check_dropout(
            self.quantize_dropout,
            num_quantizers,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of

    @property
    def _stages(self) -> list[SimVQ]:
        return cast(list[SimVQ], list(self.layers))

    @property
    def codebook_size(self) -> int:
        """K."""
        return self._stages[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        """D."""
        return self._stages[0].codebook_dim

    @property
    def codebooks(self) -> Tensor:
        """``(Q, K, D)``."""
        return torch.stack([layer.codebook for layer in self._stages])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each stage at ``indices`` (B, ..., Q), zero where they are -1.

        Returns:
            ``(Q, B, ..., D)``, or ``(Q, B, D, ...)`` if channel_first.

        Raises:
            ValueError: indices are of more than Q stages, or of fewer without quantize_dropout.
        """
        indices = with_all_stages(indices, self.num_quantizers, self.quantize_dropout)
        codes = torch.stack(
            [
                without_dropped(codes_at(layer.codebook, index), index)
                for layer, index in zip(self._stages, indices.unbind(-1), strict=True)
            ]
        )
        return codes.movedim(-1, 2) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum over the stages of :meth:`get_codes_from_indices`."""
        return self.get_codes_from_indices(indices).sum(0)

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise ``x`` (B, ..., D), or (B, D, ...) if channel_first.

        Args:
            return_all_codes: also return what :meth:`get_codes_from_indices` gives.
            rand_quantize_dropout_fixed_seed: of the number of stages that a training batch uses;
                a ``()`` int64 tensor is never read back to the host.

        Returns:
            Quantised vectors of x's shape; indices ``(B, ..., Q)``, int64, -1 for stages not
            used; losses ``(Q,)``; and the codes if asked for.

        Raises:
            TypeError, ValueError: as :class:`SimVQ`.
        """
        check_floating("x", x)
        num_stages: int | Tensor = self.num_quantizers
        if self.training and self.quantize_dropout:
            num_stages = draw_num_stages(
                rand_quantize_dropout_fixed_seed,
                self.num_quantizers,
                self.quantize_dropout_cutoff_index,
                self.quantize_dropout_multiple_of,
                x.device,
            )
        if self.channel_first and x.dim() > 1:
            # The same shape, with vectors together in memory: each stage then moves nothing.
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        residual, total = x, torch.zeros_like(x)
        all_indices, all_losses = [], []
        for stage, layer in enumerate(self._stages):
            if is_dropped(stage, num_stages):
                break
            quantized, indices, loss = undo_dropped(stage, num_stages, *layer(residual))
            residual = residual - quantized.detach()
            total = total + quantized
            all_indices.append(indices)
            all_losses.append(loss)
        indices, losses = stack_stages(self.num_quantizers, all_indices, all_losses)
        if not return_all_codes:
            return total, indices, losses
        return total, indices, losses, self.get_codes_from_indices(indices)
