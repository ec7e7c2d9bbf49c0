"""Samples together as a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def collate(
    samples: Sequence[Mapping[str, Tensor]], padding: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """A batch of samples: their tensors stacked, the last dimension filled up to the longest.

    Args:
        samples: that have the same names.
        padding: by name, what to fill up with; 0 where none is given.

    Returns:
        By the same names, tensors ``(B, ...)``.

    Raises:
        ValueError: there are no samples, or they differ in names, or in more than the last
            dimension.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    names = samples[0].keys()
    for sample in samples:
        if sample.keys() != names:
            raise ValueError(
                f"samples of a batch must have the same names, got {', '.join(names)} and "
                f"{', '.join(sample)}"
            )
    made = {}
    for name in names:
        tensors = [sample[name] for sample in samples]
        shapes = {tuple(t.shape) for t in tensors}
        if len(shapes) > 1:
            if len({(len(shape), shape[:-1]) for shape in shapes}) > 1:
                raise ValueError(f"{name} must be of one shape in a batch, got {sorted(shapes)}")
            longest = max(shape[-1] for shape in shapes)
            value = (padding or {}).get(name, 0)
            tensors = [F.pad(t, (0, longest - t.shape[-1]), value=value) for t in tensors]
        made[name] = torch.stack(tensors)
    return made


def length_mask(lengths: Tensor, longest: int) -> Tensor:
    """Bool ``(B, longest)``, true where a position is below the length.

    Args:
        lengths: ``(B,)`` integers.
        longest: of the padded sequences.
    """
    return torch.arange(longest, device=lengths.device) < lengths[:, None]
