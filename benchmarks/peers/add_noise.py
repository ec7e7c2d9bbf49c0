"""Peers of add_noise: plain PyTorch, diffusers, and the memory traffic alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers import Peer, needs, traffic, written_plainly


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


PEERS = written_plainly(_plain, unsupported=_given) | {
    "diffusers": Peer(
        _diffusers,
        needs("diffusers"),
        unsupported=_untargeted,
        cut=False,
        floor=True,
        note="with its own schedule; makes no target, which would be another pass",
    ),
    "torch.add(out=)": traffic("add_noise"),
}
