"""What diffusion transformers over patches share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mmfast.models.configured import Configured
from mmfast.nn.dit_block import FinalLayer
from mmfast.nn.embedders import PatchEmbed, TimestepEmbedder, sincos_positions
from mmfast.ops.patchify import unpatchify


def places(sizes: Sequence[int], dim: int) -> nn.Parameter:
    """Sines and cosines of the places of a grid, ``(1, L, dim)``, which are not learned."""
    return nn.Parameter(sincos_positions(sizes, dim)[None], requires_grad=False)


def grid_of(
    input_size: int | Sequence[int], patch_size: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """Sizes, the patch's sizes, and how many patches there are along each dimension.

    Raises:
        ValueError: sizes are no multiples of patches, or below 1.
    """
    sizes = (input_size,) * 2 if isinstance(input_size, int) else tuple(input_size)
    patch = (patch_size,) * len(sizes) if isinstance(patch_size, int) else tuple(patch_size)
    if min(*sizes, *patch, 1) < 1:
        raise ValueError(f"input_size and patch_size must be at least 1, got {sizes} and {patch}")
    if len(patch) != len(sizes) or any(s % p for s, p in zip(sizes, patch, strict=True)):
        raise ValueError(
            f"input_size must be multiples of patch_size {patch}, one for each, got {sizes}"
        )
    return sizes, patch, [s // p for s, p in zip(sizes, patch, strict=True)]


def check_sizes(name: str, x: Tensor, expected: Sequence[int]) -> None:
    """``x`` is ``(B, *expected)``, else ValueError."""
    if x.shape[1:] != tuple(expected):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must be (B, {wanted}), got {tuple(x.shape)}")


class PatchTransformer(Configured):
    """Patches as tokens with places, timesteps, and the way back; subclasses add the blocks.

    Args:
        input_size, patch_size, in_channels, hidden_size, learn_sigma, downscale_freq_shift: of
            :class:`mmfast.models.DiT`.

    Attributes:
        gradient_checkpointing: compute what is inside of the blocks again in the backward, instead
            of keeping it.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        input_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_channels: int,
        hidden_size: int,
        learn_sigma: bool,
        *,
        downscale_freq_shift: float = 0.0,
    ) -> None:
        super().__init__()
        sizes, patch, grid = grid_of(input_size, patch_size)
        self.input_size, self.patch_size = sizes, patch
        self.in_channels, self.learn_sigma = in_channels, learn_sigma
        self.out_channels = in_channels * (1 + learn_sigma)
        self.grid, self.num_tokens = grid, math.prod(grid)
        self.x_embedder = PatchEmbed(patch, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, downscale_freq_shift=downscale_freq_shift)
        self.pos_embed = places(grid, hidden_size)
        self.final_layer = FinalLayer(hidden_size, patch, self.out_channels)

    def tokens(self, x: Tensor) -> Tensor:
        """``(B, L, C)`` of x ``(B, in_channels, *input_size)``.

        Raises:
            ValueError: x has another shape.
        """
        check_sizes("x", x, (self.in_channels, *self.input_size))
        return self.x_embedder(x) + self.pos_embed

    def untokened(self, tokens: Tensor) -> Tensor:
        """``(B, out_channels, *input_size)`` of what the final layer gives."""
        return unpatchify(tokens, self.patch_size, self.input_size, order="channels_last")

    def extra_repr(self) -> str:
        """The sizes."""
        sizes = f"input_size={self.input_size}, patch_size={self.patch_size}"
        return f"{sizes}, tokens={self.num_tokens}"


def xavier(*modules: nn.Module) -> None:
    """DiT's initial weights of all linear layers inside: Xavier's, and zero biases."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
