"""Vector quantisation for training in Triton, and its gradients, around the lookup.

Forward, after the kernels of ``nearest_code``:

1. ``vector_quantize_kernel``: a block of rows takes its codes, counts them with integer atomics,
   and adds its squared errors, which for the Euclidean metric are the distances that the lookup
   found.
2. ``vector_quantize_finish_kernel``: the blocks' errors become the losses, the counts floats.

Backward:

1. ``vector_quantize_row_gradient_kernel``: the gradient of x, a row at a time.
2. Sums of the vectors of each code, and of their gradients, by the kernels of
   ``code_statistics``, in float64: their difference to the code would lose what float32 keeps.
3. ``vector_quantize_code_gradient_kernel``: the codebook's gradient from these sums.

No float is added by an atomic, the order of every sum is written down here, and nothing is read
back to the host.

Workspace, beside that of the other two: 4 bytes per code and 16 per block of rows; backward, for
the codebook's gradient, 8 or 16 bytes per element of the codebook.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import nearest_code as lookup
from mmfast.kernels.code_statistics import segment_sums, sort_by_code
from mmfast.kernels.common import (
    at_most,
    common_multiple,
    multiple,
    num_threads,
    rounded,
    row_sizes,
    strides,
    sum_columns,
    sum_rows,
)

GRADIENTS = {"straight_through": 0, "rotation": 1, "none": 2}
# These decide the order of the sums, and with it the last bits.
_TILE = 2048
_SMALL_TILE = 1024  # where registers are short
_FINISH = 1024

_LEAST_NORM = tl.constexpr(1e-6)


@triton.jit(
    do_not_specialize=[
        "N", "K", "D", "stride_xh", "stride_xn", "stride_ch", "stride_ck", "stride_mh"
    ]
)  # fmt: skip
def vector_quantize_kernel(
    x_ptr,
    code_ptr,
    mask_ptr,
    index_ptr,  # [H, N], becomes -1 where the mask is False
    distance_ptr,  # [H, N] squared, if DISTANCES
    quantized_ptr,  # [H, N, D]
    hit_ptr,  # [H, K] int32
    part_ptr,  # [H, blocks, 2] float64: the sum of the errors, and of how many vectors
    N,
    K,
    D,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ch,
    stride_ck,
    stride_cd,
    stride_mh,
    stride_mn,
    DISTANCES: tl.constexpr,
    MASKED: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    D = multiple(D, FACTOR)
    place = tl.program_id(0).to(tl.int64)
    head = place // tl.cdiv(N, BLOCK_N)
    rows = place % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    m_n = rows < N
    p_index = index_ptr + head * N + rows
    index = tl.load(p_index, mask=m_n, other=0)
    inside = m_n
    if MASKED:
        p_mask = mask_ptr + head * stride_mh + rows * stride_mn
        inside = tl.load(p_mask, mask=m_n, other=0).to(tl.int1)
        tl.store(p_index, tl.full([BLOCK_N], -1, tl.int64), mask=m_n & ~inside)
        number = tl.sum(inside.to(tl.int32)).to(tl.float64)
        tl.store(part_ptr + place * 2 + 1, number)
    tl.atomic_add(hit_ptr + head * K + index, 1, mask=inside, sem="relaxed")
    if DISTANCES:
        b_distance = tl.load(distance_ptr + head * N + rows, mask=inside, other=0.0)
        error = tl.sum(sum_rows(b_distance.to(tl.float64)[:, None]))
        tl.store(part_ptr + place * 2, error)

    rows = rows[:, None]
    m_n = m_n[:, None]
    index = index[:, None]
    inside = inside[:, None]
    p_x = x_ptr + head * multiple(stride_xh, FACTOR) + rows * multiple(stride_xn, FACTOR)
    p_code = code_ptr + head * multiple(stride_ch, FACTOR) + index * multiple(stride_ck, FACTOR)
    b_error = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    for d in range(0, WIDTH, BLOCK_D):
        columns = d + tl.arange(0, BLOCK_D)[None, :]
        m_d = columns < D
        b_code = tl.load(p_code + columns.to(tl.int64) * stride_cd, mask=inside & m_d, other=0.0)
        b_new = rounded(b_code, quantized_ptr.dtype.element_ty)
        if MASKED or not DISTANCES:
            # The masked rows, or all.
            m_x = (m_n if not DISTANCES else m_n & ~inside) & m_d
            b_x = tl.load(p_x + columns.to(tl.int64) * stride_xd, mask=m_x, other=0.0)
            if not DISTANCES:
                b_difference = b_x.to(tl.float64) - b_code.to(tl.float64)
                b_error += tl.where(inside, b_difference * b_difference, 0.0)
            b_new = tl.where(inside, b_new, b_x)
        tl.store(quantized_ptr + (head * N + rows) * D + columns, b_new, mask=m_n & m_d)
    if not DISTANCES:
        tl.store(part_ptr + place * 2, tl.sum(sum_columns(sum_rows(b_error))))


@triton.jit(do_not_specialize=["N", "K", "D", "blocks"])
def vector_quantize_finish_kernel(
    part_ptr,  # [H, blocks, 2]
    hit_ptr,  # [H, K]
    commitment_ptr,  # [H]
    codebook_loss_ptr,  # [H]
    count_ptr,  # [H, K]
    N,
    K,
    D,
    blocks,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64) // tl.cdiv(K, BLOCK)
    tile = tl.program_id(0) % tl.cdiv(K, BLOCK)
    codes = tile * BLOCK + tl.arange(0, BLOCK)
    b_hits = tl.load(hit_ptr + head * K + codes, mask=codes < K, other=0)
    b_counts = b_hits.to(count_ptr.dtype.element_ty)
    tl.store(count_ptr + head * K + codes, b_counts, mask=codes < K)
    if tile == 0:
        b_error = tl.zeros([BLOCK, 1], tl.float64)
        b_number = tl.zeros([BLOCK, 1], tl.float64)
        for first in range(0, blocks, BLOCK):
            o_part = first + tl.arange(0, BLOCK)[:, None]
            p_part = part_ptr + (head * blocks + o_part) * 2
            b_error += tl.load(p_part, mask=o_part < blocks, other=0.0)
            if MASKED:
                b_number += tl.load(p_part + 1, mask=o_part < blocks, other=0.0)
        number = tl.sum(sum_rows(b_number)) if MASKED else N.to(tl.float64)
        loss = tl.sum(sum_rows(b_error)) / tl.maximum(number * D, 1.0)
        tl.store(commitment_ptr + head, loss.to(commitment_ptr.dtype.element_ty))
        tl.store(codebook_loss_ptr + head, loss.to(codebook_loss_ptr.dtype.element_ty))


@triton.jit
def _scale(p_loss, p_total, D):
    """The loss's gradient by a difference: loss_gradient * 2 / (vectors * D), float64."""
    return tl.load(p_loss).to(tl.float64) * (2.0 / tl.maximum(tl.load(p_total) * D, 1.0))


# The functions of _rotation must be exact for x and codes in opposite directions, where their sum
# is zero but for rounding.
@triton.jit
def _divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def _length(b_square):
    """Of rows [BN, BD] with squares b_square, and that or the least divisor."""
    square = sum_columns(b_square)
    length = tl.sqrt(square) if square.dtype == tl.float64 else tl.math.sqrt_rn(square)
    # A comparison keeps NaN.
    return length, tl.where(length < _LEAST_NORM, _LEAST_NORM, length)


@triton.jit(
    do_not_specialize=[
        "N", "K", "D", "stride_gh", "stride_gn", "stride_xh", "stride_xn", "stride_ch",
        "stride_ck", "stride_ih", "stride_lh",
    ]
)  # fmt: skip
def vector_quantize_row_gradient_kernel(
    grad_ptr,  # of the quantised vectors, if PASSED
    loss_ptr,  # gradient of the commitment loss, if LOSS
    x_ptr,
    code_ptr,
    index_ptr,
    total_ptr,  # [H] float64, vectors inside
    grad_x_ptr,  # [H, N, D]
    N,
    K,
    D,
    stride_gh,
    stride_gn,
    stride_gd,
    stride_lh,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ch,
    stride_ck,
    stride_cd,
    stride_ih,
    stride_in,
    GRADIENT: tl.constexpr,
    PASSED: tl.constexpr,
    LOSS: tl.constexpr,
    WIDE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    ROTATE: tl.constexpr = PASSED and GRADIENT == 1
    D = multiple(D, FACTOR)
    place = tl.program_id(0).to(tl.int64)
    head = place // tl.cdiv(N, BLOCK_N)
    rows = place % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    p_index = index_ptr + head * stride_ih + rows * stride_in
    index = tl.load(p_index, mask=rows < N, other=-1).to(tl.int64)[:, None]
    inside = (index >= 0) & (index < K)
    rows = rows[:, None]
    m_n = rows < N
    p_grad = grad_ptr + head * multiple(stride_gh, FACTOR) + rows * multiple(stride_gn, FACTOR)
    p_x = x_ptr + head * multiple(stride_xh, FACTOR) + rows * multiple(stride_xn, FACTOR)
    p_code = code_ptr + head * multiple(stride_ch, FACTOR) + index * multiple(stride_ck, FACTOR)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    if ROTATE:
        b_xx = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        b_qq = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        for d in range(0, WIDTH, BLOCK_D):
            columns = (d + o_d).to(tl.int64)
            mask = inside & (columns < D)
            b_x = tl.load(p_x + columns * stride_xd, mask=mask, other=0.0).to(dtype)
            b_q = tl.load(p_code + columns * stride_cd, mask=mask, other=0.0).to(dtype)
            b_xx += b_x * b_x
            b_qq += b_q * b_q
        _, length_x = _length(b_xx)
        norm_q, length_q = _length(b_qq)
        b_ww = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        b_wg = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        b_qg = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        for d in range(0, WIDTH, BLOCK_D):
            columns = (d + o_d).to(tl.int64)
            mask = inside & (columns < D)
            b_x = tl.load(p_x + columns * stride_xd, mask=mask, other=0.0).to(dtype)
            b_q = tl.load(p_code + columns * stride_cd, mask=mask, other=0.0).to(dtype)
            b_grad = tl.load(p_grad + columns * stride_gd, mask=m_n & (columns < D), other=0.0)
            b_grad = b_grad.to(dtype)
            b_q = _divide(b_q, length_q)
            b_w = _divide(b_x, length_x) + b_q
            b_ww += b_w * b_w
            b_wg += b_w * b_grad
            b_qg += b_q * b_grad
        _, length_w = _length(b_ww)
        along_w = 2 * _divide(_divide(sum_columns(b_wg), length_w), length_w)
        along_q = 2 * sum_columns(b_qg)
        stretch = _divide(norm_q, length_x)
    if LOSS:
        scale = _scale(loss_ptr + head * stride_lh, total_ptr + head, D).to(dtype)
    for d in range(0, WIDTH, BLOCK_D):
        columns = (d + o_d).to(tl.int64)
        mask = inside & (columns < D)
        m_d = m_n & (columns < D)
        b_passed = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        if PASSED:
            b_passed = tl.load(p_grad + columns * stride_gd, mask=m_d, other=0.0).to(dtype)
        b_result = b_passed
        if GRADIENT == 2:
            b_result = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        if LOSS or ROTATE:
            b_x = tl.load(p_x + columns * stride_xd, mask=mask, other=0.0).to(dtype)
            b_q = tl.load(p_code + columns * stride_cd, mask=mask, other=0.0).to(dtype)
            if ROTATE:
                b_e = _divide(b_x, length_x)
                b_w = b_e + _divide(b_q, length_q)
                b_result = stretch * (b_passed - along_w * b_w + along_q * b_e)
            if LOSS:
                b_result += scale * (b_x - b_q)
        b_result = rounded(tl.where(inside, b_result, b_passed), grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + (head * N + rows) * D + columns, b_result, mask=m_d)


@triton.jit(do_not_specialize=["K", "D", "stride_ch", "stride_ck", "stride_nh", "stride_lh"])
def vector_quantize_code_gradient_kernel(
    loss_ptr,  # gradient of the codebook loss, if LOSS
    code_ptr,
    count_ptr,
    total_ptr,  # [H] float64, vectors inside
    sum_ptr,  # [H, K, D] float64 sums of x, if LOSS
    passed_ptr,  # [H, K, D] float64 sums of gradients, if PASSED
    grad_ptr,  # [H, K, D]
    K,
    D,
    stride_lh,
    stride_ch,
    stride_ck,
    stride_cd,
    stride_nh,
    stride_nk,
    PASSED: tl.constexpr,
    LOSS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    D = multiple(D, FACTOR)
    place = tl.program_id(0).to(tl.int64)
    head = place // tl.cdiv(K, BLOCK_N)
    codes = place % tl.cdiv(K, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    if LOSS:
        p_count = count_ptr + head * stride_nh + codes * stride_nk
        b_count = tl.load(p_count, mask=codes < K, other=0.0)
        scale = _scale(loss_ptr + head * stride_lh, total_ptr + head, D)
    codes = codes[:, None]
    m_k = codes < K
    p_code = code_ptr + head * multiple(stride_ch, FACTOR) + codes * multiple(stride_ck, FACTOR)
    for d in range(0, WIDTH, BLOCK_D):
        columns = (d + tl.arange(0, BLOCK_D)[None, :]).to(tl.int64)
        m_d = m_k & (columns < D)
        there = (head * K + codes) * D + columns
        b_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
        if PASSED:
            b_grad += tl.load(passed_ptr + there, mask=m_d, other=0.0)
        if LOSS:
            b_code = tl.load(p_code + columns * stride_cd, mask=m_d, other=0.0).to(tl.float64)
            b_sum = tl.load(sum_ptr + there, mask=m_d, other=0.0)
            b_grad += scale * (b_count.to(tl.float64)[:, None] * b_code - b_sum)
        tl.store(grad_ptr + there, rounded(b_grad, grad_ptr.dtype.element_ty), mask=m_d)


def _heads(codebook: Tensor) -> Tensor:
    """The codebook as (H, K, D)."""
    return codebook if codebook.dim() == 3 else codebook[None]


def _factor(num_dims: int, *tensors: Tensor) -> int:
    """What D and the strides of heads and rows are multiples of."""
    return common_multiple(num_dims, *(n for t in tensors for n in strides(t)[:2]))


def vector_quantize(
    x: Tensor, codebook: Tensor, metric: str, gradient: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.vector_quantize`` on checked arguments."""
    indices, distances = lookup.nearest_code(x, codebook, metric)
    found = _quantize(x, codebook, indices, distances, metric == "euclidean", mask)
    quantized, commitment, codebook_loss, counts = found
    return quantized, indices, commitment, codebook_loss, counts


def _quantize(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    distances: Tensor,
    squared: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantised vectors, both losses and counts, of found ``indices``, which it masks.

    Args:
        squared: whether ``distances`` are the squared ones.
    """
    codes = _heads(codebook)
    num_heads, num_codes, num_dims = codes.shape
    quantized = x.new_empty(x.shape)
    losses = [x.new_empty(codebook.shape[:-2], dtype=distances.dtype) for _ in range(2)]
    counts = x.new_empty(codebook.shape[:-1], dtype=distances.dtype)
    if indices.numel() == 0:
        return quantized, losses[0].zero_(), losses[1].zero_(), counts.zero_()
    rows = x.reshape(num_heads, -1, num_dims)  # [H, N, D]
    num_rows = rows.shape[1]
    # Without a mask any tensor, which is not read.
    inside = (indices if mask is None else mask).reshape(num_heads, num_rows)
    sizes = row_sizes(num_dims, _SMALL_TILE if distances.dtype == torch.float64 else _TILE)
    blocks = triton.cdiv(num_rows, sizes["BLOCK_N"])
    hits = x.new_zeros((num_heads, num_codes), dtype=torch.int32)
    parts = x.new_empty((num_heads, blocks, 2), dtype=torch.float64)
    vector_quantize_kernel[(num_heads * blocks,)](
        rows, codes, inside, indices, distances, quantized, hits, parts, num_rows, num_codes,
        num_dims, *strides(rows), *strides(codes), *strides(inside),
        DISTANCES=squared, MASKED=mask is not None,
        FACTOR=_factor(num_dims, rows, codes), **sizes, enable_fp_fusion=False,
        **num_threads(128), **at_most(128),
    )  # fmt: skip
    vector_quantize_finish_kernel[(num_heads * triton.cdiv(num_codes, _FINISH),)](
        parts, hits, *losses, counts, num_rows, num_codes, num_dims, blocks,
        MASKED=mask is not None, BLOCK=_FINISH, enable_fp_fusion=False,
    )  # fmt: skip
    return quantized, *losses, counts


def vector_quantize_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    codebook_loss: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    counts: Tensor,
    gradient: str,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.vector_quantize_bwd`` on checked arguments."""
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_codebook = codebook.new_empty(codebook.shape if need_codebook else (0,))
    if indices.numel() == 0:
        return grad_x, grad_codebook.zero_()
    codes = _heads(codebook)
    num_heads, num_codes, num_dims = codes.shape
    rows = x.reshape(num_heads, -1, num_dims)  # [H, N, D]
    num_rows = rows.shape[1]
    places = indices.reshape(num_heads, num_rows)
    per_code = counts.reshape(num_heads, num_codes)
    # Sums of integers, the same in any order.
    totals = per_code.sum(1, dtype=torch.float64)  # [H]
    # In place of what is not there any tensor, which is not read.
    passed = rows if quantized is None else quantized.reshape(rows.shape)
    if need_x:
        loss = totals if commitment is None else commitment.reshape(-1)
        wide = torch.float64 in (x.dtype, codebook.dtype)
        sizes = row_sizes(num_dims, _SMALL_TILE)
        vector_quantize_row_gradient_kernel[
            (num_heads * triton.cdiv(num_rows, sizes["BLOCK_N"]),)
        ](
            passed, loss, rows, codes, places, totals, grad_x, num_rows, num_codes, num_dims,
            *strides(passed), *strides(loss), *strides(rows), *strides(codes), *strides(places),
            GRADIENT=GRADIENTS[gradient], PASSED=quantized is not None,
            LOSS=commitment is not None, WIDE=wide,
            FACTOR=_factor(num_dims, passed, rows, codes), **sizes, enable_fp_fusion=False,
            **num_threads(128), **at_most(255),
        )  # fmt: skip
    if need_codebook:
        loss = totals if codebook_loss is None else codebook_loss.reshape(-1)
        summed = gradient == "none" and quantized is not None
        of_x = of_gradients = totals
        if summed or codebook_loss is not None:
            by_code = sort_by_code(places, num_codes)
            if summed:
                _, of_gradients = segment_sums(passed, by_code, None, torch.float64)
            if codebook_loss is not None:
                _, of_x = segment_sums(rows, by_code, None, torch.float64)
        sizes = row_sizes(num_dims, _SMALL_TILE)
        vector_quantize_code_gradient_kernel[
            (num_heads * triton.cdiv(num_codes, sizes["BLOCK_N"]),)
        ](
            loss, codes, per_code, totals, of_x, of_gradients, grad_codebook, num_codes,
            num_dims, *strides(loss), *strides(codes), *strides(per_code), PASSED=summed,
            LOSS=codebook_loss is not None, FACTOR=_factor(num_dims, codes), **sizes,
            enable_fp_fusion=False, **num_threads(128), **at_most(128),
        )  # fmt: skip
    return grad_x, grad_codebook


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(
        dims: int, dtype: torch.dtype, metric: str, gradient: str, masked: bool, quick: bool
    ) -> Variant:
        def launch(n: int, k: int) -> None:
            x, codebook = (torch.ones(rows, dims, dtype=dtype) for rows in (n, k))
            mask = torch.ones(n, dtype=torch.bool) if masked else None
            indices = torch.zeros(n, dtype=torch.int64)
            distances = torch.ones(n, dtype=torch.promote_types(dtype, torch.float32))
            output = _quantize(x, codebook, indices, distances, metric == "euclidean", mask)
            _, commitment, codebook_loss, counts = output
            vector_quantize_bwd(
                x, commitment, codebook_loss, x, codebook, indices, counts, gradient, True, True
            )

        name = f"{metric}, {gradient}{', masked' * masked}, {dtype}, D {dims}"
        return Variant(
            f"vector_quantize: {name}".replace("torch.", ""),
            launch,
            wide=wide if dims % 8 == 0 else (),
            quick=quick,
        )

    wide = (
        ("vector_quantize_kernel", "b_code = tl.load("),
        ("vector_quantize_row_gradient_kernel", "b_q = tl.load("),
        ("vector_quantize_row_gradient_kernel", "tl.load(p_grad"),
    )
    kinds = (
        ("euclidean", "straight_through", False),
        ("dot", "rotation", True),
        ("euclidean", "none", True),
    )
    some = {(24, torch.float32, "rotation"), (64, torch.bfloat16, "none")}
    return [
        variant(d, t, m, g, masked, (d, t, g) in some)
        for m, g, masked in kinds
        for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        for d in (1, 7, 24, 64, 256, 520)
    ]
