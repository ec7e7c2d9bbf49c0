"""Blocks of diffusion transformers in one op, as long as their parts are no more than that."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.nn.layers import is_plain
from mmfast.ops.dit_block import dit_block


def whole_block(
    x: Tensor,
    modulation: Tensor,
    layers: tuple[nn.Module, nn.Module, nn.Module, nn.Module],
    *,
    num_heads: int,
    scale: float,
    eps: float,
    mlp_eps: float,
    activation: str,
) -> Tensor | None:
    """A block with adaLN-Zero; None where its parts are to be called one by one.

    Args:
        x: tokens ``(B, L, C)``.
        modulation: ``(B, 6 C)``, or one for each of F frames, ``(B, F, 6 C)``.
        layers: of queries, keys and values; of the attention's output; of the MLP.
        num_heads, scale: of the attention.
        eps, mlp_eps: of the norms.
        activation: of the MLP, one of :func:`mmfast.linear`'s.
    """
    given = []
    for layer in layers:
        if not is_plain(layer, nn.Linear):
            return None
        assert isinstance(layer, nn.Linear)
        given.append((layer.weight, layer.bias))
    return dit_block(
        x,
        modulation,
        given,
        num_heads=num_heads,
        scale=scale,
        eps=eps,
        mlp_eps=mlp_eps,
        activation=activation,
    )
