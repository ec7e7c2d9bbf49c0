"""What a multimodal transformer knows of a modality: its way to tokens and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfast
from mmfast.checks import INDEX, check_choice, check_dtype, check_floating
from mmfast.models.noising import Noised, Noising
from mmfast.models.patches import check_sizes, grid_of, places
from mmfast.nn.dit_block import FinalLayer
from mmfast.nn.embedders import PatchEmbed, TimestepEmbedder
from mmfast.ops.patchify import unpatchify


class Modality(nn.Module):
    """One kind of data, as numbers that noise can be added to, and as tokens.

    Args:
        hidden_size: C, of the tokens.
        grid: how many tokens there are along each dimension.

    Attributes:
        length: of its tokens, L.
        shape: of its numbers, without the batch.
    """

    shape: tuple[int, ...]

    def __init__(self, hidden_size: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.length = math.prod(grid)
        self.pos_embed = places(grid, hidden_size)
        self.modality_embed = nn.Parameter(0.02 * torch.randn(hidden_size))
        self.t_embedder = TimestepEmbedder(hidden_size)

    def numbers(self, data: Tensor) -> Tensor:
        """``(B, *shape)``, of the mean 0 and the deviation 1, of checked data."""
        raise NotImplementedError

    def data(self, numbers: Tensor) -> Tensor:
        """The inverse of :meth:`numbers`, for numbers that were generated."""
        raise NotImplementedError

    def embed(self, numbers: Tensor) -> Tensor:
        """Tokens ``(B, L, C)`` with their places and their modality."""
        return self._project(numbers) + self.pos_embed + self.modality_embed

    def _project(self, numbers: Tensor) -> Tensor:
        raise NotImplementedError

    def head(self, tokens: Tensor, c: Tensor) -> Tensor:
        """The output, of tokens ``(B, L, C)`` behind the blocks and the condition ``(B, C)``."""
        raise NotImplementedError

    def prediction(
        self, output: Tensor, noisy: Tensor, timesteps: Tensor, diffusion: Noising
    ) -> Tensor:
        """What the sampler gets, ``(B, *shape)``."""
        raise NotImplementedError

    def losses(self, output: Tensor, data: Tensor, noised: Noised, there: Tensor | None) -> Tensor:
        """``(B,)``, float32.

        Args:
            output: of :meth:`head`.
            data: the clean data.
            noised: its :meth:`numbers`, noised.
            there: ``(B, L)``, bool: which tokens count; all where None.
        """
        raise NotImplementedError


class Patches(Modality):
    """Images, videos, signals, spectrograms, latents: arrays that are cut into patches.

    Args:
        hidden_size: C.
        size: of 1, 2 or 3 dimensions: an image's sides, a spectrogram's frames.
        channels: of the data, ``(B, channels, *size)``.
        patch_size: one number, or one for each dimension.
        mean, std: of the data, a number or one for each channel.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        size: Sequence[int],
        channels: int,
        patch_size: int | Sequence[int],
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        sizes, patch, grid = grid_of(size, patch_size)
        super().__init__(hidden_size, grid)
        self.size, self.patch_size, self.shape = sizes, patch, (channels, *sizes)
        self.proj = PatchEmbed(patch, channels, hidden_size)
        self.final_layer = FinalLayer(hidden_size, patch, channels)
        for name, value in (("mean", mean), ("std", std)):
            numbers = torch.as_tensor(value, dtype=torch.float32).view(-1, *[1] * len(sizes))
            self.register_buffer(name, numbers, persistent=False)

    mean: Tensor
    std: Tensor

    def numbers(self, data: Tensor) -> Tensor:
        check_floating("data", data)
        check_sizes("data", data, self.shape)
        return (data - self.mean.to(data.dtype)) / self.std.to(data.dtype)

    def data(self, numbers: Tensor) -> Tensor:
        return numbers * self.std + self.mean

    def _project(self, numbers: Tensor) -> Tensor:
        return self.proj(numbers)

    def head(self, tokens: Tensor, c: Tensor) -> Tensor:
        patches = self.final_layer(tokens, c)
        return unpatchify(patches, self.patch_size, self.size, order="channels_last")

    def prediction(
        self, output: Tensor, noisy: Tensor, timesteps: Tensor, diffusion: Noising
    ) -> Tensor:
        return output

    def losses(self, output: Tensor, data: Tensor, noised: Noised, there: Tensor | None) -> Tensor:
        squares = (output.float() - noised.target.float()).square()
        if there is None:
            error = squares.flatten(1).mean(1)
        else:
            of_tokens = mmfast.patchify(squares, self.patch_size).mean(2)  # [B, L]
            error = _mean(of_tokens, there)
        return error * noised.weight.float()


class Tokens(Modality):
    """Text, labels, codes: ids, each a fixed vector that noise is added to.

    The head gives a distribution over the ids and learns by cross-entropy; the sampler gets the
    vectors' mean under it, which minimises the square error too. Ids are read from the vectors that
    were generated by :func:`mmfast.nearest_code`.

    Args:
        hidden_size: C.
        codes: K, ids are from 0 to K - 1. Text whose length is to be generated is padded with an
            id of its own.
        length: L, how many ids there are; 1 for a label.
        dim: D, of the vectors.

    Source: Dieleman et al., "Continuous diffusion for categorical data" (2022), sec. 3.1.
    """

    codes: Tensor

    def __init__(self, hidden_size: int, *, codes: int, length: int = 1, dim: int = 16) -> None:
        super().__init__(hidden_size, (length,))
        self.shape = (length, dim)
        vectors = mmfast.randn((codes, dim), seed=0)
        self.register_buffer("codes", F.normalize(vectors, dim=1) * dim**0.5)
        self.proj = nn.Linear(dim, hidden_size)
        self.final_layer = FinalLayer(hidden_size, (1,), codes)

    def numbers(self, data: Tensor) -> Tensor:
        check_dtype("data", data, INDEX)
        check_sizes("data", data, (self.length,))
        return F.embedding(data, self.codes)

    def data(self, numbers: Tensor) -> Tensor:
        return mmfast.nearest_code(numbers.to(self.codes.dtype), self.codes)[0]

    def _project(self, numbers: Tensor) -> Tensor:
        return self.proj(numbers)

    def head(self, tokens: Tensor, c: Tensor) -> Tensor:
        return self.final_layer(tokens, c)  # [B, L, K]

    def prediction(
        self, output: Tensor, noisy: Tensor, timesteps: Tensor, diffusion: Noising
    ) -> Tensor:
        denoised = output.float().softmax(-1) @ self.codes.float()
        return diffusion.prediction_of(denoised, noisy, timesteps)

    def losses(self, output: Tensor, data: Tensor, noised: Noised, there: Tensor | None) -> Tensor:
        of_tokens = F.cross_entropy(output.float().mT, data.long(), reduction="none")
        return of_tokens.mean(1) if there is None else _mean(of_tokens, there)


KINDS = {"patches": Patches, "tokens": Tokens}


def built(name: str, description: Mapping[str, Any], hidden_size: int) -> Modality:
    """The modality that a mapping describes: its ``type`` and the type's arguments.

    Raises:
        ValueError: an unknown type.
    """
    options = dict(description)
    kind = str(options.pop("type", None))
    check_choice(f"type of modality {name!r}", kind, tuple(KINDS))
    return KINDS[kind](hidden_size, **options)


def _mean(of_tokens: Tensor, there: Tensor) -> Tensor:
    total = torch.where(there, of_tokens, 0).sum(1)
    return total / there.sum(1).clamp(min=1)
