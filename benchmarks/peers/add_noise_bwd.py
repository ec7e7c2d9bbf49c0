"""Peers of add_noise_bwd: what autograd does for the plain formulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, compiled
from mmfast.ops.add_noise import ALPHA, TARGET_X0


def _weighted(grad_noisy: Tensor, grad_target: Tensor, alpha: Tensor, of_x0: Tensor) -> Tensor:
    return grad_noisy * alpha + grad_target * of_x0


def _plain(
    grad_noisy: Tensor,
    grad_target: Tensor,
    timesteps: Tensor,
    table: Tensor,
    weighted: Callable[..., Tensor] = _weighted,
) -> Callable[[], Tensor]:
    rows = table.index_select(0, timesteps).to(grad_noisy.dtype)
    shape = (-1, *[1] * (grad_noisy.dim() - 1))
    alpha, of_x0 = rows[:, ALPHA].view(shape), rows[:, TARGET_X0].view(shape)
    return lambda: weighted(grad_noisy, grad_target, alpha, of_x0)


def _compiled(
    grad_noisy: Tensor, grad_target: Tensor, timesteps: Tensor, table: Tensor
) -> Callable[[], Tensor]:
    return _plain(grad_noisy, grad_target, timesteps, table, compiled(_weighted))


def _both(*gradients: Any) -> list[str]:
    missing = any(gradient is None for gradient in gradients[:2])
    return ["written for two gradients"] if missing else []


def _traffic(grad_noisy: Tensor, *_: Any) -> Callable[[], Any]:
    out = torch.empty_like(grad_noisy)
    return lambda: torch.add(grad_noisy, grad_noisy, out=out)


PEERS = {
    "plain torch": Peer(_plain, unsupported=_both, cut=False),
    "torch.compile": Peer(
        _compiled, unsupported=_both, cut=False, note="of the same; compiling is not timed"
    ),
    "torch.add(out=)": Peer(_traffic, cut=False, floor=True, note="one tensor read twice"),
}
