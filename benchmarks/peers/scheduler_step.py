"""The peer of a scheduler's step: diffusers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import schedulers
from benchmarks.peers import Peer, needs


def _diffusers(
    setting: schedulers.Setting, x: Tensor, output: Tensor, noise: Tensor
) -> Callable[[], Tensor]:
    import diffusers

    return schedulers.stepping(setting.scheduler(diffusers), x, output)


PEERS = {
    "diffusers": Peer(
        _diffusers,
        needs("diffusers"),
        cut=False,
        note="noise from torch's generator, where mmfast draws it in the kernel",
    )
}
