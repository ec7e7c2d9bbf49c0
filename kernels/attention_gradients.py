"""The gradients of attention of one stream of queries to one of keys in Triton: in one pass where
that is chosen, else by a kernel for queries and one for keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from mmfast.kernels.attention import BEGINS, Limits, Tokens, blocks, factor_of, heads_of
from mmfast.kernels.attention_fused_gradient import fused_gradient, fused_kernel, places_of
from mmfast.kernels.attention_key_gradient import key_gradient
from mmfast.kernels.attention_query_gradient import query_gradient
from mmfast.kernels.attention_tiles import TWO_KERNELS, facts, precision, suits_hopper
from mmfast.order import any_order, sums_in_any_order

_LEAST_SCALE = 2.0**-60  # by which the logarithms of sums are divided in one pass


def gradients(
    query: Tensor,  # (B, H, L, E), B expanded where sequences lie one behind the other
    grad_out: Tensor,  # (B, H, L, Ev)
    out: Tensor,  # (B, H, L, Ev)
    key: Tensor,  # (B, Hkv, S, E)
    value: Tensor,  # (B, Hkv, S, Ev)
    lse: Tensor,  # (B, H, L), or (H, L); contiguous
    grads: tuple[Tensor, Tensor, Tensor],  # of query, key and value
    grad_scores: Tensor | None,  # (B, H, L, S)
    scale: float,
    queries: Tokens,
    keys: Tokens,
    limits: Limits,
) -> None:
    """Fills ``grads`` and, if there is one, ``grad_scores``."""
    query, grad_out, out = heads_of(query), heads_of(grad_out), heads_of(out)
    key, value = heads_of(key), heads_of(value)
    _, given = limits.arguments(query)
    constants: dict[str, Any] = {
        **blocks(query.shape[3], value.shape[3]),
        **given,
        "FACTOR": factor_of(query, grad_out, out, key, value, *grads),
        "KIND": queries.kind,
        "PRECISION": precision(query.dtype),
    }
    known = facts(query.dtype, scale, queries.longest, keys.longest) | {"ANY_ORDER": any_order()}
    if (
        grad_scores is None
        and query.shape[1] == key.shape[1]
        and scale >= _LEAST_SCALE
        and query.numel() * key.numel() * value.numel() > 0
        and constants["FACTOR"] % 8 == 0
        and suits_hopper(constants | known)
    ):
        config = fused_kernel.forced or TWO_KERNELS
        # Short sequences, each padded, would take too much memory.
        if not fused_kernel.forced and _fits(queries, query.shape[0]):
            config = fused_kernel.choose(constants | known)
        if config is not TWO_KERNELS:
            del constants["DROPOUT"]
            fused_gradient(
                config, query, grad_out, out, key, value, lse, grads, scale, queries, keys, limits,
                constants,
            )  # fmt: skip
            return
    delta = torch.empty_like(lse)
    query_gradient(
        query, grad_out, out, [(key, value, keys)], grads[0], lse, delta, grad_scores, scale,
        queries, limits,
    )  # fmt: skip
    streams = [(query, grad_out, lse, delta, queries)]
    key_gradient(key, value, streams, grads[1], grads[2], scale, keys, limits)


def _fits(queries: Tokens, batch: int) -> bool:
    rows = queries.rows * (1 if queries.kind == BEGINS.value else batch)
    return places_of(queries, batch) <= 2 * rows


def ways(launch: Callable[[], Any]) -> dict[str, triton.Config]:
    """Those that fit the device, by name, for ``launch``, of which gradients are a part."""
    with sums_in_any_order():
        with fused_kernel.forcing(None):
            known = fused_kernel.seen_in(launch)
        fitting = fused_kernel.candidates(known) if known else [TWO_KERNELS]
    return {_name(config): config for config in fitting}


def _name(config: triton.Config) -> str:
    if config is TWO_KERNELS:
        return "two kernels"
    return "in turns" if config.kwargs["ORDERED"] else "in any order"


def each_way(launch: Callable[[], Any]) -> None:
    """Calls ``launch``, which is to take two kernels by itself, in all of them."""
    for config in ways(launch).values():
        if config is not TWO_KERNELS:
            with fused_kernel.forcing(config):
                launch()
