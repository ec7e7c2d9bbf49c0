"""Peers of lookup_free_quantize: a table of all vectors and codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, needs

_MOST_BYTES = 2 << 30  # of the tables


def plain(
    z: Tensor, scale: float, spherical: bool, inv_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op's outputs, straight through, of one codebook and one group."""
    bits = z.shape[1]
    place = torch.arange(bits - 1, -1, -1, device=z.device)
    numbers = torch.arange(1 << bits, device=z.device)
    codes = (numbers[:, None] >> place & 1).to(z.dtype) * (2 * scale) - scale
    x = z
    if spherical:
        x = torch.nn.functional.normalize(z, dim=-1) * scale
        codes = torch.nn.functional.normalize(codes, dim=-1) * scale
    indices = ((x > 0).long() << place).sum(1)
    chosen = codes[indices]
    log = (2 * inv_temperature * x @ codes.T).log_softmax(1)
    probability = log.exp()
    entropy = -(probability * log).sum(1).mean()
    loss = torch.nn.functional.mse_loss(x, chosen)
    means = probability.mean(0)[None, None]
    return x + (chosen - x).detach(), indices[:, None], loss, entropy, means


def PLAIN(
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """What ``torch.compile`` gets."""
    return plain(z, scale, spherical, inv_temperature)


def PLAIN_WORKSPACE(z: Tensor, *_: Any) -> int:
    """Bytes of its tables."""
    return 3 * z.element_size() * z.shape[0] << z.shape[1]


def unsupported(
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> list[str]:
    """Reasons against arguments that the peers are not written for."""
    if num_codebooks > 1 or group_bits != z.shape[1] or mask is not None:
        return ["written for one codebook, without groups and mask"]
    needed = PLAIN_WORKSPACE(z)
    return [f"not run where it needs {needed >> 30} GiB"] if needed > _MOST_BYTES else []


def library(z: Tensor, scale: float, spherical: bool) -> Any:
    """The library's module in training, without weights for its losses."""
    from vector_quantize_pytorch import LFQ

    quantiser = LFQ(
        dim=z.shape[1], codebook_scale=scale, spherical=spherical, commitment_loss_weight=1.0
    )
    return quantiser.to(z.device)


def _eager(
    z: Tensor, _: int, scale: float, spherical: bool, inv_temperature: float, *__: Any
) -> Callable[[], Any]:
    return lambda: plain(z, scale, spherical, inv_temperature)


def _library(
    z: Tensor, _: int, scale: float, spherical: bool, inv_temperature: float, *__: Any
) -> Callable[[], Any]:
    quantiser = library(z, scale, spherical)

    @torch.no_grad()
    def run() -> Tensor:
        return quantiser(z[None], inv_temperature).quantized[0]

    return run


PEERS = {
    "plain torch": Peer(_eager, unsupported=unsupported, workspace=PLAIN_WORKSPACE),
    "vector-quantize-pytorch": Peer(
        _library,
        needs("vector_quantize_pytorch"),
        unsupported=unsupported,
        workspace=PLAIN_WORKSPACE,
    ),
}
