"""Peers of a sampling loop: the model as it is, in a loop of plain PyTorch."""

from __future__ import annotations

import functools

from benchmarks import loops, transformers
from benchmarks.peers import Peer

PEERS = {
    "plain torch": Peer(functools.partial(loops.plain, transformers.plain), cut=False),
}
