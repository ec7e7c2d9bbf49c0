"""Peers of unpack_indices: bits as numbers, in torch and numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import Peer
from benchmarks.peers.pack_indices import on_cpu


def PLAIN(packed: Tensor, bits: int, count: int) -> Tensor:
    """What ``torch.compile`` gets."""
    eight = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = (packed[..., None] >> eight & 1).flatten(-2)[..., : count * bits]
    place = torch.arange(bits, device=packed.device)
    return (stream.unflatten(-1, (count, bits)).long() << place).sum(-1)


def _eager(packed: Tensor, bits: int, count: int) -> Callable[[], Any]:
    return lambda: PLAIN(packed, bits, count)


def _unpackbits(packed: Tensor, bits: int, count: int) -> Callable[[], Any]:
    array = packed.numpy()

    def run() -> Tensor:
        stream = np.unpackbits(array, axis=1, count=count * bits, bitorder="little")
        digits = stream.reshape(len(array), count, bits).astype(np.int64)
        return torch.from_numpy((digits << np.arange(bits)).sum(-1))

    return run


PEERS = {
    "plain torch": Peer(_eager),
    "numpy unpackbits": Peer(_unpackbits, unsupported=on_cpu),
}
