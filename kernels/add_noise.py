"""Noising in Triton: each program does a block of one sample, whose row it looks up.

What has the weight 0 is not loaded. A row that is not there gives NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import (
    add_term,
    ceil_div,
    common_multiple,
    first_stride,
    load_used,
    lying_together,
    multiple,
    num_threads,
    rounded,
)
from mmfast.kernels.launching import launch
from mmfast.kernels.philox import normals_of_sample

_BLOCK = 1024
_COLUMNS = tl.constexpr(5)
_ALPHA = tl.constexpr(0)
_SIGMA = tl.constexpr(1)
_TARGET_X0 = tl.constexpr(2)
_TARGET_NOISE = tl.constexpr(3)
_WEIGHT = tl.constexpr(4)


@triton.jit
def _row(table_ptr, p_time, length):
    """Pointer to a row that is there, and NaN if it is another than was asked for, else 0."""
    time = tl.load(p_time)
    inside = (time >= 0) & (time < length)
    poison = tl.where(inside, 0.0, float("nan")).to(tl.float64)
    return table_ptr + tl.where(inside, time, 0) * _COLUMNS, poison


@triton.jit(
    do_not_specialize=["E", "length", "stride_t", "stride_s", "stride_o", "stride_x", "stride_n"]
)
def add_noise_kernel(
    x_ptr,
    time_ptr,
    table_ptr,
    n_ptr,  # or None, like the seeds and the target
    seed_ptr,
    offset_ptr,
    noisy_ptr,  # [B, E]
    target_ptr,  # [B, E]
    weight_ptr,  # [B]
    E,
    length,
    stride_t,
    stride_s,
    stride_o,
    stride_x,
    stride_n,
    FACTOR: tl.constexpr,
    FOURS: tl.constexpr,  # blocks start at a multiple of four elements of their stream
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    place = tl.program_id(0).to(tl.int64)
    E = multiple(E, FACTOR)
    blocks = tl.maximum(tl.cdiv(E, BLOCK), 1)  # the weights have to be there
    b = place // blocks
    first = place % blocks * BLOCK
    places = first + tl.arange(0, BLOCK)
    mask = places < E
    p_row, poison = _row(table_ptr, time_ptr + b * stride_t, length)
    alpha = tl.load(p_row + _ALPHA) + poison
    sigma = tl.load(p_row + _SIGMA) + poison
    use_x = alpha != 0
    use_n = sigma != 0
    if target_ptr is not None:
        use_x |= tl.load(p_row + _TARGET_X0) != 0
        use_n |= tl.load(p_row + _TARGET_NOISE) != 0
    if first == 0:
        weight = tl.load(p_row + _WEIGHT) + poison
        tl.store(weight_ptr + b, weight.to(weight_ptr.dtype.element_ty))
    b_x = load_used(x_ptr + b * multiple(stride_x, FACTOR), places, mask, use_x, DTYPE)
    if n_ptr is not None:
        b_n = load_used(n_ptr + b * multiple(stride_n, FACTOR), places, mask, use_n, DTYPE)
    else:
        seed = tl.load(seed_ptr + b * stride_s)
        offset = tl.load(offset_ptr + b * stride_o)
        b_n = normals_of_sample(seed, offset, b, stride_s, E, first, BLOCK, FOURS).to(DTYPE)
    b_noisy = add_term(add_term(tl.zeros_like(b_x), alpha, b_x), sigma, b_n)
    o_out = b * E + places
    tl.store(noisy_ptr + o_out, rounded(b_noisy, noisy_ptr.dtype.element_ty), mask=mask)
    if target_ptr is not None:
        b_target = add_term(tl.zeros_like(b_x), tl.load(p_row + _TARGET_X0) + poison, b_x)
        b_target = add_term(b_target, tl.load(p_row + _TARGET_NOISE) + poison, b_n)
        tl.store(target_ptr + o_out, rounded(b_target, target_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["E", "length", "stride_t", "stride_n", "stride_g"])
def add_noise_bwd_kernel(
    noisy_ptr,  # or None, like the target's
    target_ptr,
    time_ptr,
    table_ptr,
    grad_ptr,  # [B, E]
    E,
    length,
    stride_t,
    stride_n,
    stride_g,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    place = tl.program_id(0).to(tl.int64)
    E = multiple(E, FACTOR)
    b = place // tl.cdiv(E, BLOCK)
    places = place % tl.cdiv(E, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    mask = places < E
    p_row, poison = _row(table_ptr, time_ptr + b * stride_t, length)
    b_grad = tl.zeros([BLOCK], DTYPE)
    if noisy_ptr is not None:
        weight = tl.load(p_row + _ALPHA) + poison
        p_n = noisy_ptr + b * multiple(stride_n, FACTOR)
        b_grad = add_term(b_grad, weight, load_used(p_n, places, mask, weight != 0, DTYPE))
    if target_ptr is not None:
        weight = tl.load(p_row + _TARGET_X0) + poison
        p_g = target_ptr + b * multiple(stride_g, FACTOR)
        b_grad = add_term(b_grad, weight, load_used(p_g, places, mask, weight != 0, DTYPE))
    tl.store(grad_ptr + b * E + places, rounded(b_grad, grad_ptr.dtype.element_ty), mask=mask)


def _step(index: Tensor | None, batch: int) -> int:
    """From a sample's entry to the next one's."""
    return index.stride(0) if index is not None and index.dim() and batch > 1 else 0


def add_noise(
    x0: Tensor,
    timesteps: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    want_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.add_noise`` on checked arguments."""
    batch, numbers = x0.shape[0], x0.shape[1:].numel()
    noisy = x0.new_empty(x0.shape)
    target = x0.new_empty(x0.shape if want_target else (0,))
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    weight = x0.new_empty(batch, dtype=wide)
    if batch == 0:
        return noisy, target, weight
    x0 = lying_together(x0, 1)
    noise = None if noise is None else lying_together(noise, 1)
    seed = None if seed is None else seed.contiguous()
    strides = [first_stride(x0), first_stride(noise)]
    launch(add_noise_kernel, (batch * max(1, ceil_div(numbers, _BLOCK)),),
        x0, timesteps, table.contiguous(), noise, seed, offset, noisy,
        target if want_target else None, weight, numbers, table.shape[0],
        _step(timesteps, batch), _step(seed, batch), _step(offset, batch), *strides,
        FACTOR=common_multiple(numbers, *strides),
        FOURS=_step(seed, batch) > 0 or batch == 1 or numbers % 4 == 0, BLOCK=_BLOCK,
        enable_fp_fusion=False, **num_threads(128),
    )  # fmt: skip
    return noisy, target, weight


def add_noise_bwd(
    grad_noisy: Tensor | None, grad_target: Tensor | None, timesteps: Tensor, table: Tensor
) -> Tensor:
    """``torch.ops.mmfast.add_noise_bwd`` on checked arguments."""
    like = grad_noisy if grad_noisy is not None else grad_target
    assert like is not None
    batch, numbers = like.shape[0], like.shape[1:].numel()
    grad = like.new_empty(like.shape)
    if grad.numel() == 0:
        return grad
    grads = [None if g is None else lying_together(g, 1) for g in (grad_noisy, grad_target)]
    strides = [first_stride(g) for g in grads]
    launch(add_noise_bwd_kernel, (batch * ceil_div(numbers, _BLOCK),),
        *grads, timesteps, table.contiguous(), grad, numbers, table.shape[0],
        _step(timesteps, batch), *strides, FACTOR=common_multiple(numbers, *strides),
        BLOCK=_BLOCK, enable_fp_fusion=False, **num_threads(128),
    )  # fmt: skip
    return grad


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dtype: torch.dtype, draws: bool, quick: bool) -> Variant:
        def launch(n: int, _: int) -> None:
            x0, times = torch.ones(n, 64, dtype=dtype), torch.zeros(n, dtype=torch.int64)
            table = torch.ones(9, 5, dtype=torch.float64)
            given = (None, times, times) if draws else (x0, None, None)
            add_noise(x0, times, table, *given, True)
            add_noise_bwd(x0, x0, times, table)

        name = f"add_noise: {dtype}{', drawn' * draws}".replace("torch.", "")
        kernels = ("add_noise_kernel", "add_noise_bwd_kernel")
        return Variant(
            name, launch, wide=tuple((k, "tl.load(pointer + places") for k in kernels), quick=quick
        )

    return [
        variant(dtype, draws, quick=dtype == torch.bfloat16 and draws)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        for draws in (False, True)
    ]
