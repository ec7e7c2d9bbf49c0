"""Peers of a forward and its backward: PyTorch's choice among its own."""

from __future__ import annotations

import functools

from torch.nn import functional

from benchmarks import gpu_attention
from benchmarks.peers import Peer

PEERS = {
    "SDPA": Peer(
        functools.partial(gpu_attention.step, functional.scaled_dot_product_attention), cut=False
    ),
}
