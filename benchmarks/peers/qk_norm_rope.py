"""Peers of qk_norm_rope: diffusers' modules and functions, compiled, and the memory traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, compiled
from mmfast.ops import qk_norm_rope


def plain(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    weight_k: Tensor,
    bias_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    norm: str,
    across_heads: bool,
    rotation: str,
    rotary_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As diffusers writes it: RMSNorm of the heads, then apply_rotary_emb."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        if across_heads:
            x = x.flatten(2)
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = (x * torch.rsqrt(variance + eps) * weight).to(x.dtype)
        if across_heads:
            x = x.view(q.shape)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), -1).flatten(-2)
        return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)

    return one(q, weight_q), one(k, weight_k)


def as_models_have_them(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tables with a number for each number of a head, which the formulation needs."""
    cos, sin = (t.repeat_interleave(2, -1) for t in arguments[6:8])
    return *arguments[:6], cos, sin, *arguments[8:]


def _unsupported(*arguments: Any) -> list[str]:
    return [] if arguments[8] == "rms" and arguments[10] == "interleaved" else ["another model's"]


def _eager(*arguments: Any) -> Callable[[], Any]:
    given = as_models_have_them(arguments)
    return lambda: plain(*given)


def _compiled(*arguments: Any) -> Callable[[], Any]:
    given, run = as_models_have_them(arguments), compiled(plain, None)
    return lambda: run(*given)


def traffic(bytes_moved: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """torch.add of tensors that are together as large."""
    numbers = bytes_moved // dtype.itemsize // 3
    a, b, out = (torch.ones(numbers, dtype=dtype, device=device) for _ in range(3))
    return lambda: torch.add(a, b, out=out)


def _traffic(*arguments: Any) -> Callable[[], Any]:
    moved = qk_norm_rope.OP.cost(*arguments).bytes
    return traffic(moved, arguments[0].dtype, arguments[0].device)


PEERS = {
    "plain torch": Peer(_eager, unsupported=_unsupported, cut=False),
    "torch.compile": Peer(
        _compiled,
        unsupported=_unsupported,
        cut=False,
        note="of the plain formulation; compiling is not timed",
    ),
    "torch.add(out=)": Peer(
        _traffic, cut=False, floor=True, note="the same bytes, read twice and written once"
    ),
}
