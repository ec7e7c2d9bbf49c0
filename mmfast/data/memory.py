"""A dataset of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mmfast.data.collate import collate

Sample = dict[str, Tensor]


class InMemory:
    """Samples that are rows of tensors.

    Args:
        tensors: by modality, ``(N, ...)`` all.

    Raises:
        ValueError: there are none, or their N differ.
    """

    def __init__(self, **tensors: Tensor) -> None:
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"tensors must have one length N, got {counts}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> Sample:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        # What a DataLoader asks for, if a dataset has it: whole batches, without a copy per row.
        return {name: tensor[list(indices)] for name, tensor in self.tensors.items()}

    @property
    def collate(self) -> Callable[[Sequence[Sample] | Sample], Sample]:
        """For a DataLoader: batches are made already by ``__getitems__``."""
        return _collated

    def subset(self, indices: Tensor) -> InMemory:
        """Those of the samples, copied."""
        return InMemory(**{name: tensor[indices] for name, tensor in self.tensors.items()})


def _collated(samples: Sequence[Sample] | Sample) -> Sample:
    return samples if isinstance(samples, dict) else collate(samples)
