"""Parameters that ``fully_shard`` has spread over ranks, read and set as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.nn.ranks import reported
from mmfast.regions import without_gradients


def is_sharded(t: Any) -> bool:
    """Whether ``t`` is a DTensor. Told by what it has: importing the class takes a while."""
    return hasattr(t, "placements")


def whole(t: Tensor) -> Tensor:
    """``t`` as a plain tensor, differentiably; of a DTensor all its ranks must ask for it."""
    if not is_sharded(t):
        return t
    with reported("gathering a codebook"):
        return t.full_tensor()  # type: ignore[attr-defined]


def part_of(values: Tensor, like: Any) -> Tensor:
    """What a rank holds of ``values``, the same on all ranks, if they are sharded as the DTensor
    ``like``; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    same = DTensor.from_local(
        values, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False
    )
    return same.redistribute(placements=like.placements).to_local()


@without_gradients
def set_whole(t: Any, values: Tensor, at: Tensor | None = None) -> None:
    """Copy ``values``, a plain tensor that is the same on all ranks, to ``t``.

    Args:
        at: bool, of values' shape: where; everywhere if None.
    """
    if is_sharded(t):
        values = part_of(values, t)
        at = None if at is None else part_of(at, t)
        t = t.to_local()
    # The shard may be elsewhere, where fully_shard offloads it.
    t.copy_(values if at is None else torch.where(at.to(t.device), values.to(t), t))
