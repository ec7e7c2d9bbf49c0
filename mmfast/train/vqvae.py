"""Training of a VQ-VAE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mmfast
from mmfast.models import VQVAE, codebook_sizes, usage_of_counts
from mmfast.nn import VectorQuantize
from mmfast.nn.codebook import Codebook
from mmfast.nn.ranks import add_up, several
from mmfast.train.about import modality_of
from mmfast.train.grids import as_images, grid
from mmfast.train.task import Step, Task

_VECTORS_PER_CODE = 32  # from which k-means makes a codebook, as far as there are so many
_SAMPLES_FOR_SHORTCUT = 1024  # whose blocks give the principal components
_AT_ONCE = 64  # samples that the encoder gets while it prepares the codebook


class VQVAETask(Task):
    """Reconstruction and the quantiser's losses, with perplexity and usage of the codes.

    A quantiser that was made with ``kmeans_init`` starts from k-means on what the encoder makes of
    the first samples, of all processes. So does a shortcut from their principal components.

    Args:
        model: to be trained.
        data: what the samples are, of one modality, by which a batch has them: see
            :func:`mmfast.train.about_data`.
        pictures: samples ``(N, C, ...)`` whose reconstructions are shown; none without.
        codebook_start: so many steps are trained without a quantiser, so that k-means starts from
            an encoder that has learnt something.
        decoder_only: the encoder stays as it is, the codebook as k-means makes it of its outputs,
            and only the decoder learns.

    Raises:
        ValueError: ``codebook_start`` is below 0, or not 0 with ``decoder_only``.
    """

    def __init__(
        self,
        model: VQVAE,
        data: Mapping[str, Any],
        *,
        pictures: Tensor | None = None,
        codebook_start: int = 0,
        decoder_only: bool = False,
    ) -> None:
        if codebook_start < 0 or (codebook_start and decoder_only):
            wanted = "0 with decoder_only" if decoder_only else "at least 0"
            raise ValueError(f"codebook_start must be {wanted}, got {codebook_start}")
        self._decoder_only = decoder_only
        if decoder_only:
            for frozen in (model.encoder, model.quantizer):
                frozen.requires_grad_(False)
        self.model: VQVAE = model
        self._data = dict(data)
        self.about = {"data": self._data, "objective": None, "latents": None}
        self._modality = modality_of(data)
        self._pictures = pictures
        self._start = codebook_start
        self._num_codes = max(codebook_sizes(model.quantizer))
        self._counts: Tensor | None = None  # [Q, K]

    def wants(self, step: int) -> int:
        """Samples for the shortcut and for k-means."""
        shortcut = _SAMPLES_FOR_SHORTCUT if step == 0 and self.model.has_shortcut else 0
        if not self._needs_codebook(step):
            return shortcut
        sizes = self._data["shape"][1:]
        vectors = math.prod(size // self.model.downsampling for size in sizes)
        return max(shortcut, math.ceil(_VECTORS_PER_CODE * self._num_codes / vectors))

    def _needs_codebook(self, step: int) -> bool:
        books = [m for m in self.model.modules() if isinstance(m, Codebook)]
        return step == self._start and not all(bool(book.initted) for book in books)

    def begin(self, batch: Mapping[str, Tensor], step: int) -> None:
        """Principal components for the shortcut, and k-means on the encoder's outputs."""
        parts = batch[self._modality].split(_AT_ONCE)
        if step == 0 and self.model.has_shortcut:
            self.model.initialize_shortcut(parts)
        if not self._needs_codebook(step):
            return
        latents = torch.cat([self.model.latents(x).flatten(2).transpose(1, 2) for x in parts])
        # The first forward of each codebook makes it, from the vectors of all processes.
        dropping: list[Any] = [
            m for m in self.model.quantizer.modules() if getattr(m, "quantize_dropout", False)
        ]
        for module in dropping:  # stages that are left out would not start
            module.quantize_dropout = False
        self.model.quantizer(latents.flatten(0, 1)[None])
        for module in dropping:
            module.quantize_dropout = True

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """``loss``, ``reconstruction`` and ``quantizer``."""
        x = batch[self._modality]
        if self._decoder_only:
            self.model.quantizer.eval()
            with torch.no_grad():
                quantized, indices, _ = self.model.quantize(self.model.latents(x))
            self._count(indices)
            error = self.model.reconstruction_loss(self.model.decoder(quantized), x)
            return {"loss": error, "reconstruction": error}
        if step.number < self._start:
            reconstruction = self.model.decoder(self.model.latents(x))
            error = self.model.reconstruction_loss(reconstruction, x)
            # What the quantiser trains is a part of the graph for DistributedDataParallel.
            unused = sum(p.sum() for p in self.model.quantizer.parameters())
            return {"loss": error + 0 * unused, "reconstruction": error}
        options = {}
        if isinstance(self.model.quantizer, VectorQuantize):
            options["accum_ema_update"] = not step.last
        output = self.model(x, **options)
        self._count(output.indices)
        return {
            "loss": output.loss,
            "reconstruction": output.reconstruction_loss,
            "quantizer": output.quantizer_loss,
        }

    def _count(self, indices: Tensor) -> None:
        """Add the codes of a batch, ``(B, *grid[, Q])``."""
        stages = indices.dim() - 1 - self.model.spatial_dims
        rows = indices.flatten(0, -2).T if stages else indices.flatten()[None]  # [Q, N]
        ones = torch.ones(*rows.shape, 1, device=indices.device)
        counts, _ = mmfast.code_statistics(ones, rows.contiguous(), self._num_codes)
        self._counts = counts if self._counts is None else self._counts + counts

    def metrics(self) -> dict[str, float]:
        """Perplexity, and the share of codes in use, since the last row: means over the stages."""
        if self._counts is None:
            return {}
        counts = add_up(self._counts, several(), "counting codes")
        usage = usage_of_counts(counts)
        self._counts = None
        return {"perplexity": usage.perplexity.mean().item(), "used": usage.used.mean().item()}

    def sample(self, model: nn.Module, step: int) -> Tensor | None:
        """Samples, and below each its reconstruction."""
        if self._pictures is None:
            return None
        assert isinstance(model, VQVAE)
        x = self._pictures.to(next(model.parameters()).device)
        quantised = step > self._start
        made = model(x).reconstruction if quantised else model.decoder(model.latents(x))
        return grid(torch.cat([as_images(x), as_images(made)]), columns=len(x))
