"""Attention for programs written for ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast import backends
from mmfast.checks import FLOATING
from mmfast.regions import autocast_dtype

_WIDEST = 256  # head size that the kernels take
_theirs = F.scaled_dot_product_attention


@torch.compiler.assume_constant_result
def _missing(kind: str) -> str:
    """Why there are no kernels for a kind of device; empty if there are."""
    if kind == "cpu":
        return "; ".join(backends.extension_missing())
    if kind == "cuda":
        return "; ".join(backends.triton_missing())
    return f"there are no kernels for {kind}"


def objections(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> list[str]:
    """Why PyTorch's attention serves such a call better; empty when nothing speaks against ours."""
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    if any(t.is_nested for t in tensors):
        return ["nested tensors"]
    if any(t.layout != torch.strided for t in tensors):
        return ["tensors that are not strided"]
    kind = query.device.type
    if any(t.device != query.device for t in tensors):
        return ["tensors on several devices"]
    missing = _missing(kind)
    if missing:
        return [missing]
    if not query.dtype == key.dtype == value.dtype or query.dtype not in FLOATING:
        names = ", ".join(str(t.dtype).removeprefix("torch.") for t in (query, key, value))
        return [f"dtypes {names}"]
    if max(query.shape[-1], value.shape[-1]) > _WIDEST:
        return [f"heads wider than {_WIDEST}"]
    return []


def _lowered(tensor: Tensor) -> Tensor:
    """As autocast would have it for attention."""
    lowered = autocast_dtype(tensor.device.type)
    return tensor if lowered is None or tensor.dtype != torch.float32 else tensor.to(lowered)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on mmfast, where it can serve.

    Arguments and result are PyTorch's, autocast included. What :func:`objections` names goes to
    PyTorch's own.
    """
    query, key, value = _lowered(query), _lowered(key), _lowered(value)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(query.dtype) if attn_mask.is_floating_point() else attn_mask
    if objections(query, key, value, attn_mask):
        return _theirs(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return mmfast.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@functools.cache
def dispatch_attention_fn(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What takes the place of diffusers' function of that name: (B, L, H, E) in and out.

    A backend that the user chose, and attention in parallel over devices, stay diffusers'.
    """
    registry = theirs.__globals__["_AttentionBackendRegistry"]
    native = theirs.__globals__["AttentionBackendName"].NATIVE

    def dispatch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        chosen = registry.get_active_backend()[0] if backend is None else backend
        if chosen != native or parallel_config is not None or attention_kwargs:
            return theirs(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )
        if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]
        out = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
        )
        return out.transpose(1, 2)

    return dispatch


@dataclass
class AttentionReport:
    """What :func:`patch_attention` did.

    Attributes:
        served: calls that ran on mmfast. Calls inside ``torch.compile`` are not counted.
        left: calls that PyTorch's own served, by the reason.
    """

    served: int = 0
    left: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.served} of {self.served + sum(self.left.values())} calls ran on mmfast"]
        lines += [f"  {count} did not: {reason}" for reason, count in self.left.items()]
        return "\n".join(lines)


@contextlib.contextmanager
def patch_attention() -> Iterator[AttentionReport]:
    """Inside the block, ``torch.nn.functional.scaled_dot_product_attention`` is mmfast's.

    It holds for the whole process, and for code that looks the function up in
    ``torch.nn.functional`` when it calls it, as most does. Compile a model and call it both inside,
    or both outside.
    """
    report = AttentionReport()

    @functools.wraps(_theirs)
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            reasons = objections(_lowered(query), _lowered(key), _lowered(value), attn_mask)
            if reasons:
                report.left[reasons[0]] = report.left.get(reasons[0], 0) + 1
            else:
                report.served += 1
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )

    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend
    try:
        yield report
    finally:
        F.scaled_dot_product_attention = before
