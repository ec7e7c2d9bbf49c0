"""The batches of a run as a function of the step, so that a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from mmfast.train.config import TrainConfig
from mmfast.train.distributed import rank, world_size

_SEED_BITS = 40  # of a sample's number in a run; the run's seed is above


class Batches:
    """Batches of named tensors, in a new random order each time the data is through.

    Sample i of a run is sample i mod N of the order of pass i // N. A micro-batch is split among
    the processes in order: theirs behind each other are that of one process.

    Args:
        data: named tensors ``(N, ...)``, or a dataset with ``len`` whose items are dicts.
        config: batch size, micro-batches, seed, workers.
        device: of the batches.

    Raises:
        ValueError: the data is empty, or the batch size is no multiple of micro-batches times
            processes.
    """

    def __init__(
        self, data: Mapping[str, Tensor] | Any, config: TrainConfig, device: torch.device
    ) -> None:
        self._data = data
        self._config = config
        self._device = device
        if isinstance(data, Mapping):
            lengths = {name: len(tensor) for name, tensor in data.items()}
            if len(set(lengths.values())) != 1:
                raise ValueError(f"the data must be named tensors of one length, got {lengths}")
            self.length = next(iter(lengths.values()))
        else:
            self.length = len(data)
        if self.length < 1:
            raise ValueError("the data holds no samples")
        parts = config.accumulate * world_size()
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of accumulate x processes = {config.accumulate} x "
                f"{world_size()}, got {config.batch_size}"
            )
        self._size = config.batch_size // parts
        self._orders: dict[int, Tensor] = {}

    def _order(self, number: int) -> Tensor:
        """Of the pass ``number`` through the data."""
        if number not in self._orders:
            # A batch may touch several passes if it is larger than the data.
            keep = self._config.batch_size // self.length + 1
            self._orders = {n: o for n, o in self._orders.items() if n >= number - keep}
            generator = torch.Generator().manual_seed((self._config.seed << 32) + number)
            self._orders[number] = torch.randperm(self.length, generator=generator)
        return self._orders[number]

    def _places(self, first: int, count: int) -> Tensor:
        """Which samples of the data the samples ``first``... of the run are."""
        numbers = torch.arange(first, first + count)
        passes = numbers // self.length
        places = torch.empty_like(numbers)
        for number in passes.unique().tolist():
            at = passes == number
            places[at] = self._order(number)[numbers[at] % self.length]
        return places

    def _first(self, step: int, micro: int) -> int:
        """The first sample of this process in a micro-batch."""
        whole = step * self._config.batch_size
        return whole + (micro * world_size() + rank()) * self._size

    def _taken(self, places: Tensor) -> dict[str, Tensor]:
        if isinstance(self._data, Mapping):
            return {name: tensor[places] for name, tensor in self._data.items()}
        return default_collate([self._data[place] for place in places.tolist()])

    def _moved(self, batch: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
        """On the device, with seeds; the batch starts with the sample ``first`` of the run."""
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        count = len(next(iter(moved.values())))
        numbers = torch.arange(first, first + count, device=self._device)
        return {**moved, "seed": numbers + (self._config.seed << _SEED_BITS)}

    def firsts(self, count: int) -> dict[str, Tensor]:
        """This process's share of the first ``count`` samples of the run, on the device."""
        count = min(count, self.length)
        start, end = (count * part // world_size() for part in (rank(), rank() + 1))
        return self._moved(self._taken(self._places(start, end - start)), start)

    def from_step(self, start: int) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each step from ``start`` on, of this process, on the device.

        Each has ``"seed"`` beside the data's names: see :meth:`mmfast.train.Task.loss`.
        """
        config = self._config
        firsts = [
            [self._first(step, micro) for micro in range(config.accumulate)]
            for step in range(start, config.steps)
        ]
        places = (self._places(first, self._size) for step in firsts for first in step)
        if isinstance(self._data, Mapping):
            loaded: Iterator[Mapping[str, Tensor]] = map(self._taken, places)
        else:
            loaded = iter(
                DataLoader(
                    self._data,
                    batch_sampler=(place.tolist() for place in places),
                    num_workers=config.workers,
                    pin_memory=self._device.type == "cuda",
                    # Of its own: torch's is the training's.
                    generator=torch.Generator().manual_seed(config.seed),
                )
            )
        for step in firsts:
            yield [self._moved(next(loaded), first) for first in step]
