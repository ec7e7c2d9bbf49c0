"""Peers of pack_indices: bits as numbers, in torch and numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import Peer


def on_cpu(tensor: Tensor, *_: Any) -> list[str]:
    """Reasons against numpy."""
    return [] if tensor.device.type == "cpu" else ["numpy needs the CPU"]


def PLAIN(indices: Tensor, bits: int) -> Tensor:
    """What ``torch.compile`` gets."""
    place = torch.arange(bits, device=indices.device)
    stream = (indices[..., None] >> place & 1).flatten(-2).to(torch.uint8)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    eight = torch.arange(8, device=indices.device, dtype=torch.uint8)
    return (padded.unflatten(-1, (-1, 8)) << eight).sum(-1, dtype=torch.uint8)


def _eager(indices: Tensor, bits: int) -> Callable[[], Any]:
    return lambda: PLAIN(indices, bits)


def _packbits(indices: Tensor, bits: int) -> Callable[[], Any]:
    array = indices.numpy()

    def run() -> Tensor:
        stream = (array[..., None] >> np.arange(bits) & 1).astype(np.uint8)
        packed = np.packbits(stream.reshape(len(array), -1), axis=1, bitorder="little")
        return torch.from_numpy(packed)

    return run


PEERS = {
    "plain torch": Peer(_eager),
    "numpy packbits": Peer(_packbits, unsupported=on_cpu),
}
