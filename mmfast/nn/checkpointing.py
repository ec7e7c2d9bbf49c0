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
            "a quantiser cannot learn from its vectors inside of a backward, as where activation "
            "checkpointing runs its forward again: what moved in the first would move twice. Leave "
            "it out of what is checkpointed, or freeze the codebook and have affine_param=False"
        )
