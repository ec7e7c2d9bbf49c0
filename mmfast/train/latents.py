"""The latents of VQ-VAEs, on which a diffusion transformer works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast.models import VQVAE

LATENT = "latent"  # name of a batch's latents that were made before
AT_ONCE = 64  # samples that the encoder gets


def latent_shape(vqvae: VQVAE | None, data: Mapping[str, Any]) -> tuple[int, ...]:
    """``(C, *sizes)`` of what a DiT works on.

    Raises:
        ValueError: the VQ-VAE is for other data.
    """
    channels, *size = data["shape"]
    if vqvae is None:
        return (channels, *size)
    if len(size) != vqvae.spatial_dims or channels != vqvae.channels:
        raise ValueError(
            f"the VQ-VAE takes {vqvae.channels} channels of {vqvae.spatial_dims} dimensions, "
            f"the data has {channels} of {len(size)}"
        )
    if any(s % vqvae.downsampling for s in size):
        raise ValueError(
            f"the VQ-VAE takes sizes that are multiples of {vqvae.downsampling}, got {size}"
        )
    return (vqvae.config["latent_dim"], *(s // vqvae.downsampling for s in size))


@torch.no_grad()
def latents_of(vqvae: VQVAE, x: Tensor) -> Tensor:
    """The latents ``(B, D, *grid)`` of samples, before quantisation."""
    return torch.cat([vqvae.latents(part) for part in x.split(AT_ONCE)])


@torch.no_grad()
def decoded(vqvae: VQVAE, latents: Tensor) -> Tensor:
    """Samples of latents that were generated, which are quantised first."""
    return vqvae.decoder(vqvae.quantize(latents)[0])


class Latents:
    """VQ-VAEs in whose latents some modalities are.

    Args:
        vqvaes: by the modality's name; they are not trained any more.

    Attributes:
        parts: the same, by their names in a model's file.
    """

    def __init__(self, vqvaes: Mapping[str, VQVAE]) -> None:
        self.vqvaes = {name: v.eval().requires_grad_(False) for name, v in vqvaes.items()}
        self.parts = {f"vqvae_{name}": vqvae for name, vqvae in self.vqvaes.items()}

    @property
    def about(self) -> dict[str, Any] | None:
        """What a model's file says of them; None without any."""
        return {name: {"part": f"vqvae_{name}"} for name in self.vqvaes} or None

    def encoded(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Data by modality, with latents in the place of what has them."""
        return {
            name: latents_of(self.vqvaes[name], x) if name in self.vqvaes else x
            for name, x in data.items()
        }

    def decoded(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back, of what was generated."""
        return {
            name: decoded(self.vqvaes[name], x) if name in self.vqvaes else x
            for name, x in data.items()
        }


NO_LATENTS = Latents({})
