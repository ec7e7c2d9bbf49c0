"""Lloyd's k-means on nearest_code and code_statistics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KMeansResult(NamedTuple):
    """What :func:`kmeans` returns."""

    codebook: Tensor
    indices: Tensor
    inertia: Tensor
    iterations: int


def kmeans(x: Tensor, num_codes: int, *, iterations: int = 25) -> KMeansResult:
    """Under construction."""
    raise NotImplementedError
