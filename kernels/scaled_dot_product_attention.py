"""Attention in Triton with PyTorch's signature, of ``attention_forward.py`` and
``attention_gradients.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmfast.kernels.attention import NOT_CAUSAL, TOP_LEFT, Limits, Tokens, offline_variant
from mmfast.kernels.attention_forward import attention_forward, forward
from mmfast.kernels.attention_fused_gradient import fused_kernel
from mmfast.kernels.attention_gradients import each_way, gradients
from mmfast.kernels.attention_key_gradient import key_kernel
from mmfast.kernels.attention_query_gradient import query_kernel
from mmfast.kernels.attention_tiles import TWO_KERNELS
from mmfast.kernels.tuned import Problem, Tuned
from mmfast.ops.attention import new_like, new_lse
from mmfast.order import sums_in_any_order

HEAD_SIZES = (64, 72, 80, 88, 96, 112, 128)  # of today's models


def _limits(
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Limits:
    causal = TOP_LEFT if is_causal else NOT_CAUSAL
    return Limits(mask, causal.value, dropout_p, seed, offset)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.scaled_dot_product_attention`` on checked arguments."""
    out, lse = new_like(query, value.shape[3]), new_lse(query, query.shape[:3])
    limits = _limits(attn_mask, dropout_p, is_causal, seed, offset)
    keys = [(key, value, Tokens.of(key))]
    attention_forward(query, keys, out, lse, scale, Tokens.of(query), limits)
    return out, lse


def scaled_dot_product_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,
    offset: Tensor | None,
    want_mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.scaled_dot_product_attention_bwd`` on checked arguments."""
    grad_query, grad_key, grad_value = (new_like(t, t.shape[3]) for t in (query, key, value))
    lse = lse.contiguous()
    scores = None
    if want_mask_grad:
        scores = lse.new_empty(*lse.shape, key.shape[2])
    limits = _limits(attn_mask, dropout_p, is_causal, seed, offset)
    grads = grad_query, grad_key, grad_value
    gradients(
        query, grad_out, out, key, value, lse, grads, scores, scale, Tokens.of(query),
        Tokens.of(key), limits,
    )  # fmt: skip
    grad_mask = query.new_empty(0)
    if scores is not None:
        assert attn_mask is not None
        grad_mask = scores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
        grad_mask = grad_mask.contiguous()
    return grad_query, grad_key, grad_value, grad_mask


def _problems(
    kernel: Tuned, backward: bool, device: torch.device, divisor: int = 1
) -> Iterator[Problem]:
    """Of head sizes that models have, as long as an image's tokens are and as a small image's."""
    for width in (72, 64, 128, 96):
        for batch, heads, length in ((1, 16, 4096), (64, 16, 256)):
            shape = max(1, batch // divisor), heads // min(heads, divisor), length, width
            made = torch.randn(4, *shape).to(device, torch.bfloat16)
            yield _problem(kernel, backward, made)
            if kernel is fused_kernel:
                yield _problem(kernel, backward, made, any_order=True)


def _problem(kernel: Tuned, backward: bool, made: Tensor, any_order: bool = False) -> Problem:
    grad, *qkv = made
    scale = qkv[0].shape[3] ** -0.5
    others = None, 0.0, False, scale, None, None
    out, lse = scaled_dot_product_attention(*qkv, *others)

    def call() -> tuple[Tensor, ...]:
        if not backward:
            return scaled_dot_product_attention(*qkv, *others)[:1]
        # One of two kernels is not to be sought where a third does the work of both.
        way = fused_kernel.forced if kernel is fused_kernel else TWO_KERNELS
        order = sums_in_any_order() if any_order else contextlib.nullcontext()
        with fused_kernel.forcing(way), order:
            return scaled_dot_product_attention_bwd(grad, *qkv, out, lse, *others, False)[:3]

    @functools.cache
    def expected() -> tuple[Tensor, ...]:
        leaves = [t.float().requires_grad_() for t in qkv]
        wanted = torch.nn.functional.scaled_dot_product_attention(*leaves, scale=scale)
        return torch.autograd.grad(wanted, leaves, grad.float()) if backward else (wanted.detach(),)

    def right(found: tuple[Tensor, ...]) -> bool:
        pairs = zip(found, expected(), strict=True)
        return all(bool((a.float() - b).norm() <= 0.02 * b.norm()) for a, b in pairs)

    return Problem(kernel.seen_in(call), call, right)


tuning = [
    (kernel, functools.partial(_problems, kernel, kernel is not forward))
    for kernel in (forward, query_kernel, key_kernel, fused_kernel)
]


def offline_variants() -> list[Any]:
    """What ``python -m mmfast.kernels.offline`` compiles."""

    def variant(width: int, dtype: torch.dtype, backward: bool, quick: bool, **more: Any) -> Any:
        def launch(n: int, k: int) -> None:
            q, key, value = (torch.ones(1, 2, m, width, dtype=dtype) for m in (n, k, k))
            mask = None
            if "mask" in more or "dense mask" in more:
                rows = n if "dense mask" in more else 1
                mask = torch.ones(1, 1, rows, k, dtype=torch.bool)
            seed = torch.ones((), dtype=torch.int64) if "dropout_p" in more else None
            others = mask, more.get("dropout_p", 0.0), "causal" in more, 0.1, seed, seed
            if not backward:
                scaled_dot_product_attention(q, key, value, *others)
                return
            lse = torch.ones(q.shape[:3], dtype=torch.promote_types(dtype, torch.float32))
            each_way(
                lambda: scaled_dot_product_attention_bwd(q, q, key, value, q, lse, *others, False)
            )

        of = "".join(f", {n}" for n in more)
        made = offline_variant(
            f"scaled_dot_product_attention: {dtype}, E {width}{of}", launch, backward, quick
        )
        # Some devices have no instructions for products of float64.
        plain = {"matrix": frozenset(), "wide": ()} if dtype == torch.float64 else {}
        return dataclasses.replace(made, **plain)

    bfloat16, float32, float64 = torch.bfloat16, torch.float32, torch.float64
    return [
        *(variant(e, bfloat16, b, e == 72) for e in HEAD_SIZES for b in (False, True)),
        *(variant(e, float32, False, False) for e in (64, 72)),
        *(
            variant(e, bfloat16, b, False, **{kind: True})
            for b in (False, True)
            for kind in ("mask", "dense mask")
            for e in (64, 72, 128)
        ),
        *(
            variant(e, bfloat16, b, False, causal=True)
            for e in (64, 72, 128)
            for b in (False, True)
        ),
        variant(72, bfloat16, False, False, dropout_p=0.1),
        *(variant(8, float64, b, True, mask=True) for b in (False, True)),
    ]
