"""Peers that there are on a GPU alone, by op."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_attention_peers, loops, transformers
from benchmarks.peers import Peer

BF16_PRODUCT, TF32_PRODUCT = "torch.mm, bfloat16", "torch.mm, TF32"


def _product(precision: str, x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Any]:
    """x.c of all pairs."""
    if precision == "bfloat16":
        a, b = x.bfloat16(), codebook.bfloat16()
        return lambda: torch.mm(a, b.T)

    def run() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return torch.mm(x, codebook.T)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def _by_blocks(make: Callable[..., Callable[[], Any]]) -> Mapping[str, Peer]:
    """A transformer that is compiled."""
    peer = Peer(
        functools.partial(make, transformers.compiled),
        cut=False,
        note="the blocks, one after the other; compiling is not timed",
    )
    return {"torch.compile": peer}


def _bytes(size: int) -> Callable[..., int]:
    return lambda x, codebook, metric: size * math.prod((x.shape[0], codebook.shape[0]))


def _float32(x: Tensor, codebook: Tensor, metric: str) -> list[str]:
    return [] if x.dtype == torch.float32 else ["TF32 takes float32"]


_PEERS: Mapping[str, Mapping[str, Peer]] = {
    **gpu_attention_peers.PEERS,
    "dit_eval": _by_blocks(transformers.evaluation),
    "dit_step": _by_blocks(transformers.step),
    loops.OP: {
        "torch.compile": Peer(
            functools.partial(loops.plain, transformers.compiled),
            unsupported=loops.nothing_to_compile,
            cut=False,
            note="the blocks; the loop and its arithmetic are plain PyTorch",
        ),
    },
    "nearest_code": {
        BF16_PRODUCT: Peer(
            functools.partial(_product, "bfloat16"),
            workspace=_bytes(2),
            cut=False,
            floor=True,
            note="only the products x.c of rounded numbers; returns no indices",
        ),
        TF32_PRODUCT: Peer(
            functools.partial(_product, "high"),
            unsupported=_float32,
            workspace=_bytes(4),
            cut=False,
            floor=True,
            note="only the products x.c, likewise",
        ),
    },
}


def of(op: str) -> Mapping[str, Peer]:
    """The peers of ``op``; none where there are but those of ``benchmarks.peers``."""
    return _PEERS.get(op, {})
