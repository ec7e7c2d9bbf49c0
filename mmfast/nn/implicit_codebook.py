"""A codebook that depends on what is already quantised: a network turns each code into another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.nn.similarity import slices

_WORKSPACE = 1 << 20  # numbers in a piece's largest intermediate


class ImplicitCodebook(nn.Module):
    """The network that makes the codes of a stage from a codebook and the sum of the earlier codes.

    Args:
        dim: D, of the codes.
        dim_hidden: of the residual blocks; D if None.
        depth: number of residual blocks.
        l2norm_output: give the codes unit norm.

    Source: Huijben et al., "Residual Quantization with Implicit Neural Codebooks" (2024), sec. 3.2.
    """

    def __init__(
        self,
        dim: int,
        dim_hidden: int | None = None,
        depth: int = 4,
        l2norm_output: bool = False,
    ) -> None:
        super().__init__()
        self.dim_hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim, self.dim_hidden), nn.SiLU(), nn.Linear(self.dim_hidden, dim)
            )
            for _ in range(depth)
        )
        self.l2norm_output = l2norm_output

    def forward(self, codes: Tensor, *, condition: Tensor) -> Tensor:
        """The codes ``(..., D)`` from ``codes`` (..., D) and ``condition`` (..., D), which
        broadcast."""
        dim, dtype = codes.shape[-1], torch.promote_types(codes.dtype, condition.dtype)
        codes, condition = codes.to(dtype), condition.to(dtype)
        of_condition, of_codes = self.proj_in.weight.split(dim, 1)
        # As a product with both side by side, which would have to be made for all pairs.
        hidden = nn.functional.linear(condition, of_condition, self.proj_in.bias)
        hidden = hidden + nn.functional.linear(codes, of_codes)
        for layer in self.layers:
            hidden = layer(hidden) + hidden
        return nn.functional.normalize(hidden, dim=-1) if self.l2norm_output else hidden

    @torch.no_grad()
    def nearest(self, codes: Tensor, x: Tensor, condition: Tensor) -> Tensor:
        """Indices ``(N,)`` of the codes whose transforms are nearest to ``x`` (N, D).

        All N x K transforms are computed, in pieces of bounded size.

        Args:
            codes: ``(K, D)``. condition: ``(N, D)``.
        """
        step = max(1, _WORKSPACE // (len(codes) * max(codes.shape[1], self.dim_hidden)))
        nearest = [torch.zeros(0, dtype=torch.int64, device=x.device)]
        for rows in slices(x.shape[0], step):
            made = self(codes, condition=condition[rows, None])  # [n, K, D]
            square = (x[rows, None].double() - made.double()).square().sum(2)
            nearest.append(square.argmin(1))
        return torch.cat(nearest)


class Chosen:
    """The codebook that a quantiser sees for a stage: of each vector, the one code nearest to it.

    Finding that code needs no gradient, so that the network is differentiated for one code of
    each vector and not for K.
    """

    indices: Tensor

    def __init__(self, network: ImplicitCodebook, x: Tensor, condition: Tensor) -> None:
        """x: vectors to quantise, ``(B, L, D)``. condition: ``(B, L, D)``."""
        self._network, self._x, self._condition = network, x, condition

    def __call__(self, embed: Tensor) -> Tensor:
        """``(1, B, L, 1, D)`` of a codebook (1, K, D); sets :attr:`indices` (B, L)."""
        x, condition = self._x.flatten(0, 1), self._condition.flatten(0, 1)
        nearest = self._network.nearest(embed[0], x, condition)
        self.indices = nearest.view(self._x.shape[:2])
        codes = nn.functional.embedding(self.indices, embed[0])
        return self._network(codes, condition=self._condition)[None, :, :, None]
