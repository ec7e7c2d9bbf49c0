"""Counts and sums of the vectors of each code in Triton: sort by code, then sum each segment.

1. ``code_statistics_key_kernel``: the sort keys. Indices outside [0, K) become K, the last of all.
   Keys are as narrow as K allows, since a radix sort has a pass per byte. ``torch.sort``, stable,
   gives the order of the vectors, and ``torch.searchsorted`` where each code starts in it.
2. ``code_statistics_chunk_kernel``: the order is cut into chunks of 256 vectors. Chunks of a single
   code are summed, so that a code with most of the vectors keeps the whole device busy.
3. ``code_statistics_kernel``: a code at a time, the sums of its whole chunks and its vectors in
   front of and behind them. That is less than two chunks of vectors, for any code.

Each vector is read once. Sums are float64, rounded once: an addition per element costs little
beside reading it. Their order is written down here, and depends neither on the device nor on
strides nor on other heads. There are no atomics, and nothing is read back to the host.

Workspace: per vector two keys of 2 to 8 bytes, 8 bytes for its place, and what ``torch.sort``
wants; at most 24 bytes per code; 8 * (D + 1) bytes per 256 vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import strides, sum_rows, tile_sizes

# These decide the order of the sums, and with it the last bits.
_CHUNK = 256
_CHUNK_TILE = 4096  # elements of an accumulator of the chunks' kernel
_CODE_TILE = 1024  # and of the codes': most have few vectors
_WIDEST = 128  # columns of either

KEY_DTYPES = (torch.int16, torch.int32, torch.int64)


@triton.jit(do_not_specialize=["N", "K"])
def code_statistics_key_kernel(
    index_ptr,  # [H, N]
    key_ptr,  # [H, N]
    N,
    K,
    stride_ih,
    stride_in,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    head = block // tl.cdiv(N, BLOCK_N)
    rows = block % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = rows < N
    b_i = tl.load(index_ptr + head * stride_ih + rows * stride_in, mask=m_n, other=0).to(tl.int64)
    b_key = tl.where((b_i >= 0) & (b_i < K), b_i, K)
    tl.store(key_ptr + head * N + rows, b_key.to(key_ptr.dtype.element_ty), mask=m_n)


@triton.jit
def _add_vectors(
    b_sum, b_count, x_ptr, weight_ptr, order_ptr, places, m_n, D, columns,
    stride_xn, stride_xd, stride_wn, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Add the vectors at ``places`` of the order to the sums, and their weights to the counts."""
    rows = tl.load(order_ptr + places, mask=m_n, other=0)  # [BN, 1]
    m_x = m_n & (columns < D)
    b_x = tl.load(x_ptr + rows * stride_xn + columns.to(tl.int64) * stride_xd, mask=m_x, other=0.0)
    b_x = b_x.to(tl.float64)  # [BN, BD]
    if WEIGHTED:
        b_w = tl.load(weight_ptr + rows * stride_wn, mask=m_n, other=0.0).to(tl.float64)
        b_count += b_w
        b_x *= b_w
    return b_sum + b_x, b_count


@triton.jit(do_not_specialize=["N", "K"])
def code_statistics_chunk_kernel(
    x_ptr,
    weight_ptr,
    key_ptr,  # [H, N] sorted
    order_ptr,  # [H, N]
    chunk_sum_ptr,  # [H, N // CHUNK, D] float64
    chunk_count_ptr,  # [H, N // CHUNK] float64
    N,
    K,
    D,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_wh,
    stride_wn,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    head = place // (N // CHUNK)
    x_ptr += head * stride_xh
    weight_ptr += head * stride_wh
    order_ptr += head * N
    first = place % (N // CHUNK) * CHUNK
    first_key = tl.load(key_ptr + head * N + first)
    last_key = tl.load(key_ptr + head * N + first + CHUNK - 1)
    if (first_key == last_key) & (first_key < K):
        o_n = tl.arange(0, BLOCK_N)[:, None]
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
        b_count = tl.zeros([BLOCK_N, 1], tl.float64)
        for n in range(0, CHUNK, BLOCK_N):
            b_sum, b_count = _add_vectors(
                b_sum, b_count, x_ptr, weight_ptr, order_ptr, first + n + o_n, o_n >= 0, D,
                columns, stride_xn, stride_xd, stride_wn, WEIGHTED,
            )  # fmt: skip
        tl.store(chunk_sum_ptr + place * D + columns, sum_rows(b_sum), mask=columns < D)
        if WEIGHTED and tl.program_id(1) == 0:
            tl.store(chunk_count_ptr + place, tl.sum(sum_rows(b_count)))


@triton.jit(do_not_specialize=["N", "K"])
def code_statistics_kernel(
    x_ptr,
    weight_ptr,
    order_ptr,  # [H, N]
    start_ptr,  # [H, K + 1]
    chunk_sum_ptr,
    chunk_count_ptr,
    count_ptr,  # [H, K]
    sum_ptr,  # [H, K, D]
    N,
    K,
    D,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_wh,
    stride_wn,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    head = place // K
    x_ptr += head * stride_xh
    weight_ptr += head * stride_wh
    order_ptr += head * N
    chunk_sum_ptr += head * (N // CHUNK) * D
    chunk_count_ptr += head * (N // CHUNK)
    start = tl.load(start_ptr + head + place)  # a head has K + 1 of them
    end = tl.load(start_ptr + head + place + 1)
    # The code has whole chunks where first_chunk < last_chunk; [in_front, behind) holds them.
    first_chunk = tl.cdiv(start, CHUNK)
    last_chunk = end // CHUNK
    in_front = tl.minimum(first_chunk * CHUNK, end)
    behind = tl.maximum(last_chunk * CHUNK, in_front)
    loose = end - start - (behind - in_front)

    o_n = tl.arange(0, BLOCK_N)[:, None]
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    m_d = columns < D
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    b_count = tl.zeros([BLOCK_N, 1], tl.float64)
    for n in range(0, loose, BLOCK_N):
        places = start + n + o_n  # [BN, 1]
        places += tl.where(places < in_front, 0, behind - in_front)
        b_sum, b_count = _add_vectors(
            b_sum, b_count, x_ptr, weight_ptr, order_ptr, places, places < end, D, columns,
            stride_xn, stride_xd, stride_wn, WEIGHTED,
        )  # fmt: skip
    for chunk in range(first_chunk, last_chunk, BLOCK_N * 2):
        for part in tl.static_range(2):
            chunks = chunk + part * BLOCK_N + o_n  # [BN, 1]
            m_c = chunks < last_chunk
            b_sum += tl.load(chunk_sum_ptr + chunks * D + columns, mask=m_c & m_d, other=0.0)
            if WEIGHTED:
                b_count += tl.load(chunk_count_ptr + chunks, mask=m_c, other=0.0)
    b_sum = sum_rows(b_sum).to(sum_ptr.dtype.element_ty)  # [1, BD]
    tl.store(sum_ptr + place * D + columns, b_sum, mask=m_d)
    if tl.program_id(1) == 0:
        count = tl.sum(sum_rows(b_count)) if WEIGHTED else (end - start).to(tl.float64)
        tl.store(count_ptr + place, count.to(count_ptr.dtype.element_ty))


def block_sizes(num_dims: int, tile: int) -> dict[str, int]:
    """Compile-time sizes of the kernels that add; functions of D alone."""
    return {"CHUNK": _CHUNK, **tile_sizes(num_dims, tile, _WIDEST, _CHUNK)}


class ByCode(NamedTuple):
    """Vectors in the order of their codes.

    Attributes:
        keys: sorted codes, ``(H, N)``; K for the indices that are none.
        order: the vectors' places, ``(H, N)``.
        starts: where the vectors of a code start in that order, ``(H, K + 1)``.
    """

    keys: Tensor
    order: Tensor
    starts: Tensor


def sort_by_code(indices: Tensor, num_codes: int) -> ByCode:
    """The order of the vectors with ``indices`` (H, N), not empty."""
    num_heads, num_rows = indices.shape
    key_dtype = next(d for d in KEY_DTYPES if num_codes <= torch.iinfo(d).max)
    keys = indices.new_empty((num_heads, num_rows), dtype=key_dtype)
    code_statistics_key_kernel[(triton.cdiv(num_rows, 1024) * num_heads,)](
        indices, keys, num_rows, num_codes, *strides(indices), BLOCK_N=1024
    )
    keys, order = torch.sort(keys, dim=1, stable=True)
    codes = torch.arange(num_codes + 1, dtype=key_dtype, device=indices.device)
    return ByCode(keys, order, torch.searchsorted(keys, codes.repeat(num_heads, 1)))


def segment_sums(
    x: Tensor, by_code: ByCode, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Counts (H, K) and sums (H, K, D) of vectors x (H, N, D), rounded to ``dtype``."""
    num_heads, num_rows, num_dims = x.shape
    num_codes = by_code.starts.shape[1] - 1
    weight = x if weights is None else weights
    counts = x.new_empty((num_heads, num_codes), dtype=dtype)
    sums = x.new_empty((num_heads, num_codes, num_dims), dtype=dtype)
    num_chunks = num_rows // _CHUNK
    chunk_sums = x.new_empty((num_heads, num_chunks, num_dims), dtype=torch.float64)
    chunk_counts = x.new_empty((num_heads, num_chunks), dtype=torch.float64)
    chunk_sizes = block_sizes(num_dims, _CHUNK_TILE)
    code_sizes = block_sizes(num_dims, _CODE_TILE)
    tiles = max(1, triton.cdiv(num_dims, code_sizes["BLOCK_D"]))
    # The same bits as in the interpreter, which contracts nothing to fused multiply-adds.
    options = {"WEIGHTED": weights is not None, "enable_fp_fusion": False}
    steps = (*strides(x), *strides(weight)[:2])
    shape = (num_rows, num_codes, num_dims)
    if num_chunks:
        code_statistics_chunk_kernel[(num_chunks * num_heads, tiles)](
            x, weight, by_code.keys, by_code.order, chunk_sums, chunk_counts, *shape, *steps,
            **chunk_sizes, **options, num_warps=8,
        )  # fmt: skip
    code_statistics_kernel[(num_codes * num_heads, tiles)](
        x, weight, by_code.order, by_code.starts, chunk_sums, chunk_counts, counts, sums, *shape,
        *steps, **code_sizes, **options,
    )  # fmt: skip
    return counts, sums


def code_statistics(
    x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.code_statistics`` on checked arguments."""
    if x.dim() == 2:
        weights = None if weights is None else weights[None]
        counts, sums = code_statistics(x[None], indices[None], num_codes, weights)
        return counts[0], sums[0]
    wide = x.dtype == torch.float64 or (weights is not None and weights.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    if indices.numel() == 0:
        shape = (x.shape[0], num_codes)
        return x.new_zeros(shape, dtype=dtype), x.new_zeros((*shape, x.shape[2]), dtype=dtype)
    return segment_sums(x, sort_by_code(indices, num_codes), weights, dtype)


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dims: int, dtype: torch.dtype, weighted: bool, quick: bool) -> Variant:
        def launch(n: int, k: int) -> None:
            # Enough vectors for a whole chunk.
            rows = n + _CHUNK
            x = torch.ones(rows, dims, dtype=dtype)
            indices = torch.zeros(rows, dtype=torch.int64)
            code_statistics(x, indices, k, x[:, 0].contiguous() if weighted else None)

        return Variant(
            f"code_statistics: {dtype}{', weighted' * weighted}, D {dims}".replace("torch.", ""),
            launch,
            wide=wide if dims % 16 == 0 and dtype.itemsize > 2 else (),
            quick=quick,
        )

    kernels = ("code_statistics_chunk_kernel", "code_statistics_kernel")
    wide = tuple((kernel, "b_x = tl.load(") for kernel in kernels)
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    some = {(torch.float32, False, 64), (torch.bfloat16, True, 7)}
    return [
        variant(d, t, w, (t, w, d) in some)
        for t in floats
        for w in (False, True)
        for d in (1, 7, 32, 64, 256)
    ]
