"""Streams of bits in Triton.

32 indices are as many words of 32 bits as an index has bits, and a program has whole words. It
reads and writes both sides as they lie in memory, by 128 bits; what belongs together is looked up
in shared memory. Packing joins narrow indices first, as many as fill more than half a word, so
that a word has its bits from at most three places.

Rows that fill whole bytes are one long row. Other rows begin at any byte, and their packed side is
read and written byte by byte, as is the end of a long row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import at_most, num_threads

_TILE = 1024  # indices


@triton.jit
def _places(N, L, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr):
    """Rows [BN, 1] of this program, its first index in them, and whether it has all it can."""
    place = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(L, BLOCK_L)
    block = place // tiles
    first = place % tiles * BLOCK_L
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    return rows, first, ((block + 1) * BLOCK_N <= N) & (first + BLOCK_L <= L)


@triton.jit
def _of_rows(b_x, source):
    """b_x [BN, A] at places ``source`` [1, B] of each row. In one dimension: Triton would confine
    the rows of two to a warp each."""
    source += tl.arange(0, b_x.shape[0])[:, None] * b_x.shape[1]
    flat = tl.reshape(b_x, [b_x.shape[0] * b_x.shape[1]])
    found = tl.gather(flat, tl.reshape(source, [source.shape[0] * source.shape[1]]), 0)
    return tl.reshape(found, source.shape)


@triton.jit(do_not_specialize=["N", "L", "size", "stride_in"])
def pack_indices_kernel(
    index_ptr,  # [N, L]
    packed_ptr,  # [N, size] uint8
    N,
    L,
    size,
    stride_in,
    stride_il,
    BITS: tl.constexpr,
    JOIN: tl.constexpr,  # the most for which JOIN BITS are at most 32, a power of two
    FLAT: tl.constexpr,  # N is 1
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,  # a multiple of 32
    BLOCK_W: tl.constexpr,  # at least WORDS
):
    WORDS: tl.constexpr = BLOCK_L // 32 * BITS
    WIDTH: tl.constexpr = JOIN * BITS
    JOINED: tl.constexpr = BLOCK_L // JOIN
    rows, first, full = _places(N, L, BLOCK_N, BLOCK_L)
    o_l = tl.arange(0, BLOCK_L)[None, :]
    p_index = index_ptr + first * stride_il + o_l.to(tl.int64) * stride_il
    if not FLAT:
        p_index += rows * stride_in
    # A mask that may end anywhere would narrow the loads of all tiles.
    if full:
        b_index = tl.load(p_index)
    else:
        b_index = tl.load(p_index, mask=(rows < N) & (first + o_l < L), other=0)
    b_index = tl.broadcast_to(b_index.to(tl.uint32), [BLOCK_N, BLOCK_L])
    if BITS < 32:
        b_index = b_index & ((1 << BITS) - 1)
    if JOIN > 1:
        b_index = tl.reshape(b_index, [BLOCK_N, JOINED, JOIN])
        place = (BITS * tl.arange(0, JOIN)).to(tl.uint32)[None, None, :]
        b_index = tl.sum(b_index << place, 2)
    o_w = tl.arange(0, BLOCK_W)[None, :]
    if WIDTH == 32:
        b_word = b_index
    else:
        b_word = tl.zeros([BLOCK_N, BLOCK_W], tl.uint32)
        for i in tl.static_range(3):
            source = 32 * o_w // WIDTH + i
            up = source * WIDTH - 32 * o_w  # above -WIDTH
            source = tl.minimum(source, JOINED - 1)
            b_part = _of_rows(b_index, source)
            b_higher = b_part << (tl.maximum(up, 0) & 31).to(tl.uint32)
            b_part = tl.where(up < 0, b_part >> tl.maximum(-up, 0).to(tl.uint32), b_higher)
            b_word |= tl.where(up < 32, b_part, 0)
    start = first // 32 * (4 * BITS)  # a byte
    if FLAT and full:
        p_word = (packed_ptr + start).to(tl.pointer_type(tl.uint32), bitcast=True)
        tl.store(p_word + o_w, b_word, mask=o_w < WORDS)
    else:
        o_b = tl.arange(0, 4 * BLOCK_W)[None, :]
        b_byte = b_word[:, :, None] >> (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]
        b_byte = tl.reshape(b_byte & 255, [BLOCK_N, 4 * BLOCK_W]).to(tl.uint8)
        mask = (rows < N) & (o_b < 4 * WORDS) & (start + o_b < size)
        tl.store(packed_ptr + rows * size + start + o_b, b_byte, mask=mask)


@triton.jit(do_not_specialize=["N", "L", "size", "stride_pn"])
def unpack_indices_kernel(
    packed_ptr,  # [N, size] uint8
    index_ptr,  # [N, L] int64
    N,
    L,
    size,
    stride_pn,
    stride_pb,
    BITS: tl.constexpr,
    FLAT: tl.constexpr,  # N is 1, and the bytes are dense and begin where a word may
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,  # a multiple of 32
    BLOCK_W: tl.constexpr,  # at least WORDS
):
    WORDS: tl.constexpr = BLOCK_L // 32 * BITS
    rows, first, full = _places(N, L, BLOCK_N, BLOCK_L)
    start = first // 32 * (4 * BITS)  # a byte
    o_w = tl.arange(0, BLOCK_W)[None, :]
    if FLAT and full:
        p_word = (packed_ptr + start).to(tl.pointer_type(tl.uint32), bitcast=True)
        b_word = tl.load(p_word + o_w, mask=o_w < WORDS, other=0)
    else:
        o_b = tl.arange(0, 4 * BLOCK_W)[None, :]
        mask = (rows < N) & (o_b < 4 * WORDS) & (start + o_b < size)
        p_byte = packed_ptr + rows * stride_pn + (start + o_b) * stride_pb
        b_byte = tl.load(p_byte, mask=mask, other=0).to(tl.uint32)
        b_byte = tl.reshape(b_byte, [BLOCK_N, BLOCK_W, 4])
        b_word = tl.sum(b_byte << (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, :], 2)
    o_l = tl.arange(0, BLOCK_L)[None, :]
    word = o_l * BITS // 32
    low = o_l * BITS % 32
    b_index = _of_rows(b_word, word) >> low.to(tl.uint32)
    if 32 % BITS != 0:
        b_next = _of_rows(b_word, tl.minimum(word + 1, BLOCK_W - 1))
        b_next = b_next << ((32 - low) & 31).to(tl.uint32)
        b_index |= tl.where(low + BITS > 32, b_next, 0)
    if BITS < 32:
        b_index = b_index & ((1 << BITS) - 1)
    b_index = b_index.to(tl.int64)
    p_index = index_ptr + first + o_l
    if not FLAT:
        p_index += rows * L
    if full:
        tl.store(p_index, b_index)
    else:
        tl.store(p_index, b_index, mask=(rows < N) & (first + o_l < L))


def _sizes(bits: int, length: int, flat: bool) -> dict[str, int]:
    """Compile-time sizes for rows of so many indices."""
    tile = _TILE if flat else _TILE // 2  # bytes by themselves need more registers
    block_l = tile if flat else min(tile, max(32, triton.next_power_of_2(length)))
    return {
        "BLOCK_N": tile // block_l,
        "BLOCK_L": block_l,
        "BLOCK_W": triton.next_power_of_2(block_l // 32 * bits),
    }


def _launch(kernel: Any, rows: Tensor, out: Tensor, shape: tuple[int, int, int], **options: Any):
    """``kernel`` on ``rows`` for N, L, and bytes of a packed row."""
    num_rows, length, _ = shape
    sizes = _sizes(options["BITS"], length, options["FLAT"])
    grid = triton.cdiv(num_rows, sizes["BLOCK_N"]) * triton.cdiv(length, sizes["BLOCK_L"])
    kernel[(grid,)](
        rows, out, *shape, *rows.stride(), **options, **sizes, **num_threads(128), **at_most(128)
    )


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """``torch.ops.mmfast.pack_indices`` on checked arguments."""
    length = indices.shape[-1]
    packed = indices.new_empty((*indices.shape[:-1], (length * bits + 7) // 8), dtype=torch.uint8)
    if packed.numel() == 0:
        return packed
    rows = indices.reshape(-1, length)  # [N, L]
    if rows.is_contiguous() and length * bits % 8 == 0:
        rows = rows.view(1, -1)
    shape = (*rows.shape, packed.numel() // len(rows))
    flat = len(rows) == 1
    join = 1 << ((32 // bits).bit_length() - 1)
    _launch(pack_indices_kernel, rows, packed, shape, BITS=bits, JOIN=join, FLAT=flat)
    return packed


def unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """``torch.ops.mmfast.unpack_indices`` on checked arguments."""
    indices = packed.new_empty((*packed.shape[:-1], count), dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    rows = packed.reshape(-1, packed.shape[-1])  # [N, bytes]
    if rows.is_contiguous() and count * bits % 8 == 0:
        rows = rows.view(1, -1)
    shape = (len(rows), indices.numel() // len(rows), rows.shape[1])
    flat = len(rows) == 1 and rows.stride(1) == 1 and rows.data_ptr() % 4 == 0
    _launch(unpack_indices_kernel, rows, indices, shape, BITS=bits, FLAT=flat)
    return indices


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(bits: int, length: int, dtype: torch.dtype, quick: bool) -> Variant:
        def launch(n: int, k: int) -> None:
            indices = torch.ones(n, length, dtype=dtype)
            unpack_indices(pack_indices(indices, bits), bits, length)

        return Variant(
            f"pack_indices: {dtype}, {bits} bits, L {length}".replace("torch.", ""),
            launch,
            # A tile of narrower indices has too few words to unpack.
            wide=wide[: 2 if bits > 8 else 1] if length % 8 == 0 else (),
            quick=quick,
        )

    wide = (
        ("pack_indices_kernel", "b_index = tl.load(p_index)"),
        ("unpack_indices_kernel", "b_word = tl.load(p_word"),
    )
    some = {(torch.int64, 10), (torch.int32, 13)}
    return [
        variant(bits, length, t, (t, bits) in some and length == 1024)
        for bits in (1, 3, 8, 10, 13, 16, 17, 31, 32)
        for length in (17, 1024)
        for t in (torch.int32, torch.int64)
    ]
