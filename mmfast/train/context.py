"""What a conditioned transformer is told: a text's tokens, or the codes of another modality."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.data import Reader, TextReader, reader_from
from mmfast.models import VQVAE
from mmfast.models.codes import by_stage, num_stages, stage_sizes
from mmfast.train.latents import AT_ONCE, latent_shape

PART = "context"  # of a model's file: the VQ-VAE


class Context(NamedTuple):
    """A modality, as a :class:`mmfast.models.ConditionalDiT` gets it.

    Attributes:
        reader: that prepares the files.
        vqvae: whose codes are taken; None of texts. Those of several stages follow each other at
            each place, each stage with ids of its own.
    """

    reader: Reader
    vqvae: VQVAE | None = None

    @property
    def modality(self) -> str:
        """By which a batch has it."""
        return self.reader.modality

    @property
    def num_codes(self) -> int:
        """How many ids there are."""
        if self.vqvae is None:
            assert isinstance(self.reader, TextReader)
            return self.reader.vocab_size
        return sum(stage_sizes(self.vqvae, num_stages(self.vqvae)))

    @property
    def size(self) -> tuple[int, ...]:
        """The longest, or the grid.

        Raises:
            ValueError: the VQ-VAE is not for such data.
        """
        if self.vqvae is None:
            (length,) = self.reader.shape
            assert length is not None
            return (length,)
        _, *grid = latent_shape(self.vqvae, {"shape": self.reader.shape})
        return (
            (math.prod(grid) * num_stages(self.vqvae),)
            if num_stages(self.vqvae) > 1
            else tuple(grid)
        )

    def of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Arguments of the model: ``context`` ``(B, *size)``, int64, and of texts ``lengths``.

        Args:
            batch: as a :class:`mmfast.data.Dataset` has it.
        """
        if self.vqvae is None:
            lengths = batch[f"{self.modality}_length"]
            return {"context": batch[self.modality], "lengths": lengths}
        with torch.no_grad():
            parts = batch[self.modality].split(AT_ONCE)
            indices = torch.cat([self.vqvae.encode(part) for part in parts])
        grids = by_stage(self.vqvae, indices)  # [Q, B, *grid]
        if len(grids) == 1:
            return {"context": grids[0].long()}
        sizes = stage_sizes(self.vqvae, len(grids))
        starts = itertools.accumulate(sizes[:-1], initial=0)
        ids = [grid.long() + start for grid, start in zip(grids, starts, strict=True)]
        return {"context": torch.stack(ids, -1).flatten(1)}

    def describe(self) -> dict[str, Any]:
        """For :func:`context_from`, of JSON's kinds."""
        part = None if self.vqvae is None else PART
        return {"modality": self.modality, "reader": self.reader.describe(), "part": part}


def context_from(description: Mapping[str, Any], vqvae: VQVAE | None) -> Context:
    """The context that :meth:`Context.describe` described.

    Args:
        description: of it.
        vqvae: the model's part that it names.

    Raises:
        ValueError: it is no such description.
    """
    return Context(reader_from(description.get("reader") or {}), vqvae)
