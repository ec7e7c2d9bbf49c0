"""Peers of unpatchify: a permuted copy, and one that is not permuted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer
from mmfast.ops import patchify


def _copy(x: Tensor, *_: Any) -> Callable[[], Any]:
    out = torch.empty_like(x)
    return lambda: out.copy_(x)


PEERS = {
    "plain torch": Peer(
        lambda *arguments: lambda: patchify.reference_unpatchify(*arguments),
        cut=False,
        note="a permuted copy",
    ),
    "copy_": Peer(_copy, cut=False, floor=True, note="the same bytes in the same order"),
}
