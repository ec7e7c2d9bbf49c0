"""Peers of kmeans: scikit-learn, faiss, plain PyTorch, flash-kmeans. Each returns its codebook."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import Peer, needs
from benchmarks.peers.nearest_code import addmm_argmin


def PLAIN(x: Tensor, codebook: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations as users write them; torch.compile gets it too."""
    ones, codes = x.new_ones(x.shape[0]), codebook
    for _ in range(iterations):
        indices = addmm_argmin(x, codes)
        counts = torch.zeros_like(codes[:, 0]).index_add_(0, indices, ones)  # [K]
        sums = torch.zeros_like(codes).index_add_(0, indices, x)  # [K, D]
        codes = torch.where(counts[:, None] > 0, sums / counts[:, None], codes)
    return codes


def PLAIN_WORKSPACE(x: Tensor, codebook: Tensor, iterations: int) -> int:
    """Distances of all vectors from all codes."""
    return 4 * x.shape[0] * codebook.shape[0]


def _torch(x: Tensor, codebook: Tensor, iterations: int) -> Callable[[], Tensor]:
    return lambda: PLAIN(x, codebook, iterations)


def _sklearn(x: Tensor, codebook: Tensor, iterations: int) -> Callable[[], Tensor]:
    from sklearn.cluster import KMeans

    vectors, init = x.numpy(), codebook.numpy()

    def run() -> Tensor:
        model = KMeans(
            init.shape[0], init=init, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd"
        )
        return torch.from_numpy(model.fit(vectors).cluster_centers_)

    return run


def _faiss(x: Tensor, codebook: Tensor, iterations: int) -> Callable[[], Tensor]:
    import faiss

    vectors, init = x.numpy(), codebook.numpy()

    def run() -> Tensor:
        model = faiss.Kmeans(
            init.shape[1],
            init.shape[0],
            niter=iterations,
            max_points_per_centroid=vectors.shape[0],
            min_points_per_centroid=1,
        )
        model.train(vectors, init_centroids=init)
        return torch.from_numpy(model.centroids)

    return run


def _on_cpu(x: Tensor, codebook: Tensor, iterations: int) -> list[str]:
    return [] if x.device.type == "cpu" else ["takes arrays on the CPU"]


PEERS = {
    "plain torch": Peer(
        _torch,
        workspace=PLAIN_WORKSPACE,
        aside=True,
        note="addmm+argmin, index_add",
    ),
    "scikit-learn": Peer(
        _sklearn,
        needs("sklearn"),
        _on_cpu,
        note="assigns once more at the end than there are iterations",
    ),
    "faiss Kmeans": Peer(_faiss, needs("faiss"), _on_cpu, aside=True),
}
