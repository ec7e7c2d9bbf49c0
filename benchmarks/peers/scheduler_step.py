"""Peers of a scheduler's step: diffusers, and the memory traffic alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import schedulers
from benchmarks.modules import Step
from benchmarks.peers import Peer, needs
from mmfast.ops import sampler_step

_LEAST = 1 << 16  # numbers, below which a call is all overhead


def _diffusers(setting: schedulers.Setting, x: Tensor, output: Tensor, noise: Tensor) -> Step:
    import diffusers

    return schedulers.stepping(setting.scheduler(diffusers), x, output)


class _Moved(TorchDispatchMode):
    """Counts the bytes that mmfast's step must move."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.mmfast.sampler_step.default:
            self.bytes += sampler_step.OP.cost(*args).bytes
        return func(*args, **(kwargs or {}))


def _traffic(
    setting: schedulers.Setting, x: Tensor, output: Tensor, noise: Tensor
) -> Callable[[], Tensor]:
    step = schedulers.step(setting, x, output, noise)
    with _Moved() as moved:
        step()
    numbers = moved.bytes // x.element_size() // 3
    a, b, out = (torch.ones(numbers, dtype=x.dtype, device=x.device) for _ in range(3))
    return lambda: torch.add(a, b, out=out)


def _small(setting: schedulers.Setting, x: Tensor, *_: Tensor) -> list[str]:
    return ["a tiny step is all overhead"] if x.numel() < _LEAST else []


PEERS = {
    "diffusers": Peer(
        _diffusers,
        needs("diffusers"),
        cut=False,
        note="noise from torch's generator, where mmfast draws it in the kernel",
    ),
    "torch.add(out=)": Peer(
        _traffic,
        unsupported=_small,
        cut=False,
        floor=True,
        note="the same bytes, read twice and written once; drawn noise is on top",
    ),
}
