"""Peers of dit_block: the block as facebookresearch/DiT writes it, alone and compiled."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import gated_activation, written_plainly


def normed(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """With shift and scale."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def plain(
    x: Tensor,
    modulation: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    proj: Tensor,
    proj_bias: Tensor | None,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    heads: int,
    scale: float,
    eps: float,
    mlp_eps: float,
    activation: str,
    *_: object,
) -> Tensor:
    """The result alone, in x's dtype, of modulations for whole samples."""
    shift, factor, gate, shift2, factor2, gate2 = modulation.chunk(6, -1)
    packed = F.linear(normed(x, shift, factor, eps), qkv, qkv_bias)
    q, k, v = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    x = x + gate * F.linear(y, proj, proj_bias)
    hidden = F.linear(normed(x, shift2, factor2, mlp_eps), fc1, fc1_bias)
    active = gated_activation.plain(hidden, None, activation, "gate")
    return x + gate2 * F.linear(active, fc2, fc2_bias)


PEERS = written_plainly(plain)
