"""Exponential moving averages of a codebook in Triton, in place.

1. ``ema_update_size_kernel``: the new sizes, and their sum over each block of codes.
2. ``ema_update_kernel``: the total of these sums, and with it the new sums and codes, a row at a
   time. Tiles have at least a number for each thread: nobody reads what another has written.

Everything is float64, rounded once: the kernels wait for memory. The order of the sums is fixed.

Workspace: 8 bytes per code, the new sizes before they are rounded, and per 1024 codes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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

# These decide the order of the sums, and with it the last bits.
_SIZES = 1024
_TILE = 1024

_LEAST_NORM = tl.constexpr(1e-6)


@triton.jit
def _lerp(start, end, weight):
    """In the order in which torch.lerp computes it, which is exact at both ends."""
    start = start.to(tl.float64)
    end = end.to(tl.float64)
    weight = tl.full([], weight, tl.float64)
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - (1 - weight) * difference)


@triton.jit(do_not_specialize=["K", "stride_sh", "stride_nh"])
def ema_update_size_kernel(
    size_ptr,  # changed
    count_ptr,
    new_ptr,  # [H, K] float64
    part_ptr,  # [H, blocks] float64
    K,
    decay: tl.float64,
    stride_sh,
    stride_sk,
    stride_nh,
    stride_nk,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    head = place // tl.cdiv(K, BLOCK)
    codes = place % tl.cdiv(K, BLOCK) * BLOCK + tl.arange(0, BLOCK)[:, None]  # [B, 1]
    m_k = codes < K
    b_count = tl.load(count_ptr + head * stride_nh + codes * stride_nk, mask=m_k, other=0.0)
    p_size = size_ptr + head * stride_sh + codes * stride_sk
    b_size = _lerp(b_count, tl.load(p_size, mask=m_k, other=0.0), decay)
    tl.store(p_size, rounded(b_size, size_ptr.dtype.element_ty), mask=m_k)
    tl.store(new_ptr + head * K + codes, b_size, mask=m_k)
    tl.store(part_ptr + place, tl.sum(sum_rows(b_size)))


@triton.jit(
    do_not_specialize=[
        "K", "D", "blocks", "stride_ch", "stride_ck", "stride_eh", "stride_ek", "stride_bh",
        "stride_bk",
    ]
)  # fmt: skip
def ema_update_kernel(
    code_ptr,  # changed
    embed_ptr,  # changed
    sum_ptr,
    size_ptr,  # [H, K] float64
    part_ptr,  # [H, blocks] float64
    K,
    D,
    blocks,
    decay: tl.float64,
    eps: tl.float64,
    stride_ch,
    stride_ck,
    stride_cd,
    stride_eh,
    stride_ek,
    stride_ed,
    stride_bh,
    stride_bk,
    stride_bd,
    NORMALIZE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    D = multiple(D, FACTOR)
    place = tl.program_id(0).to(tl.int64)
    head = place // tl.cdiv(K, BLOCK_N)
    codes = place % tl.cdiv(K, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BN, 1]
    m_k = codes < K
    b_parts = tl.zeros([BLOCK, 1], tl.float64)
    for first in range(0, blocks, BLOCK):
        o_part = first + tl.arange(0, BLOCK)[:, None]
        b_parts += tl.load(part_ptr + head * blocks + o_part, mask=o_part < blocks, other=0.0)
    total = tl.sum(sum_rows(b_parts))

    b_size = tl.load(size_ptr + head * K + codes, mask=m_k, other=1.0)
    eps = tl.full([], eps, tl.float64)
    smooth = (b_size + eps) / (total + K * eps) * total  # [BN, 1]
    # Nothing was ever counted: the codes stay.
    counted = total > 0
    smooth = tl.where(counted, smooth, 1.0)

    p_code = code_ptr + head * multiple(stride_ch, FACTOR) + codes * multiple(stride_ck, FACTOR)
    p_embed = embed_ptr + head * multiple(stride_eh, FACTOR) + codes * multiple(stride_ek, FACTOR)
    p_sum = sum_ptr + head * multiple(stride_bh, FACTOR) + codes * multiple(stride_bk, FACTOR)
    length = tl.full([BLOCK_N, 1], 1.0, tl.float64)
    if NORMALIZE:
        b_square = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
        for d in range(0, WIDTH, BLOCK_D):
            b_code, _ = _moved(
                p_code, p_embed, p_sum, d + tl.arange(0, BLOCK_D)[None, :], m_k, D, stride_cd,
                stride_ed, stride_bd, decay, smooth, counted,
            )  # fmt: skip
            b_square += b_code * b_code
        length = tl.sqrt(sum_columns(b_square))
        # Not tl.maximum, which loses NaN.
        length = tl.where(length < _LEAST_NORM, _LEAST_NORM, length)
    for d in range(0, WIDTH, BLOCK_D):
        columns = d + tl.arange(0, BLOCK_D)[None, :]
        b_code, b_embed = _moved(
            p_code, p_embed, p_sum, columns, m_k, D, stride_cd, stride_ed, stride_bd, decay,
            smooth, counted,
        )  # fmt: skip
        if NORMALIZE:
            b_code /= length
        m_d = m_k & (columns < D)
        columns = columns.to(tl.int64)
        b_embed = rounded(b_embed, embed_ptr.dtype.element_ty)
        tl.store(p_embed + columns * stride_ed, b_embed, mask=m_d)
        b_code = rounded(b_code, code_ptr.dtype.element_ty)
        tl.store(p_code + columns * stride_cd, b_code, mask=m_d)


@triton.jit
def _moved(
    p_code, p_embed, p_sum, columns, m_k, D, stride_cd, stride_ed, stride_bd, decay, smooth, counted
):
    """New codes and their sums, float64, [BN, BD]."""
    m_d = m_k & (columns < D)
    columns = columns.to(tl.int64)
    b_sum = tl.load(p_sum + columns * stride_bd, mask=m_d, other=0.0)
    b_embed = tl.load(p_embed + columns * stride_ed, mask=m_d, other=0.0)
    b_embed = _lerp(b_sum, b_embed, decay)
    m_old = m_d & (counted == 0)
    b_old = tl.load(p_code + columns * stride_cd, mask=m_old, other=0.0).to(tl.float64)
    return tl.where(counted, b_embed / smooth, b_old), b_embed


def ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> None:
    """``torch.ops.mmfast.ema_update`` on checked arguments."""
    if cluster_size.numel() == 0:
        return
    tensors = (codebook, cluster_size, embed_sum, counts, sums)
    if codebook.dim() == 2:
        tensors = tuple(t[None] for t in tensors)  # type: ignore[assignment]
    codes, size, embed, count, total = tensors
    num_heads, num_codes, num_dims = codes.shape
    blocks = triton.cdiv(num_codes, _SIZES)
    new_size = codes.new_empty((num_heads, num_codes), dtype=torch.float64)
    parts = codes.new_empty((num_heads, blocks), dtype=torch.float64)
    ema_update_size_kernel[(num_heads * blocks,)](
        size, count, new_size, parts, num_codes, decay, *strides(size), *strides(count),
        BLOCK=_SIZES, enable_fp_fusion=False,
    )  # fmt: skip
    steps = [strides(t) for t in (codes, embed, total)]
    rows = [n for s in steps for n in s[:2]]
    sizes = row_sizes(num_dims, _TILE)
    ema_update_kernel[(num_heads * triton.cdiv(num_codes, sizes["BLOCK_N"]),)](
        codes, embed, total, new_size, parts, num_codes, num_dims, blocks, decay, eps,
        *(n for s in steps for n in s), NORMALIZE=normalize,
        FACTOR=common_multiple(num_dims, *rows), BLOCK=_SIZES, **sizes, enable_fp_fusion=False,
        **num_threads(128), **at_most(255),
    )  # fmt: skip


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dims: int, dtype: torch.dtype, normalize: bool, quick: bool) -> Variant:
        def launch(_: int, k: int) -> None:
            codes, size = torch.ones(k, dims, dtype=dtype), torch.ones(k, dtype=dtype)
            ema_update(codes, size, codes, size, codes, 0.8, 1e-5, normalize)

        return Variant(
            f"ema_update: {dtype}{', normalize' * normalize}, D {dims}".replace("torch.", ""),
            launch,
            wide=(("ema_update_kernel", "b_embed = tl.load("),) if dims % 8 == 0 else (),
            quick=quick,
        )

    some = {(torch.float32, False, 64), (torch.float32, True, 24)}
    return [
        variant(d, t, n, (t, n, d) in some)
        for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        for n in (False, True)
        for d in (1, 7, 24, 64, 256, 512)
    ]
