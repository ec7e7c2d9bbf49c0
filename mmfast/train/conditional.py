"""Training of a diffusion transformer that is conditioned on a text or another modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.models import ConditionalDiT, Diffusion
from mmfast.train.about import modality_of
from mmfast.train.context import PART, Context
from mmfast.train.dit import DiTTask
from mmfast.train.grids import as_images, grid

CONTEXT, LENGTHS = "context", "lengths"  # names in a batch whose context was made before


class ConditionalTask(DiTTask):
    """The diffusion loss, with contexts that are dropped now and then for guidance.

    Args:
        model: to be trained.
        diffusion: what it learns.
        data: as of :class:`DiTTask`.
        context: what it is conditioned on.
        shown: samples with what they are conditioned on, by modality: pictures have these, and
            below each what the model draws for the same context. None are shown without.
        options: of :class:`DiTTask`.

    Raises:
        ValueError: the context, the VQ-VAE or the data does not fit the model.
    """

    model: ConditionalDiT

    def __init__(
        self,
        model: ConditionalDiT,
        diffusion: Diffusion,
        data: Mapping[str, Any],
        context: Context,
        *,
        shown: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, diffusion, data, **options)
        if context.size != model.context_size:
            raise ValueError(f"the model takes {model.context_size}, its context is {context.size}")
        self._context = context
        self._shown = shown
        if context.vqvae is not None:
            self.parts = {**self.parts, PART: context.vqvae.eval().requires_grad_(False)}

    @property
    def about(self) -> dict[str, Any]:  # type: ignore[override]
        """What the model's file says of itself."""
        return {**super().about, "context": self._context.describe()}

    def condition(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The context."""
        if CONTEXT in batch:
            return {name: batch[name] for name in (CONTEXT, LENGTHS) if name in batch}
        return self._context.of(batch)

    def encoded(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What training needs of a batch, in the latent space: it can be kept."""
        return {**super().encoded(batch), **self.condition(batch)}

    def sample(self, model: nn.Module, step: int) -> Tensor | None:
        """Samples that the model has not seen, and below each one drawn for its context."""
        if self._shown is None:
            return None
        device = next(model.parameters()).device
        shown = {name: value.to(device) for name, value in self._shown.items()}
        real = shown[modality_of(self._data)]
        with torch.no_grad():
            drawn = self._drawn(model, self.condition(shown), len(real))
        pictures = torch.cat([as_images(real).cpu(), as_images(drawn.clamp(-1, 1)).cpu()])
        return grid(pictures, columns=len(real))
