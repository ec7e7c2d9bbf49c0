"""Batches of a dataset, in an order that a seed decides and a training run can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mmfast.data.collate import collate

Batch = dict[str, Tensor]


class Samples(Protocol):
    """What a :class:`Loader` loads: samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Draw(int):
    """An index of a sample, with the epoch in which it was drawn."""

    epoch: int

    def __new__(cls, index: int, epoch: int) -> Draw:
        """An int that also has an epoch."""
        made = super().__new__(cls, index)
        made.epoch = epoch
        return made

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int]]:
        return Draw, (int(self), self.epoch)


class BatchSampler(Sampler[list[int]]):
    """Batches of indices, epoch after epoch, each in another order.

    The order depends on the seed and the epoch alone. Ranks take consecutive parts of it, so that
    W ranks with batches of B together see what one process with batches of W B sees. Iterating
    gives the rest of the current epoch.

    Args:
        dataset: or its length.
        batch_size: of each rank.
        seed: of the order.
        shuffle: whether the order is random; else, it is the dataset's.
        drop_last: leave out what does not fill a batch of all ranks; else, the ranks share it, and
            one may have a batch less than another.
        rank, world_size: by default those of torch.distributed, where it is initialised.

    Raises:
        ValueError: ``batch_size`` or ``rank`` makes no sense, or no batch would be full.
    """

    def __init__(
        self,
        dataset: Sized | int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if together else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if together else 1
        self.length = dataset if isinstance(dataset, int) else len(dataset)
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "batch_size must be at least 1 and rank below world_size, got "
                f"{batch_size}, {rank} and {world_size}"
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0
        self.position = 0  # batches of this epoch that were taken
        if len(self) < 1 and (drop_last or not self.length):
            raise ValueError(
                f"{self.length} samples do not fill one batch of {self._together} "
                f"({batch_size} x {world_size} ranks)"
            )

    @property
    def _together(self) -> int:
        """Samples of a batch of all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of an epoch, of this rank."""
        whole, rest = divmod(self.length, self._together)
        return whole + (not self.drop_last and len(self._share(0, rest)) > 0)

    def _share(self, start: int, count: int) -> range:
        """This rank's part of ``count`` places from ``start`` on."""
        first, last = (count * r // self.world_size for r in (self.rank, self.rank + 1))
        return range(start + first, start + last)

    def batches(self) -> Iterator[list[int]]:
        """The rest of the current epoch, which stays as far as it is; see :meth:`advance`."""
        epoch, start, stop = self.epoch, self.position, len(self)
        if self.shuffle:
            # The generator looks at 32 bits; an odd factor keeps neighbouring seeds far apart.
            mixed = (self.seed * 0x9E3779B9 + epoch) % (1 << 32)
            generator = torch.Generator().manual_seed(mixed)
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.arange(self.length)
        for i in range(start, stop):
            first = i * self._together
            share = self._share(first, min(self._together, self.length - first))
            yield [Draw(index, epoch) for index in order[share.start : share.stop].tolist()]

    def advance(self) -> None:
        """Count one batch as taken; after the last, the next epoch begins."""
        self.position += 1
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches():
            self.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler is: plain numbers, the same on all ranks."""
        return {
            "epoch": self.epoch,
            "samples": self.position * self._together,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler was, also with other ranks if all together have its batches.

        Raises:
            ValueError: the other had another dataset, order or size of batches.
        """
        for name in ("length", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved sampler had {name} {state[name]}, this one {getattr(self, name)}"
                )
        position, rest = divmod(state["samples"], self._together)
        if rest or position > len(self):
            raise ValueError(
                f"the saved sampler was at sample {state['samples']} of an epoch, where no batch "
                f"of {self._together} begins"
            )
        self.epoch, self.position = state["epoch"], position


class _Ahead(Sampler[list[int]]):
    """Batches for a DataLoader that fetches before they are asked for."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        return self.sampler.batches()

    def __len__(self) -> int:
        return len(self.sampler)


class Loader:
    """A DataLoader that can be saved and resumed in the middle of an epoch.

    Iterating gives the rest of the current epoch; a batch counts as taken once it is handed out,
    however many the workers have fetched beyond it. The same batches whatever the number of
    workers; torch's global generator is left alone.

    Args:
        dataset: such as :class:`mmfast.data.Dataset` and :class:`mmfast.data.InMemory`, or any that
            gives samples by index.
        batch_size: of each rank.
        workers: processes that read; 0 reads in this one.
        pin_memory: for copies to a GPU.
        collate_fn: makes a batch of samples; by default the dataset's ``collate``, else
            :func:`mmfast.data.collate`.
        options: of :class:`BatchSampler`.

    Attributes:
        sampler: the :class:`BatchSampler`.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        collate_fn: Callable[[Sequence[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        self.dataset = dataset
        self.sampler = BatchSampler(dataset, batch_size, **options)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=_Ahead(self.sampler),
            num_workers=workers,
            collate_fn=collate_fn or getattr(dataset, "collate", collate),
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            # Its own, as otherwise each epoch would draw from the global one.
            generator=torch.Generator().manual_seed(self.sampler.seed % (1 << 63)),
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.sampler.advance()
            yield batch

    def forever(self) -> Iterator[Any]:
        """Epoch after epoch."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is; see :meth:`BatchSampler.state_dict`."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there; see :meth:`BatchSampler.load_state_dict`."""
        self.sampler.load_state_dict(state)
