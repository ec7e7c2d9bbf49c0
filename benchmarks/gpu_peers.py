"""Peers that there are on a GPU alone, by op."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_attention_peers, loops, transformers
from benchmarks.peers import Peer, compiled, needs
from benchmarks.peers.nearest_code import addmm_argmin
from mmfast.regions import setting

FLASH_KMEANS, COMPILED_TF32 = "flash-kmeans", "torch.compile, TF32"
BF16_PRODUCT, TF32_PRODUCT = "torch.mm, bfloat16", "torch.mm, TF32"


def _product(precision: str, x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Any]:
    """x.c of all pairs."""
    if precision == "bfloat16":
        a, b = x.bfloat16(), codebook.bfloat16()
        return lambda: torch.mm(a, b.T)

    def run() -> Tensor:
        with _precision(precision):
            return torch.mm(x, codebook.T)

    return run


def _precision(name: str) -> contextlib.AbstractContextManager[None]:
    """Of float32's products inside the block."""
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, name)


def _compiled_tf32(x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Tensor]:
    call = compiled(addmm_argmin, dynamic=False)

    def run() -> Tensor:
        with _precision("high"):
            found: Tensor = call(x, codebook)
            return found

    return run


def _flash_lookup(x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Tensor]:
    """The assignment of flash-kmeans, which wants the squared norms of the vectors."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    vectors, codes = x[None], codebook[None]

    def run() -> Tensor:
        found: Tensor = euclid_assign_triton(vectors, codes, (vectors**2).sum(-1))
        return found[0].long()

    return run


def _flash_kmeans(x: Tensor, codebook: Tensor, iterations: int) -> Callable[[], Tensor]:
    """All iterations: centres never move by less than nothing."""
    from flash_kmeans import batch_kmeans_Euclid

    def run() -> Tensor:
        # It writes into the initial centres.
        made = batch_kmeans_Euclid(
            x[None],
            len(codebook),
            max_iters=iterations,
            tol=-1.0,
            init_centroids=codebook[None].clone(),
        )
        codes: Tensor = made[1][0]
        return codes

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
    "kmeans": {FLASH_KMEANS: Peer(_flash_kmeans, needs("flash_kmeans"), cut=False)},
    "nearest_code": {
        COMPILED_TF32: Peer(
            _compiled_tf32,
            unsupported=_float32,
            workspace=_bytes(4),
            note="compiling is not timed; not exact",
        ),
        FLASH_KMEANS: Peer(
            _flash_lookup,
            needs("flash_kmeans"),
            cut=False,
            note="TF32 where vectors are float32: not exact",
        ),
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
