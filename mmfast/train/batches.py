"""The batches of a run, which a resumed one takes up where they were left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmfast.data import BatchSampler, InMemory, Loader, collate
from mmfast.data.sampling import Samples
from mmfast.train.config import TrainConfig
from mmfast.train.distributed import rank, world_size

Micros = list[dict[str, Tensor]]

_SEED_BITS = 40  # of a sample's number in a run; the run's seed is above


class Batches:
    """Micro-batches of named tensors, epoch after epoch, each in another random order.

    A micro-batch is split among the processes in order: theirs behind each other are that of one
    process.

    Args:
        data: named tensors ``(N, ...)``, or samples by index, dicts of them.
        config: batch size, micro-batches, seed, workers.
        device: of the batches.

    Raises:
        ValueError: the data does not fill a micro-batch, or the batch size is no multiple of
            micro-batches times processes.
    """

    def __init__(
        self, data: Mapping[str, Tensor] | Samples, config: TrainConfig, device: torch.device
    ) -> None:
        self._data: Samples = InMemory(**data) if isinstance(data, Mapping) else data
        self._config = config
        self._device = device
        parts = config.accumulate * world_size()
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of accumulate x processes = {config.accumulate} x "
                f"{world_size()}, got {config.batch_size}"
            )
        self._size = config.batch_size // parts
        self._loader = Loader(
            self._data,
            self._size,
            seed=config.seed,
            workers=config.workers,
            pin_memory=device.type == "cuda",
        )
        self._state = self._loader.state_dict()

    def _moved(self, batch: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
        """On the device, with seeds; the batch starts with the sample ``first`` of the run."""
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        count = len(next(iter(moved.values())))
        numbers = torch.arange(first, first + count, device=self._device)
        return {**moved, "seed": numbers + (self._config.seed << _SEED_BITS)}

    def some(self, count: int) -> dict[str, Tensor]:
        """This process's share of ``count`` random samples, always the same, on the device."""
        share = -(-min(count, len(self._data)) // world_size())
        sampler = BatchSampler(
            len(self._data), share, seed=self._config.seed, drop_last=False, rank=rank()
        )
        places = next(sampler.batches())
        return self._moved(collated(self._data, places), rank() * share)

    def from_step(self, start: int) -> Iterator[Micros]:
        """The micro-batches of each step from ``start`` on, of this process, on the device.

        Each has ``"seed"`` beside the data's names: see :meth:`mmfast.train.Task.loss`.
        """
        config, batches = self._config, self._loader.forever()
        for step in range(start, config.steps):
            micros = []
            for micro in range(config.accumulate):
                first = step * config.batch_size + (micro * world_size() + rank()) * self._size
                micros.append(self._moved(next(batches), first))
            self._state = self._loader.state_dict()
            yield micros

    def state(self) -> dict[str, Any]:
        """Where the batches are after the last whole step, the same for all processes."""
        return self._state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on there.

        Raises:
            ValueError: it is that of other data, or of other batches.
        """
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()


def collated(data: Samples, places: Sequence[int]) -> dict[str, Tensor]:
    """The samples at ``places``, as a batch."""
    loader: DataLoader[Any] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=[list(places)],
        collate_fn=getattr(data, "collate", collate),
        generator=torch.Generator(),  # its own: torch's is the training's
    )
    batch: dict[str, Tensor] = next(iter(loader))
    return batch
