"""VQ-VAE: signals, images and videos as grids of codes, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mmfast
import mmfast.nn
from mmfast.checks import INDEX, check_choice, check_dtype, check_floating
from mmfast.models.configured import Configured
from mmfast.models.convolutions import Layers, decoder, encoder
from mmfast.models.losses import weighted
from mmfast.models.shortcut import (
    Shortcut,
    linear_decoder,
    linear_encoder,
    set_principal_components,
)
from mmfast.nn.grouped_residual import GroupedResidual
from mmfast.results import exportable

_TO_OUTPUT = ("get_output_from_indices", "indices_to_codes")  # names that the quantisers use


@exportable
class VQVAEOutput(NamedTuple):
    """What :class:`VQVAE` returns.

    Attributes:
        reconstruction: the input's shape.
        indices: ``(B, *grid)``, behind it ``Q`` for quantisers of several stages, ``Q G`` if they
            are for groups of channels: those of a stage are side by side.
        loss: to be minimised: the two that follow, added.
        reconstruction_loss: between input and reconstruction.
        quantizer_loss: of the quantiser: commitment, entropy, whatever it has.
    """

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    quantizer_loss: Tensor


def _built(description: Mapping[str, Any]) -> nn.Module:
    """The quantiser of :mod:`mmfast.nn` that a mapping describes."""
    if not isinstance(description, Mapping):
        raise TypeError(
            "quantizer must be a module or a mapping with its type and arguments, got "
            f"{type(description).__name__}"
        )
    options = dict(description)
    made = getattr(mmfast.nn, str(options.pop("type", None)), None)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise ValueError(
            f"quantizer must have a type of mmfast.nn, such as 'VectorQuantize', got {description}"
        )
    return made(**options)


class VQVAE(Configured):
    """A convolutional encoder and decoder with a quantiser between them.

    Args:
        quantizer: of :mod:`mmfast.nn`, for vectors ``(B, L, latent_dim)``: a ``VectorQuantize``, a
            ``ResidualVQ``, an ``FSQ``, an ``LFQ``, ...; or its class and arguments, such as
            ``{"type": "VectorQuantize", "dim": 64, "codebook_size": 1024}``, with which the model
            can be saved by :func:`mmfast.models.save_model`.
        latent_dim: D, of the vectors.
        channels: of the data.
        spatial_dims: 1 for audio, 2 for images, 3 for videos.
        widths: channels of each level; each level after the first halves all sizes.
        num_blocks: residual blocks of each level.
        reconstruction: the loss, ``"l1"`` or ``"l2"``; or weights of those and of the further ones
            of :mod:`mmfast.models.losses`: ``{"l1": 1, "gradient": 0.5}``.
        patch_size: blocks of so many values in each dimension become channels first, and what the
            decoder makes becomes blocks. With 2 or 4, large images cost much less than with as many
            levels more.
        shortcut: a linear map of blocks to vectors is added to the encoder, and one back to the
            decoder. They can start as principal components, :meth:`initialize_shortcut`, so that
            only what is better than linear has to be learned.
        norm: ``"group"`` or None, of the convolutional blocks. Without, the result for a part of an
            image does not depend on what is far away, and with a shortcut it is as stable.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017); the residual
    blocks are those of Esser et al., "Taming Transformers" (2021).
    """

    def __init__(
        self,
        quantizer: nn.Module | Mapping[str, Any],
        latent_dim: int,
        *,
        channels: int = 3,
        spatial_dims: int = 2,
        widths: Sequence[int] = (64, 128, 256),
        num_blocks: int = 2,
        reconstruction: str | Mapping[str, float] = "l2",
        patch_size: int = 1,
        shortcut: bool = False,
        norm: str | None = "group",
    ) -> None:
        super().__init__()
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        if not widths or min(widths) < 1 or num_blocks < 1:
            raise ValueError(
                f"widths and num_blocks must be at least 1, got {tuple(widths)} and {num_blocks}"
            )
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {patch_size}")
        if norm is not None:
            check_choice("norm", norm, ("group",))
        self.channels, self.spatial_dims = channels, spatial_dims
        self.downsampling = patch_size * 2 ** (len(widths) - 1)
        shape = spatial_dims, channels, tuple(widths), num_blocks, latent_dim, patch_size, norm
        self.encoder: nn.Module = encoder(*shape)
        self.quantizer = quantizer if isinstance(quantizer, nn.Module) else _built(quantizer)
        self.decoder: nn.Module = decoder(*shape)
        if shortcut:
            blocks = spatial_dims, channels, latent_dim, self.downsampling
            self.encoder = Shortcut(self.encoder, linear_encoder(*blocks))
            self.decoder = Shortcut(self.decoder, linear_decoder(*blocks))
        self.reconstruction_loss = weighted(reconstruction)

    @property
    def gradient_checkpointing(self) -> bool:
        """Compute what is inside of the convolutional layers again in the backward, instead of
        keeping it; False at first."""
        return any(layers.gradient_checkpointing for layers in self._layers())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, again: bool) -> None:
        for layers in self._layers():
            layers.gradient_checkpointing = again

    def _layers(self) -> list[Layers]:
        return [module for module in self.modules() if isinstance(module, Layers)]

    @property
    def has_shortcut(self) -> bool:
        """Whether linear maps are beside encoder and decoder."""
        return isinstance(self.encoder, Shortcut)

    def latents(self, x: Tensor) -> Tensor:
        """Vectors ``(B, D, *grid)`` before quantisation.

        Args:
            x: ``(B, channels, *sizes)``, sizes multiples of ``downsampling``.

        Raises:
            TypeError: x is no tensor of floating numbers.
            ValueError: x has another shape.
        """
        check_floating("x", x)
        sizes = x.shape[2:]
        fits = x.dim() == 2 + self.spatial_dims and x.shape[1] == self.channels
        if not fits or any(size % self.downsampling or not size for size in sizes):
            dims = ", ".join(["B", str(self.channels), *["size"] * self.spatial_dims])
            raise ValueError(
                f"x must be ({dims}), sizes multiples of {self.downsampling}, got {tuple(x.shape)}"
            )
        return self.encoder(x)

    def quantize(self, latents: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised vectors ``(B, D, *grid)``, indices ``(B, *grid[, Q])`` and the loss ``()``.

        Args:
            latents: as :meth:`latents` makes them.
            options: of the quantiser's forward.
        """
        grid = latents.shape[2:]
        vectors = latents.flatten(2).transpose(1, 2)
        quantized, indices, *losses = self.quantizer(vectors, **options)
        if self._groups:  # (G, B, L, Q) becomes (B, L, Q G)
            indices = indices.movedim(0, -1).flatten(-2)
        loss = sum((loss.sum() for loss in losses), start=latents.new_zeros(()))
        back = quantized.mT.contiguous().unflatten(2, grid)
        return back, indices.unflatten(1, grid), loss

    @property
    def _groups(self) -> int:
        """Of a quantiser for groups of channels; else 0."""
        grouped = isinstance(self.quantizer, GroupedResidual | mmfast.nn.GroupedResidualVQ)
        return self.quantizer.groups if grouped else 0  # type: ignore[return-value]

    def encode(self, x: Tensor) -> Tensor:
        """Indices ``(B, *grid[, Q])`` of x ``(B, channels, *sizes)``."""
        return self.quantize(self.latents(x))[1]

    def decode(self, indices: Tensor) -> Tensor:
        """``(B, channels, *sizes)`` from the indices that :meth:`encode` gives.

        Raises:
            TypeError: the quantiser makes no vectors from indices, or they are no integers.
            ValueError: indices have too few dimensions, or one on the CPU is of no code.
        """
        check_dtype("indices", indices, INDEX)
        if indices.dim() <= self.spatial_dims:
            dims = ", ".join(["B", *["size"] * self.spatial_dims])
            raise ValueError(f"indices must be ({dims}[, Q]), got {tuple(indices.shape)}")
        grid = indices.shape[1 : 1 + self.spatial_dims]
        flat = indices.flatten(1, self.spatial_dims)
        if self._groups:
            flat = flat.unflatten(-1, (-1, self._groups)).movedim(-1, 0)
        for name in _TO_OUTPUT:
            make = getattr(self.quantizer, name, None)
            if make is not None:
                return self.decoder(make(flat).mT.contiguous().unflatten(2, grid))
        raise TypeError(f"a {type(self.quantizer).__name__} makes no vectors from indices")

    def forward(self, x: Tensor, **options: Any) -> VQVAEOutput:
        """Reconstruct x ``(B, channels, *sizes)``; see :class:`VQVAEOutput`.

        Args:
            x: ``(B, channels, *sizes)``.
            options: of the quantiser's forward.
        """
        quantized, indices, quantizer_loss = self.quantize(self.latents(x), **options)
        reconstruction = self.decoder(quantized)
        loss = self.reconstruction_loss(reconstruction, x)
        return VQVAEOutput(reconstruction, indices, loss + quantizer_loss, loss, quantizer_loss)

    def initialize_shortcut(self, batches: Iterable[Tensor]) -> None:
        """Make the shortcut the projection on principal components of blocks, and the way back.

        Args:
            batches: each ``(B, channels, *sizes)``; several processes' are taken together.

        Raises:
            TypeError: the model has no shortcut.
        """
        if not (isinstance(self.encoder, Shortcut) and isinstance(self.decoder, Shortcut)):
            raise TypeError("initialize_shortcut needs a VQVAE with shortcut=True")
        set_principal_components(self.encoder.linear, self.decoder.linear, batches)

    @torch.no_grad()
    def initialize_codebook(
        self, batches: Iterable[Tensor], *, seed: int = 0, iterations: int = 10
    ) -> None:
        """Make the codebook of k-means centres of what the encoder gives for ``batches``.

        For a ``VectorQuantize`` of one codebook. The statistics of its moving averages become
        those of the centres.

        Args:
            batches: each ``(B, channels, *sizes)``, together at least K vectors.
            seed: of k-means.
            iterations: of k-means.

        Raises:
            TypeError: the quantiser is another.
            ValueError: there are fewer vectors than codes.
        """
        quantizer: Any = self.quantizer
        if not isinstance(quantizer, mmfast.nn.VectorQuantize) or quantizer.codebook.dim() != 2:
            raise TypeError(
                "initialize_codebook needs a VectorQuantize with one codebook, got "
                f"{type(quantizer).__name__}"
            )
        vectors = torch.cat([self.latents(x).flatten(2).transpose(1, 2) for x in batches])
        x = quantizer.project_in(vectors).flatten(0, 1).float()
        num_codes = quantizer.codebook.shape[0]
        if len(x) < num_codes:
            raise ValueError(f"k-means of {num_codes} codes needs as many vectors, got {len(x)}")
        result = mmfast.kmeans(x, num_codes, iterations=iterations, seed=seed)
        counts, sums = mmfast.code_statistics(x, result.indices, num_codes)
        quantizer.codebook = result.codebook
        book = quantizer._codebook
        if hasattr(book, "embed_avg"):
            book.embed_avg[0].copy_(sums)
            book.cluster_size[0].copy_(counts)
        book.initted.fill_(True)


class Usage(NamedTuple):
    """How a batch uses the codes.

    Attributes:
        perplexity: exp of the entropy of the codes' shares: as many codes, equally often used,
            would say as much. ``()``.
        used: share of the codes that occur. ``()``.
    """

    perplexity: Tensor
    used: Tensor


def code_usage(indices: Tensor, num_codes: int) -> Usage:
    """How often each of K codes occurs among indices of any shape; nothing is read back.

    Raises:
        TypeError: indices are no integers.
        ValueError: ``num_codes`` is below 1.
    """
    ones = torch.ones(indices.numel(), 1, device=indices.device)
    counts, _ = mmfast.code_statistics(ones, indices.flatten(), num_codes)
    return usage_of_counts(counts)


def usage_of_counts(counts: Tensor) -> Usage:
    """The usage ``(...)`` of codes that occur so often, ``(..., K)``, floating."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return Usage(entropy.exp(), (counts > 0).to(counts.dtype).mean(-1))
