"""A codebook that is a learned transform of a frozen one, so that all codes move at each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmfast.checks import check_codes, check_floating
from mmfast.ops.vector_quantize import vector_quantize


def _unchanged(codebook: Tensor) -> Tensor:
    return codebook


class SimVQ(nn.Module):
    """Vector quantisation with the codes ``code_transform(frozen_codebook)``.

    Takes the place of ``vector_quantize_pytorch.SimVQ``: arguments, results, state dict, and from
    the same seed the same parameters. Indices are exact, and no N x K distances are stored.

    Args:
        dim: D, of the vectors.
        codebook_size: K.
        codebook_transform: module from ``(K, frozen_codebook_dim)`` to ``(K, D)``; a linear layer
            without bias if None.
        init_fn: called with the normal random codes ``(K, frozen_codebook_dim)``, returns those
            to freeze.
        channel_first: vectors are ``(B, D, ...)`` instead of ``(B, ..., D)``.
        rotation_trick: gradients pass to the vectors by the rotation trick, else unchanged.
        input_to_quantize_commit_loss_weight: of the loss whose gradient goes to the vectors.
        commitment_weight: of both losses.
        frozen_codebook_dim: D if None.

    Source: Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One
    Linear Layer" (2024), eq. 7.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = _unchanged,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = self.codebook_dim = dim
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        codebook = init_fn(torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5)
        if codebook_transform is None:
            codebook_transform = nn.Linear(frozen_dim, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", codebook)

    @property
    def codebook(self) -> Tensor:
        """The codes ``(K, D)``, differentiable by the transform's parameters."""
        return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes at ``indices`` (B, ...): (B, ..., D), or (B, D, ...) if channel_first."""
        check_codes("indices", indices, self.frozen_codebook.shape[0])
        codes = self.code_transform(nn.functional.embedding(indices, self.frozen_codebook))
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise ``x`` (B, ..., D), or (B, D, ...) if channel_first.

        Returns:
            Quantised vectors of x's shape and dtype; indices ``(B, ...)``, int64; and the loss
            ``()``.

        Raises:
            TypeError: x is no tensor of a floating dtype.
            ValueError: x has another number of dimensions D.
        """
        check_floating("x", x)
        channel = 1 if self.channel_first else -1
        if x.dim() < 2 or x.shape[channel] != self.dim:
            expected = f"(B, {self.dim}, ...)" if self.channel_first else f"(B, ..., {self.dim})"
            raise ValueError(f"x must be {expected}, got shape {tuple(x.shape)}")
        result = vector_quantize(
            x.movedim(channel, -1),
            self.codebook,
            gradient="rotation" if self.rotation_trick else "straight_through",
        )
        loss = result.codebook_loss + (
            result.commitment_loss * self.input_to_quantize_commit_loss_weight
        )
        return result.quantized.movedim(-1, channel), result.indices, loss * self.commitment_weight
