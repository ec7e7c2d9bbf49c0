"""What diffusion transformers embed: patches, places, timesteps and labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.checks import check_codes, check_least
from mmfast.ops.patchify import patchify
from mmfast.ops.timestep_embedding import timestep_embedding


class PatchEmbed(nn.Module):
    """Patches as tokens; ``proj`` has the weights of a convolution, as in timm's ``PatchEmbed``.

    Args:
        patch_size: of each spatial dimension; one number is for ``dims`` of them.
        in_channels: of the images.
        hidden_size: C, of the tokens.
        dims: 1, 2 or 3.
        bias: whether the layer has one.
    """

    def __init__(
        self,
        patch_size: int | Sequence[int],
        in_channels: int,
        hidden_size: int,
        *,
        dims: int = 2,
        bias: bool = True,
    ) -> None:
        super().__init__()
        patch = (patch_size,) * dims if isinstance(patch_size, int) else tuple(patch_size)
        if not 1 <= len(patch) <= 3:
            raise ValueError(f"patch_size must have 1, 2 or 3 dimensions, got {patch}")
        self.patch_size = patch
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(patch) - 1]
        self.proj = convolution(in_channels, hidden_size, patch, patch, bias=bias)  # type: ignore[arg-type]
        # As a linear layer, which it is.
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, ...)`` to ``(B, L, C)``."""
        tokens = patchify(x, self.patch_size)
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Sinusoids of a timestep through an MLP, ``mlp.0`` and ``mlp.2``, as in DiT.

    Args:
        hidden_size: C.
        frequency_embedding_size: of the sinusoids.
        downscale_freq_shift: of :func:`mmfast.timestep_embedding`; 1 in diffusers' DiT.
    """

    def __init__(
        self,
        hidden_size: int,
        frequency_embedding_size: int = 256,
        *,
        downscale_freq_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.downscale_freq_shift = downscale_freq_shift
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, timesteps: Tensor) -> Tensor:
        """``(B,)`` to ``(B, C)``."""
        sinusoids = timestep_embedding(
            timesteps,
            self.frequency_embedding_size,
            downscale_freq_shift=self.downscale_freq_shift,
            dtype=self.mlp[0].weight.dtype,  # type: ignore[arg-type]
        )
        return self.mlp(sinusoids)


class LabelEmbedder(nn.Module):
    """Class labels, some of which are dropped in training for classifier-free guidance, as in DiT.

    Args:
        num_classes: labels are from 0 to ``num_classes`` - 1; with dropout, ``num_classes`` itself
            is the label of no class.
        hidden_size: C.
        dropout_prob: of a label in training.

    Raises:
        ValueError: there are no classes, or the probability is not from 0 to 1.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        check_least(1, num_classes=num_classes)
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"dropout_prob must be from 0 to 1, got {dropout_prob}")
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """``(B,)`` to ``(B, C)``.

        Args:
            labels: int64 or int32.
            drop: ``(B,)``, bool: which labels to drop. Drawn in training by default.

        Raises:
            TypeError: labels are no integers.
            ValueError: a label on the CPU is none, or they are to be dropped without dropout.
        """
        check_codes("labels", labels, self.embedding_table.num_embeddings)
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        if drop is not None:
            if self.dropout_prob <= 0:
                raise ValueError("labels can only be dropped with dropout_prob above 0")
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


def sincos_positions(sizes: Sequence[int], dim: int) -> Tensor:
    """Sines and cosines of the places of a grid, as DiT and MAE have them.

    The last axis comes first, and of each axis the sines. Computed in float64.

    Args:
        sizes: of the grid, 1 to 3 of them.
        dim: C, even for each axis; what does not divide evenly goes to the first axis.

    Returns:
        ``(prod(sizes), C)``, float32.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022).
    """
    axes = len(sizes)
    each = dim // (2 * axes) * 2
    widths = [dim - (axes - 1) * each] + [each] * (axes - 1)
    if dim % 2 or each == 0:
        raise ValueError(f"dim must be even, and at least 2 for each of {axes} axes, got {dim}")
    places = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in sizes), indexing="ij")
    parts = []
    for place, width in list(zip(places, widths, strict=True))[::-1]:
        exponents = torch.arange(width // 2, dtype=torch.float64) / (width / 2)
        angles = place.reshape(-1, 1) * 10000.0**-exponents  # [L, width / 2]
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, 1).float()
