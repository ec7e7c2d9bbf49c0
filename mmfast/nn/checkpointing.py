"""What moves in a forward must not move again where activation checkpointing repeats it."""

from __future__ import annotations

import torch


def check_not_repeated() -> None:
    """No backward is running here, which would be one that repeats a forward.

    Raises:
        RuntimeError: one is: what the forward moved would move twice, and gradients would be those
            of other codes than the first time's.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
        raise RuntimeError(
            "a codebook that follows its vectors cannot be in what activation checkpointing runs "
            "again in the backward, as it would move twice: leave the quantiser out of it, or "
            "freeze the codebook"
        )
