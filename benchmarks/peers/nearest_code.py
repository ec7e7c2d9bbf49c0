"""Peers of nearest_code: plain PyTorch, faiss, vector-quantize-pytorch, KeOps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, needs

# KeOps unrolls the loop over D into its source: at D = 256 compiling takes half a minute, and the
# code runs at a tenth of its speed at D = 64.
_KEOPS_DIMENSIONS = 64


def first_rows(arguments: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same problem for the first ``rows`` vectors."""
    x, codebook, metric = arguments
    return x[:rows], codebook, metric


def first_results(results: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """The results of the first ``rows`` vectors."""
    return tuple(t[:rows] for t in results)


def addmm_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices (N,) by the expanded square |c|^2 - 2 x.c, as most quantisers write it."""
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def cdist_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices (N,) by ``torch.cdist``."""
    return torch.cdist(x, codebook).argmin(1)


def PLAIN(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """What ``torch.compile`` gets; the reference's own shapes depend on its data."""
    return addmm_argmin(x, codebook)


def _plain(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Callable[[], Tensor]]:
    def make(x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Tensor]:
        return lambda: function(x, codebook)

    return make


def _faiss(x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Tensor]:
    import faiss

    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    vectors = x.numpy()
    return lambda: torch.from_numpy(index.search(vectors, 1)[1][:, 0])


def _vector_quantize(x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Tensor]:
    from vector_quantize_pytorch import VectorQuantize

    quantiser = VectorQuantize(dim=codebook.shape[1], codebook_size=codebook.shape[0])
    quantiser = quantiser.eval().to(x.device, x.dtype)
    quantiser.codebook = codebook
    batch = x[None]

    @torch.no_grad()
    def run() -> Tensor:
        return quantiser(batch)[1][0]

    return run


def _keops(x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Tensor]:
    from pykeops.torch import LazyTensor

    vectors, codes = LazyTensor(x[:, None]), LazyTensor(codebook[None])
    return lambda: vectors.sqdist(codes).argmin(dim=1)[:, 0]


def _keops_unsupported(x: Tensor, codebook: Tensor, metric: str) -> list[str]:
    if x.shape[1] > _KEOPS_DIMENSIONS:
        return [f"not run above D = {_KEOPS_DIMENSIONS}: it unrolls D, and compiles for too long"]
    return []


def _cpu_float32(x: Tensor, codebook: Tensor, metric: str) -> list[str]:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return ["faiss-cpu takes float32 on the CPU"]
    return []


def _product(x: Tensor, codebook: Tensor, metric: str) -> int:
    return 4 * x.shape[0] * codebook.shape[0]


PLAIN_WORKSPACE = _product

PEERS = {
    "torch.mm": Peer(
        lambda x, codebook, metric: lambda: torch.mm(x, codebook.T),
        workspace=_product,
        cut=False,
        floor=True,
        note="only the products x.c, the supposed floor; returns no indices",
    ),
    "addmm+argmin": Peer(_plain(addmm_argmin), workspace=_product),
    "cdist+argmin": Peer(_plain(cdist_argmin), workspace=_product, aside=True, rarely=True),
    "faiss flat": Peer(
        _faiss,
        needs("faiss"),
        _cpu_float32,
        cut=False,
        note="IndexFlatL2; adding the codebook to the index is not timed",
    ),
    "vector-quantize-pytorch": Peer(
        _vector_quantize,
        needs("vector_quantize_pytorch"),
        # Distances, their negation and an int64 one-hot, all N x K.
        workspace=lambda *arguments: 5 * _product(*arguments),
        aside=True,
        note="VectorQuantize in eval mode, without gradients",
    ),
    "KeOps": Peer(
        _keops,
        needs("pykeops"),
        _keops_unsupported,
        aside=True,
        rarely=True,
        note="argKmin(1); its compilation at first use is not timed",
    ),
}
