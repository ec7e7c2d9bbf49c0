"""Gated activations in Triton: each program does a block of one row, or of all rows as one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import (
    ceil_div,
    common_multiple,
    first_stride,
    multiple,
    num_threads,
    rounded,
)
from mmfast.kernels.launching import launch

_BLOCK = 1024
_ROOT = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_HALF_ROOT = tl.constexpr(0.7071067811865476)
_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(1.5957691216057308 * 0.044715)


@triton.jit
def _constant(value, like):
    """In like's dtype: constants of Triton are float32 ones."""
    return tl.full([], value, tl.float64).to(like.dtype)


@triton.jit
def _activation(b_x, ACTIVATION: tl.constexpr):
    """The activation x s(x), as s and its derivative."""
    if ACTIVATION == "gelu":
        b_s = 0.5 * tl.erf(b_x * _constant(_HALF_ROOT, b_x)) + 0.5
        b_bell = tl.exp(b_x * b_x * -0.5) * _constant(_ROOT, b_x)
        return b_s, tl.where(b_bell == 0, b_s, b_s + b_x * b_bell)
    else:
        if ACTIVATION == "silu":
            b_y = b_x
            b_slope = tl.full(b_x.shape, 1.0, b_x.dtype)
        else:
            cubic = _constant(_CUBIC, b_x)
            linear = _constant(_LINEAR, b_x)
            b_y = b_x * (b_x * b_x * cubic + linear)
            b_slope = b_x * b_x * (3 * cubic) + linear
        b_e = tl.exp(-b_y)
        b_s = 1 / (1 + b_e)
        # e s is 1 - s without what cancels there. Where s is 0 or 1, e and the slope may be inf.
        b_bend = tl.where(b_s == 0, 0.0, b_s * (b_e * b_s))
        return b_s, tl.where(b_bend == 0, b_s, b_s + b_x * b_bend * b_slope)


@triton.jit(do_not_specialize=["C", "stride_g", "stride_v"])
def gated_activation_kernel(
    gate_ptr,  # [N, C]
    value_ptr,  # or None
    out_ptr,  # [N, C]
    C,
    stride_g,
    stride_v,
    ACTIVATION: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    place = tl.program_id(0).to(tl.int64)
    C = multiple(C, FACTOR)
    n = place // tl.cdiv(C, BLOCK)
    places = place % tl.cdiv(C, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    mask = places < C
    p_gate = gate_ptr + n * multiple(stride_g, FACTOR)
    b_x = tl.load(p_gate + places, mask=mask, other=0.0).to(DTYPE)
    b_s, _ = _activation(b_x, ACTIVATION)
    b_out = b_x * b_s
    if value_ptr is not None:
        p_value = value_ptr + n * multiple(stride_v, FACTOR)
        b_out = b_out * tl.load(p_value + places, mask=mask, other=0.0).to(DTYPE)
    tl.store(out_ptr + n * C + places, rounded(b_out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["C", "stride_d", "stride_g", "stride_v", "stride_o"])
def gated_activation_bwd_kernel(
    grad_ptr,  # [N, C]
    gate_ptr,  # [N, C]
    value_ptr,  # or None, like the gradients
    grad_gate_ptr,  # [N, C]
    grad_value_ptr,  # [N, C]
    C,
    stride_d,
    stride_g,
    stride_v,
    stride_o,  # of both gradients
    ACTIVATION: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    place = tl.program_id(0).to(tl.int64)
    C = multiple(C, FACTOR)
    n = place // tl.cdiv(C, BLOCK)
    places = place % tl.cdiv(C, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    mask = places < C
    p_grad = grad_ptr + n * multiple(stride_d, FACTOR)
    p_gate = gate_ptr + n * multiple(stride_g, FACTOR)
    b_grad = tl.load(p_grad + places, mask=mask, other=0.0).to(DTYPE)
    b_x = tl.load(p_gate + places, mask=mask, other=0.0).to(DTYPE)
    b_s, b_derivative = _activation(b_x, ACTIVATION)
    o_out = n * multiple(stride_o, FACTOR) + places
    if grad_value_ptr is not None:
        b_value = rounded(b_grad * (b_x * b_s), grad_value_ptr.dtype.element_ty)
        tl.store(grad_value_ptr + o_out, b_value, mask=mask)
    if grad_gate_ptr is not None:
        if value_ptr is not None:
            p_value = value_ptr + n * multiple(stride_v, FACTOR)
            b_grad *= tl.load(p_value + places, mask=mask, other=0.0).to(DTYPE)
        b_gate = rounded(b_grad * b_derivative, grad_gate_ptr.dtype.element_ty)
        tl.store(grad_gate_ptr + o_out, b_gate, mask=mask)


def _rows(t: Tensor | None) -> Tensor | None:
    """[N, C], the numbers of a row one after another."""
    if t is None:
        return None
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _halves(x: Tensor, value: Tensor | None, layout: str) -> tuple[Tensor, Tensor | None]:
    """Gate and value, of a tensor that holds both."""
    if layout == "gate":
        return x, value
    first, last = x.chunk(2, -1)
    return (first, last) if layout == "gate_value" else (last, first)


def _flat(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All rows as one where none has anything between them."""
    if all(t is None or t.is_contiguous() for t in tensors):
        return tuple(None if t is None else t.view(1, -1) for t in tensors)
    return tensors


def gated_activation(x: Tensor, value: Tensor | None, activation: str, layout: str) -> Tensor:
    """``torch.ops.mmfast.gated_activation`` on checked arguments."""
    gate, value = _halves(x, value, layout)
    out = x.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    rows, of, to = _flat(_rows(gate), _rows(value), _rows(out))
    assert rows is not None
    num, width = rows.shape
    strides = [first_stride(rows), first_stride(of)]
    launch(gated_activation_kernel, (num * ceil_div(width, _BLOCK),),
        rows, of, to, width, *strides, ACTIVATION=activation,
        FACTOR=common_multiple(width, *strides), BLOCK=_BLOCK, **num_threads(128),
    )  # fmt: skip
    return out


def gated_activation_bwd(
    grad: Tensor,
    x: Tensor,
    value: Tensor | None,
    activation: str,
    layout: str,
    want_x: bool,
    want_value: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.gated_activation_bwd`` on checked arguments."""
    gate, value = _halves(x, value, layout)
    grads = [x.new_empty(x.shape if wanted else (0,)) for wanted in (want_x, want_value)]
    if gate.numel() == 0 or not (want_x or want_value):
        return grads[0], grads[1]
    of_gate, of_value = (g if w else None for g, w in zip(grads, (want_x, want_value), strict=True))
    if of_gate is not None:
        of_gate, of_value = _halves(of_gate, of_value, layout)
    tensors = _flat(*map(_rows, (grad, gate, value, of_gate, of_value)))
    rows, out = tensors[1], tensors[4] if tensors[3] is None else tensors[3]
    assert rows is not None
    num, width = rows.shape
    strides = [*map(first_stride, tensors[:3]), first_stride(out)]
    launch(gated_activation_bwd_kernel, (num * ceil_div(width, _BLOCK),),
        *tensors, width, *strides, ACTIVATION=activation,
        FACTOR=common_multiple(width, *strides), BLOCK=_BLOCK, **num_threads(128),
    )  # fmt: skip
    return grads[0], grads[1]


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dtype: torch.dtype, activation: str, quick: bool) -> Variant:
        def launch(n: int, _: int) -> None:
            x = torch.ones(n, 1152, dtype=dtype)
            gated_activation(x, None, activation, "value_gate")
            gated_activation_bwd(x[:, :576], x, None, activation, "value_gate", True, False)

        name = f"gated_activation: {activation}, {dtype}".replace("torch.", "")
        wide = (
            ("gated_activation_kernel", "tl.load(p_gate + places"),
            ("gated_activation_kernel", "tl.load(p_value + places"),
            ("gated_activation_bwd_kernel", "tl.load(p_grad + places"),
        )
        return Variant(name, launch, wide=wide, quick=quick)

    return [
        variant(dtype, activation, quick=dtype == torch.bfloat16 and activation == "gelu_tanh")
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        for activation in ("gelu", "gelu_tanh", "silu")
    ]
