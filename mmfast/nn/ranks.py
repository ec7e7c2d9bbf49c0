"""What the processes of a distributed run share: all of it by sums of fixed shapes.

No collective is in a branch that depends on data: ranks that see different batches, empty ones
among them, make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # a build of torch without distributed has none
    from torch.distributed import ProcessGroup


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def reported(what: str, group: ProcessGroup | None = None) -> Iterator[None]:
    """Say what was being done when a collective inside fails.

    Raises:
        RuntimeError: it failed; the message names ``what``, and the cause is chained.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} over {dist.get_world_size(group)} ranks failed on rank {dist.get_rank()}: "
            f"{error}"
        ) from error


def _check_initialised(what: str) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{what} over ranks needs torch.distributed.init_process_group first")


def add_up(tensor: Tensor, sync: bool, what: str, group: ProcessGroup | None = None) -> Tensor:
    """``tensor``, which becomes the sum of all processes' ones if ``sync``.

    Args:
        what: is being done, for the message of a failure.
        group: the processes; all of them if None.

    Raises:
        RuntimeError: the sum failed, for one because a process has ended.
    """
    return reduce(tensor, dist.ReduceOp.SUM, what, group) if sync else tensor


def reduce(tensor: Tensor, by: Any, what: str, group: ProcessGroup | None = None) -> Tensor:
    """``tensor``, which becomes the reduction of all processes' ones ``by`` an operation."""
    _check_initialised(what)
    if torch.compiler.is_compiling():
        dist.all_reduce(tensor, by, group=group)
    else:
        with reported(what, group):
            dist.all_reduce(tensor, by, group=group)
    return tensor


def gathered(own: Tensor, what: str, group: ProcessGroup | None = None) -> Tensor:
    """The ``own`` (...) of all W processes, ``(W, ...)``, as a sum of what is zero elsewhere."""
    _check_initialised(what)
    every = own.new_zeros(dist.get_world_size(group), *own.shape)
    every[dist.get_rank(group)] = own
    return add_up(every, True, what, group)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, what: str) -> Tensor:
        ctx.what = what
        return add_up(tensor.clone(), True, what)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return add_up(grads[0].clone(), True, f"the gradient of {ctx.what}"), None


def total_of(tensor: Tensor, what: str) -> Tensor:
    """The sum of all processes' ``tensor``, differentiably: the gradient is the sum of theirs."""
    return _Total.apply(tensor, what)


def of_first(tensor: Tensor, sync: bool, what: str, group: ProcessGroup | None = None) -> Tensor:
    """The first process's ``tensor``, so that all draw the same random numbers."""
    if not sync or dist.get_rank(group) == 0:
        return add_up(tensor, sync, what, group)
    return add_up(torch.zeros_like(tensor), sync, what, group)


class Sharing(NamedTuple):
    """Which processes a codebook's random vectors come from, and which of its codes this one has.

    Attributes:
        sync: whether there are several, with batches of their own.
        group: those with batches of their own; all processes if None.
        others: groups of processes that must draw the same random numbers besides.
        codes: of all K, this process's.
    """

    sync: bool
    group: ProcessGroup | None = None
    others: tuple[ProcessGroup, ...] = ()
    codes: slice = slice(None)

    def same(self, drawn: Tensor, what: str) -> Tensor:
        """The numbers that one process of all has ``drawn``."""
        for group in self.others:
            drawn = of_first(drawn, True, what, group)
        return of_first(drawn, self.sync, what, self.group)


def check_agreement(initted: Tensor, group: ProcessGroup | None = None) -> None:
    """All processes are initialised or none: else some would wait for others that never come.
    Reads back what they say in ``initted`` ().

    Raises:
        RuntimeError: some are.
    """
    what = "comparing whether codebooks are initialised"
    every = gathered(initted.long(), what, group).tolist()
    ranks = [rank for rank, value in enumerate(every) if value]
    if 0 < len(ranks) < len(every):
        raise RuntimeError(
            f"the codebook is initialised on ranks {ranks} of {len(every)} only: load the "
            "same state on all of them before the first step"
        )


class Joined:
    """The vectors of all processes, one after another, as if they were one batch.

    Attributes:
        total: vectors there are, ``(H,)`` int64.
    """

    def __init__(self, x: Tensor, inside: Tensor | None, sharing: Sharing, what: str) -> None:
        """x: this process's vectors, ``(H, N, D)``. inside: ``(H, N)``, which of them count.
        what: they are for, as :func:`add_up` says it."""
        self._x, self._inside, self._what = x, inside, what
        self._sync, self._group = sharing.sync, sharing.group
        own = x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64)
        if inside is not None:
            own = inside.sum(1)
        self._own = own
        self._start = torch.zeros_like(own)
        self.total = own
        if sharing.sync:
            every = gathered(own, what, sharing.group)  # [W, H]
            self._start = every[: dist.get_rank(sharing.group)].sum(0)
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
        return add_up(taken, self._sync, self._what, self._group)
