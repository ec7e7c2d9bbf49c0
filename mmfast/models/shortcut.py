"""A linear map beside a network: what is linear need not be learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.models.convolutions import Fold, Unfold, convolution
from mmfast.nn.ranks import add_up, several


class Shortcut(nn.Module):
    """The sum of a network and a linear map; the network's last convolution starts at zero.

    Args:
        network: an encoder or decoder of :mod:`mmfast.models.convolutions`.
        linear: from the network's inputs to its outputs.
    """

    def __init__(self, network: nn.Sequential, linear: nn.Sequential) -> None:
        super().__init__()
        self.network, self.linear = network, linear
        last = [m for m in network.modules() if hasattr(m, "kernel_size")][-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.network(x)


def linear_encoder(dims: int, channels: int, latent_dim: int, patch: int) -> nn.Sequential:
    """Each block ``patch`` wide as a vector: ``(B, C, *sizes)`` to ``(B, D, *sizes / patch)``."""
    return nn.Sequential(
        Fold(dims, patch), convolution(dims, channels * patch**dims, latent_dim, 1)
    )


def linear_decoder(dims: int, channels: int, latent_dim: int, patch: int) -> nn.Sequential:
    """The way back of :func:`linear_encoder`."""
    return nn.Sequential(
        convolution(dims, latent_dim, channels * patch**dims, 1), Unfold(dims, patch)
    )


@torch.no_grad()
def set_principal_components(
    encoder: nn.Sequential, decoder: nn.Sequential, batches: Iterable[Tensor]
) -> None:
    """Make the linear maps those of the principal components of blocks, over all processes.

    Args:
        encoder, decoder: of :func:`linear_encoder` and :func:`linear_decoder`.
        batches: of data, ``(B, C, *sizes)``.
    """
    fold = encoder[0]
    to_latent: Any = encoder[1]
    from_latent: Any = decoder[0]
    width = to_latent.weight.shape[1]
    # Of vectors with a one behind them: their number, sum and second moments, in one matrix.
    moments = to_latent.weight.new_zeros((width + 1, width + 1), dtype=torch.float64)
    for x in batches:
        blocks = fold(x).flatten(2).transpose(1, 2).flatten(0, 1).double()
        extended = torch.cat([blocks, torch.ones_like(blocks[:, :1])], 1)
        moments += extended.T @ extended
    moments = add_up(moments, several(), "principal components")
    moments /= moments[-1, -1].clone()
    mean = moments[-1, :-1]
    _, vectors = torch.linalg.eigh(moments[:-1, :-1] - torch.outer(mean, mean))
    vectors = vectors.flip(1)[:, : to_latent.weight.shape[0]]  # the largest variances first
    # Which of the two directions is arbitrary: the largest entry becomes positive.
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    for layer in (to_latent, from_latent):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    count = vectors.shape[1]
    to_latent.weight.flatten(1)[:count] = vectors.T.to(to_latent.weight.dtype)
    to_latent.bias[:count] = (-mean @ vectors).to(to_latent.bias.dtype)
    from_latent.weight.flatten(1)[:, :count] = vectors.to(from_latent.weight.dtype)
    from_latent.bias.copy_(mean)
