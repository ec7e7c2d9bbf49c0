"""Peers of dynamic_threshold: torch.quantile, as diffusers calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer
from mmfast.schedule.layout import Layout, M, X


def _plain(
    x: Tensor,
    m: Tensor,
    u: Tensor | None,
    scale: float,
    guidance: Tensor | None,
    table: Tensor,
    step: Tensor,
    ratio: float,
    maximum: float,
) -> Callable[[], Tensor]:
    rows = table.index_select(0, step.reshape(-1)).to(x.dtype)
    shape = (-1, *[1] * (x.dim() - 1))
    of_x, of_m, on = (
        rows[:, c].view(shape) for c in (Layout.DENOISED + X, Layout.DENOISED + M, Layout.GUIDANCE)
    )

    def run() -> Tensor:
        guided = m if u is None else m + on * (scale - 1) * (m - u)
        prediction = of_x * x + of_m * guided
        return torch.quantile(prediction.abs().flatten(1), ratio, dim=1).clamp(1, maximum)

    return run


def _no_factors(*arguments: Any) -> list[str]:
    return [] if arguments[4] is None else ["written for one scale of guidance"]


PEERS = {"torch.quantile": Peer(_plain, unsupported=_no_factors, cut=False)}
