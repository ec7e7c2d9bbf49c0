"""The latents of a VQ-VAE, on which a diffusion transformer works."""

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
