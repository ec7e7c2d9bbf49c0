"""Peers of code_statistics: the ways of writing segment sums in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import Peer

Result = tuple[Tensor, Tensor]

_MOST_BYTES = 2 << 30  # a call takes seconds by then


def index_add(x: Tensor, indices: Tensor, num_codes: int) -> Result:
    """counts (K,) and sums (K, D) by ``index_add``."""
    counts = x.new_zeros(num_codes).index_add(0, indices, x.new_ones(x.shape[0]))
    return counts, x.new_zeros(num_codes, x.shape[1]).index_add(0, indices, x)


def scatter_reduce(x: Tensor, indices: Tensor, num_codes: int) -> Result:
    """The same by ``scatter_reduce``, whose index has the shape of ``x``."""
    counts = torch.bincount(indices, minlength=num_codes).to(x.dtype)
    sums = x.new_zeros(num_codes, x.shape[1])
    return counts, sums.scatter_reduce(0, indices[:, None].expand_as(x), x, "sum")


def one_hot(x: Tensor, indices: Tensor, num_codes: int) -> Result:
    """The same by a matrix product with the one-hot assignment, as quantisers with EMA do."""
    assignment = functional.one_hot(indices, num_codes).to(x.dtype)  # [N, K]
    return assignment.sum(0), assignment.T @ x


def PLAIN(x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None) -> Result:
    """What ``torch.compile`` gets."""
    return index_add(x, indices, num_codes)


def _fits(bytes_per_pair: int) -> Callable[..., list[str]]:
    def unsupported(x: Tensor, indices: Tensor, num_codes: int, weights: Any) -> list[str]:
        if weights is not None:
            return ["written for vectors without weights"]
        needed = bytes_per_pair * x.shape[0] * num_codes
        return [f"not run where it needs {needed >> 30} GiB"] if needed > _MOST_BYTES else []

    return unsupported


def _peer(function: Callable[[Tensor, Tensor, int], Result], bytes_per_pair: int = 0) -> Peer:
    return Peer(
        lambda x, indices, num_codes, weights: lambda: function(x, indices, num_codes),
        unsupported=_fits(bytes_per_pair),
        workspace=lambda x, indices, num_codes, _: bytes_per_pair * x.shape[0] * num_codes,
    )


PEERS = {
    "index_add": _peer(index_add),
    "scatter_reduce": _peer(scatter_reduce),
    "one-hot matmul": _peer(one_hot, bytes_per_pair=12),
}
