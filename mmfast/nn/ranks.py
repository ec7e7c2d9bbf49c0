"""What the processes of a distributed run share: all of it by sums of fixed shapes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def add_up(tensor: Tensor, sync: bool) -> Tensor:
    """``tensor``, which becomes the sum of all processes' ones if ``sync``."""
    if sync:
        dist.all_reduce(tensor)
    return tensor


def of_first(tensor: Tensor, sync: bool) -> Tensor:
    """The first process's ``tensor``, so that all draw the same random numbers."""
    if not sync or dist.get_rank() == 0:
        return add_up(tensor, sync)
    return add_up(torch.zeros_like(tensor), sync)


class Joined:
    """The vectors of all processes, one after another, as if they were one batch.

    Attributes:
        total: vectors there are, ``(H,)`` int64.
    """

    def __init__(self, x: Tensor, inside: Tensor | None, sync: bool) -> None:
        """x: this process's vectors, ``(H, N, D)``. inside: ``(H, N)``, which of them count."""
        self._x, self._inside, self._sync = x, inside, sync
        own = x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64)
        if inside is not None:
            own = inside.sum(1)
        self._own = own
        self._start = torch.zeros_like(own)
        self.total = own
        if sync:
            every = own.new_zeros(dist.get_world_size(), *own.shape)
            every[dist.get_rank()] = own
            add_up(every, sync)  # [W, H]
            self._start = every[: dist.get_rank()].sum(0)
            self.total = every.sum(0)

    def take(self, positions: Tensor) -> Tensor:
        """The vectors at ``positions`` (H, P) of the joined batch, (H, P, D), float32 at least;
        zeros at positions out of range."""
        local = positions - self._start[:, None]
        own = (local >= 0) & (local < self._own[:, None])  # [H, P]
        dtype = torch.promote_types(self._x.dtype, torch.float32)
        taken = self._x.new_zeros(*positions.shape, self._x.shape[2], dtype=dtype)
        if self._x.shape[1] > 0:
            row = local
            if self._inside is not None:
                row = torch.searchsorted(self._inside.cumsum(1), local + 1)
            row = row.clamp(0, self._x.shape[1] - 1)[:, :, None]
            found = self._x.gather(1, row.expand(-1, -1, self._x.shape[2]))
            taken = torch.where(own[:, :, None], found.to(dtype), taken)
        return add_up(taken, self._sync)
