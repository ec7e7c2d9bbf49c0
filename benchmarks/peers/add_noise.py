"""Peers of add_noise: plain PyTorch, diffusers, and the memory traffic alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, needs
from mmfast.ops import add_noise


def _plain(
    x0: Tensor,
    timesteps: Tensor,
    table: Tensor,
    noise: Tensor,
    seed: None,
    offset: None,
    want_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As training scripts write it."""
    rows = table.index_select(0, timesteps).to(x0.dtype)
    alpha, sigma, of_x0, of_noise, weight = (
        column.view(-1, *[1] * (x0.dim() - 1)) for column in rows.unbind(1)
    )
    target = of_x0 * x0 + of_noise * noise if want_target else x0.new_empty(0)
    return alpha * x0 + sigma * noise, target, weight.flatten().float()


def _given(
    x0: Tensor, timesteps: Tensor, table: Tensor, noise: Tensor | None, *_: Any
) -> list[str]:
    return [] if noise is not None else ["draws other noise"]


def _untargeted(*arguments: Any) -> list[str]:
    return _given(*arguments) or (["makes no target"] if arguments[-1] else [])


def _diffusers(x0: Tensor, timesteps: Tensor, table: Tensor, noise: Tensor, *_: Any) -> Any:
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(num_train_timesteps=table.shape[0])
    return lambda: scheduler.add_noise(x0, noise, timesteps)


def _traffic(*arguments: Any) -> Callable[[], Any]:
    """torch.add of tensors that are together as large as what has to be moved."""
    x0 = arguments[0]
    numbers = add_noise.OP.cost(*arguments).bytes // x0.element_size() // 3
    a, b, out = (torch.ones(numbers, dtype=x0.dtype, device=x0.device) for _ in range(3))
    return lambda: torch.add(a, b, out=out)


PEERS = {
    "plain torch": Peer(
        lambda *arguments: lambda: _plain(*arguments), unsupported=_given, cut=False
    ),
    "torch.compile": Peer(
        lambda *arguments: functools.partial(torch.compile(_plain, dynamic=True), *arguments),
        unsupported=_given,
        cut=False,
        note="of the plain formulation; compiling is not timed",
    ),
    "diffusers": Peer(
        _diffusers,
        needs("diffusers"),
        unsupported=_untargeted,
        cut=False,
        floor=True,
        note="with its own schedule; makes no target, which would be another pass",
    ),
    "torch.add(out=)": Peer(
        _traffic, cut=False, floor=True, note="the same bytes, read twice and written once"
    ),
}
