"""The peer of adding noise: diffusers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import schedulers
from benchmarks.peers import Peer, needs


def _diffusers(
    setting: schedulers.Setting, x: Tensor, output: Tensor, noise: Tensor
) -> Callable[[], Tensor]:
    import diffusers

    return schedulers.adding(setting.scheduler(diffusers), x, noise)


PEERS = {"diffusers": Peer(_diffusers, needs("diffusers"), cut=False)}
