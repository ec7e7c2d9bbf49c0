"""Beam search over the stages of a residual quantiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """What a stage offers for each vector ``(B, L, J, D)`` of J beams.

    Attributes:
        codes: ``(B, L, J, k, D)``. indices: ``(B, L, J, k)``. losses: ``(B, L, J, k)``.
    """

    codes: Tensor
    indices: Tensor
    losses: Tensor


class Path(NamedTuple):
    """The best choice of codes.

    Attributes:
        quantized: ``(B, L, D)``, the sum of the codes.
        indices: of each stage, ``(B, L)``.
        losses: of each stage, ``(B, L)``.
        inputs: what each stage had to quantise, ``(B, L, D)``, without gradient.
    """

    quantized: Tensor
    indices: list[Tensor]
    losses: list[Tensor]
    inputs: list[Tensor]


def beam_search(
    x: Tensor,
    stages: Iterable[Callable[[Tensor], Candidates]],
    weights: Tensor,
    width: int,
    passed_on: Callable[[Tensor], Tensor],
) -> Path:
    """The codes whose weighted losses have the least sum, of those that the beams reach.

    Args:
        x: ``(B, L, D)``.
        stages: each gives its candidates for ``(B, L, J, D)``.
        weights: of each stage's loss, ``(Q,)``.
        width: beams that are kept.
        passed_on: a code as the next stage's residual sees it; where gradients are cut.
    """
    residual = x[:, :, None]  # [B, L, J, D]
    total = torch.zeros_like(residual)
    score = torch.zeros_like(residual[..., 0])  # [B, L, J]
    kept = []
    for stage, weight in zip(stages, weights, strict=False):
        codes, indices, losses = (t.flatten(2, 3) for t in stage(residual))
        branches = codes.shape[2] // residual.shape[2]
        reached = score.repeat_interleave(branches, 2) - weight * losses  # [B, L, J k]
        if reached.shape[2] > width:
            score, best = reached.topk(width, 2)
        else:  # all go on, in their order
            score, best = reached, torch.arange(reached.shape[2], device=x.device)
            best = best.expand_as(reached)
        parent = best // branches  # [B, L, J']
        kept.append((residual.detach(), parent, indices.gather(2, best), losses.gather(2, best)))
        code = _beams(codes, best)
        total = _beams(total, parent) + code
        residual = _beams(residual, parent) - passed_on(code)
    beam = score.argmax(2, keepdim=True)  # [B, L, 1]
    path = Path(_beams(total, beam)[:, :, 0], [], [], [])
    for inputs, parent, indices, losses in reversed(kept):
        path.indices.insert(0, indices.gather(2, beam)[:, :, 0])
        path.losses.insert(0, losses.gather(2, beam)[:, :, 0])
        beam = parent.gather(2, beam)
        path.inputs.insert(0, _beams(inputs, beam)[:, :, 0])
    return path


def _beams(t: Tensor, at: Tensor) -> Tensor:
    """(B, L, J', D) of ``t`` (B, L, J, D) at ``at`` (B, L, J')."""
    return t.gather(2, at[..., None].expand(-1, -1, -1, t.shape[3]))
