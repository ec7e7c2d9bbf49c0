"""Residual quantisation in Triton: nearest_code for each stage, and one pass over the residuals.

1. ``nearest_code`` of the residuals, which are x at first.
2. ``residual_quantize_stage_kernel``: subtracts the chosen codes from the residuals, sums their
   squares in float64, a number for each block of rows, counts the codes in integers, and writes
   the indices.
3. ``residual_quantize_sum_kernel``: after the last stage, the sum of each vector's codes.
4. ``residual_quantize_bwd_kernel``: makes the residual of a stage again and adds it to the gradient
   of x. ``code_statistics`` of these residuals is the gradient of the stage's codes.

No result depends on the order of atomics: only integers are added by them. Nothing is read back to
the host. Workspace: the residuals, 4 bytes per vector and stage, and nearest_code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.code_statistics import code_statistics
from mmfast.kernels.common import interpreting
from mmfast.kernels.nearest_code import nearest_code

_TILE = 2048  # elements that a program has at a time
_WIDEST = 128  # columns of them
_MOST_ROWS = 256


@triton.jit(do_not_specialize=["N", "Q", "K", "q", "start"])
def residual_quantize_stage_kernel(
    x_ptr,  # [N, D] the residuals before this stage
    code_ptr,  # [codes of all stages, D]
    nearest_ptr,  # [N]
    mask_ptr,  # [N] bytes
    residual_ptr,  # [N, D] the residuals after it
    index_ptr,  # [N, Q]
    place_ptr,  # [N, Q] the chosen codes' rows among all
    square_ptr,  # [Q, blocks of rows] float64
    count_ptr,  # [Q, K] int32
    N,
    Q,
    K,
    D,
    q,
    start,
    stride_xn,
    stride_xd,
    stride_ck,
    stride_cd,
    MASKED: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    m_n = rows < N
    nearest = tl.load(nearest_ptr + rows, mask=m_n, other=0)
    inside = m_n
    if MASKED:
        inside = m_n & (tl.load(mask_ptr + rows, mask=m_n, other=0) != 0)
    place = start + nearest
    tl.store(index_ptr + rows * Q + q, tl.where(inside, nearest, -1), mask=m_n)
    tl.store(place_ptr + rows * Q + q, tl.where(inside, place, -1).to(tl.int32), mask=m_n)
    tl.atomic_add(count_ptr + q * K + nearest, inside.to(tl.int32), mask=inside, sem="relaxed")
    total = tl.zeros([BLOCK_N], tl.float64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m = m_n[:, None] & (o_d < D)[None, :]
        b_r = _left(x_ptr, code_ptr, residual_ptr, rows, place, o_d, m, stride_xn, stride_xd,
                    stride_ck, stride_cd)  # fmt: skip
        if STORE:
            tl.store(residual_ptr + rows[:, None] * D + o_d[None, :], b_r, mask=m)
        b_wide = b_r.to(tl.float64)
        total += tl.sum(b_wide * b_wide, 1)
    tl.store(square_ptr + q * tl.num_programs(0) + block, tl.sum(tl.where(inside, total, 0.0), 0))


@triton.jit
def _left(
    x_ptr, code_ptr, residual_ptr, rows, place, o_d, m, stride_xn, stride_xd, stride_ck, stride_cd,
):  # fmt: skip
    """Residuals less their codes, in the dtype of residual_ptr."""
    o_d = o_d[None, :].to(tl.int64)
    b_x = tl.load(x_ptr + rows[:, None] * stride_xn + o_d * stride_xd, mask=m, other=0.0)
    b_c = tl.load(code_ptr + place[:, None] * stride_ck + o_d * stride_cd, mask=m, other=0.0)
    dtype = residual_ptr.dtype.element_ty
    return b_x.to(dtype) - b_c.to(dtype)


@triton.jit(do_not_specialize=["N", "Q"])
def residual_quantize_sum_kernel(
    x_ptr,  # [N, D]
    code_ptr,
    place_ptr,  # [N, Q], -1 for vectors that pass
    quantized_ptr,  # [N, D]
    N,
    Q,
    D,
    stride_xn,
    stride_xd,
    stride_ck,
    stride_cd,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    o_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :].to(tl.int64)
    m_n = rows < N
    m = m_n[:, None] & (o_d < D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64 if WIDE else tl.float32)
    for q in range(0, Q):
        place = tl.load(place_ptr + rows * Q + q, mask=m_n, other=0).to(tl.int64)
        p_c = code_ptr + tl.maximum(place, 0)[:, None] * stride_ck + o_d * stride_cd
        total += tl.load(p_c, mask=m, other=0.0).to(total.dtype)
    if MASKED:
        place = tl.load(place_ptr + rows * Q, mask=m_n, other=0)
        b_x = tl.load(x_ptr + rows[:, None] * stride_xn + o_d * stride_xd, mask=m, other=0.0)
        total = tl.where((place >= 0)[:, None], total, b_x.to(total.dtype))
    total = total.to(quantized_ptr.dtype.element_ty)
    tl.store(quantized_ptr + rows[:, None] * D + o_d, total, mask=m)


@triton.jit(do_not_specialize=["N", "Q", "q", "start"])
def residual_quantize_bwd_kernel(
    x_ptr,  # [N, D] the residuals before this stage
    code_ptr,
    index_ptr,  # [N, Q]
    scale_ptr,  # [Q] of the residuals in the gradient
    residual_ptr,  # [N, D] the residuals after it
    grad_ptr,  # [N, D] of x
    N,
    Q,
    D,
    q,
    start,
    stride_xn,
    stride_xd,
    stride_ck,
    stride_cd,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n = rows < N
    m = m_n[:, None] & (o_d < D)[None, :]
    index = tl.load(index_ptr + rows * Q + q, mask=m_n, other=0)
    place = start + tl.maximum(index, 0)
    b_r = _left(x_ptr, code_ptr, residual_ptr, rows, place, o_d, m, stride_xn, stride_xd,
                stride_ck, stride_cd)  # fmt: skip
    at = rows[:, None] * D + o_d[None, :]
    tl.store(residual_ptr + at, b_r, mask=m)
    if ADD:
        m = m & (index >= 0)[:, None]
        b_grad = tl.load(grad_ptr + at, mask=m, other=0.0) + tl.load(scale_ptr + q) * b_r
        tl.store(grad_ptr + at, b_grad, mask=m)


def _blocks(num_dims: int) -> dict[str, int]:
    """Compile-time sizes; functions of D alone."""
    block_d = min(triton.next_power_of_2(num_dims), _WIDEST)
    return {"BLOCK_N": min(_TILE // block_d, _MOST_ROWS), "BLOCK_D": block_d}


def _starts(sizes: Sequence[int], shared: bool) -> list[int]:
    """Where the codes of each stage begin."""
    return [0 if shared else sum(sizes[:q]) for q in range(len(sizes))]


def residual_quantize(
    x: Tensor,
    codes: Tensor,
    sizes: list[int],
    shared: bool,
    metric: str,
    gradient: str,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.residual_quantize`` on checked arguments."""
    num_dims, num_stages = x.shape[-1], len(sizes)
    wide = torch.float64 in (x.dtype, codes.dtype)
    dtype = torch.float64 if wide else torch.float32
    rows = x.reshape(-1, num_dims)  # [N, D]
    num_rows = rows.shape[0]
    indices = x.new_empty((*x.shape[:-1], num_stages), dtype=torch.int64)
    # The interpreter would cut off bits where a device rounds to bfloat16.
    quantized = x.new_empty(x.shape, dtype=dtype if interpreting() else x.dtype)
    losses = x.new_zeros(num_stages, dtype=dtype)
    counts = x.new_zeros((num_stages, max(sizes)), dtype=torch.int32)
    if num_rows == 0:
        return quantized.to(x.dtype), indices, losses, losses.clone(), counts.to(dtype)
    sizes_of_blocks = _blocks(num_dims)
    blocks = triton.cdiv(num_rows, sizes_of_blocks["BLOCK_N"])
    residual = x.new_empty(rows.shape, dtype=dtype)
    places = x.new_empty((num_rows, num_stages), dtype=torch.int32)
    squares = x.new_empty((num_stages, blocks), dtype=torch.float64)
    flags = indices if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)
    options = {"MASKED": mask is not None, **sizes_of_blocks, "enable_fp_fusion": False}
    source = rows
    for q, start in enumerate(_starts(sizes, shared)):
        nearest, _ = nearest_code(source, codes[start : start + sizes[q]], metric)
        residual_quantize_stage_kernel[(blocks,)](
            source, codes, nearest, flags, residual, indices, places, squares, counts, num_rows,
            num_stages, counts.shape[1], num_dims, q, start, *source.stride(), *codes.stride(),
            STORE=q < num_stages - 1, num_warps=8, **options,
        )  # fmt: skip
        source = residual
    residual_quantize_sum_kernel[(blocks, triton.cdiv(num_dims, sizes_of_blocks["BLOCK_D"]))](
        rows, codes, places, quantized, num_rows, num_stages, num_dims, *rows.stride(),
        *codes.stride(), WIDE=wide, **options,
    )  # fmt: skip
    number = counts[0].sum() * num_dims  # of the elements that count
    losses = (squares.sum(1) / number.clamp_min(1)).to(dtype)
    return quantized.to(x.dtype), indices, losses, losses.clone(), counts.to(dtype)


def residual_quantize_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    codebook_losses: Tensor | None,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    sizes: list[int],
    shared: bool,
    gradient: str,
    need_x: bool,
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.residual_quantize_bwd`` on checked arguments."""
    num_dims, num_stages = x.shape[-1], len(sizes)
    dtype = torch.float64 if torch.float64 in (x.dtype, codes.dtype) else torch.float32
    rows = x.reshape(-1, num_dims)  # [N, D]
    num_rows = rows.shape[0]
    index = indices.reshape(num_rows, num_stages).contiguous()
    inside = index[:, 0] >= 0
    factor = 2 / (inside.sum() * num_dims).clamp_min(1).double()
    grad_x = x.new_zeros(rows.shape, dtype=dtype)
    passed = grad_x if quantized is None else quantized.reshape(rows.shape)
    if quantized is not None:
        keep = inside.new_ones(()) if gradient == "straight_through" else ~inside
        grad_x = torch.where(keep[..., None], passed.to(dtype), grad_x)
    grad_codes = codes.new_zeros(codes.shape if need_codes else 0, dtype=torch.float64)
    residual = x.new_empty(rows.shape, dtype=dtype)
    source = rows
    blocks = _blocks(num_dims)
    grid = triton.cdiv(num_rows, blocks["BLOCK_N"]), triton.cdiv(num_dims, blocks["BLOCK_D"])
    add = need_x and commitment is not None
    scales = (commitment.double() * factor).to(dtype) if add else residual
    for q, start in enumerate(_starts(sizes, shared) if num_rows else []):
        residual_quantize_bwd_kernel[grid](
            source, codes, index, scales, residual, grad_x, num_rows, num_stages, num_dims, q,
            start, *source.stride(), *codes.stride(), ADD=add, **blocks,
        )  # fmt: skip
        source = residual
        if not need_codes:
            continue
        stage = grad_codes[start : start + sizes[q]]
        if codebook_losses is not None:
            _, sums = code_statistics(residual, index[:, q], sizes[q], None)
            stage -= codebook_losses[q].double() * factor * sums
        if gradient == "none" and quantized is not None:
            stage += code_statistics(passed, index[:, q], sizes[q], None)[1]
    grad_x = grad_x.view(x.shape) if need_x else grad_x.new_empty(0)
    return grad_x.to(x.dtype), grad_codes.to(codes.dtype)


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dims: int, dtype: torch.dtype, masked: bool, quick: bool) -> Variant:
        def launch(n: int, k: int) -> None:
            x, codes = torch.ones(n, dims, dtype=dtype), torch.ones(2 * k, dims, dtype=dtype)
            mask = torch.ones(n, dtype=torch.bool) if masked else None
            residual_quantize(x, codes, [k, k], False, "euclidean", "none", mask)
            losses = torch.ones(2, dtype=torch.float32)
            index = torch.zeros(n, 2, dtype=torch.int64)
            residual_quantize_bwd(
                x, losses, None, x, codes, index, [k, k], False, "none", True, False
            )

        return Variant(
            f"residual_quantize: {dtype}{', masked' * masked}, D {dims}".replace("torch.", ""),
            launch,
            wide=wide if dims % 16 == 0 and dtype.itemsize > 2 else (),
            quick=quick,
        )

    kernels = ("residual_quantize_stage_kernel", "residual_quantize_bwd_kernel")
    wide = tuple((kernel, "b_x = tl.load(") for kernel in kernels)
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    some = {(torch.float32, True, 128)}
    return [
        variant(d, t, m, (t, m, d) in some)
        for t in floats
        for m in (False, True)
        for d in (1, 7, 32, 128, 256)
    ]
