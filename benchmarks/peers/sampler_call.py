"""The peer of one small step: what it comes to in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import schedulers
from benchmarks.peers import Peer


def _plain(
    setting: schedulers.Setting, x: Tensor, output: Tensor, noise: Tensor
) -> Callable[[], Tensor]:
    weights = torch.tensor(schedulers.WEIGHTS, device=x.device)
    index = torch.tensor(1, device=x.device)  # as a sampler's loop has it
    return lambda: x + weights[index] * output


PEERS = {"plain torch": Peer(_plain, cut=False)}
