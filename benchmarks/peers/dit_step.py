"""Peers of a diffusion transformer's forward and backward: the model as it is."""

from __future__ import annotations

import functools

from benchmarks import transformers
from benchmarks.peers import Peer

PEERS = {
    "plain torch": Peer(
        functools.partial(transformers.step, transformers.plain),
        cut=False,
        note="facebookresearch/DiT's blocks, with torch's scaled_dot_product_attention",
    ),
}
