"""Quantize dropout: each training batch uses the first stages only, as many as a draw says."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from mmfast.nn.ranks import of_first, several

_SEEDS = 10_000
_WHAT = "drawing the number of stages"


def check_dropout(dropping: bool, num_quantizers: int, cutoff_index: int, multiple_of: int) -> None:
    """The settings of quantize dropout make sense, else ValueError. Where nothing is dropped, the
    cutoff may be beyond the last stage."""
    if cutoff_index < 0 or (dropping and cutoff_index >= num_quantizers):
        raise ValueError(
            f"quantize_dropout_cutoff_index must be from 0 to num_quantizers - 1 = "
            f"{num_quantizers - 1}, got {cutoff_index}"
        )
    if multiple_of < 1:
        raise ValueError(f"quantize_dropout_multiple_of must be at least 1, got {multiple_of}")


def draw_seed(device: torch.device) -> int | Tensor:
    """The same random seed in all processes: a number, or ``()`` int64 while tracing, when no
    number can be read."""
    together = several()
    where = device if together or torch.compiler.is_compiling() else torch.device("cpu")
    seed = of_first(torch.randint(0, _SEEDS, (), device=where), together, _WHAT)
    return seed if torch.compiler.is_compiling() or is_fake(seed) else int(seed)


def draw_num_stages(
    seed: int | Tensor | None,
    num_quantizers: int,
    cutoff_index: int,
    multiple_of: int,
    device: torch.device,
) -> int | Tensor:
    """How many of the stages take part: from cutoff_index + 1 on, rounded up to a multiple.

    A seed that is a tensor gives a tensor, and nothing is read back; so does any while tracing,
    where Python's generator cannot run: the stages then are others than an eager call draws.
    """
    seed = draw_seed(device) if seed is None else seed
    if isinstance(seed, int) and torch.compiler.is_compiling():
        seed = torch.full((), seed, device=device)
    if isinstance(seed, Tensor):
        stages = cutoff_index + seed % (num_quantizers - cutoff_index) + 1
        stages = (stages + multiple_of - 1) // multiple_of * multiple_of
        return stages.clamp_max(num_quantizers)
    drawn = random.Random(seed).randrange(cutoff_index, num_quantizers) + 1
    return min((drawn + multiple_of - 1) // multiple_of * multiple_of, num_quantizers)


def is_dropped(stage: int, num_stages: int | Tensor) -> bool:
    """Whether the stage can be left out. With a tensor it never can: it is undone instead."""
    return isinstance(num_stages, int) and stage >= num_stages


def undo_dropped(
    stage: int, num_stages: int | Tensor, quantized: Tensor, indices: Tensor, loss: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the stage gave, or if it is beyond ``num_stages``: zeros, -1 and a loss of 0."""
    if isinstance(num_stages, int):
        return quantized, indices, loss
    taken = num_stages > stage
    return (
        torch.where(taken, quantized, 0),
        torch.where(taken, indices, -1),
        torch.where(taken, loss, 0),
    )


def stack_stages(
    num_quantizers: int, indices: list[Tensor], losses: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Indices ``(..., Q)`` and losses ``(Q,)``, with -1 and 0 for the stages left out."""
    missing = (0, num_quantizers - len(indices))
    return (
        nn.functional.pad(torch.stack(indices, -1), missing, value=-1),
        nn.functional.pad(torch.stack(losses, -1), missing),
    )


def state_before(layer: nn.Module, num_stages: int | Tensor) -> list[tuple[Tensor, Tensor]]:
    """The layer's buffers and copies of them for :func:`restore`, if it may have to be undone."""
    if isinstance(num_stages, int):
        return []
    return [(buffer, buffer.clone()) for buffer in layer.buffers()]


def restore(state: list[tuple[Tensor, Tensor]], stage: int, num_stages: int | Tensor) -> None:
    """Put back the buffers of a stage beyond ``num_stages``."""
    if isinstance(num_stages, int):
        return
    for buffer, before in state:
        buffer.copy_(torch.where(num_stages > stage, buffer, before))
