"""The codes of the lookup, packed for tensor cores: less a centre, scaled, in float16.

What the centre is decides how much is certain, not the result: it is the mean of a sample.

A thread has in its accumulators whole groups of GROUP codes that follow each other: of a group only
the best score is kept, at about one instruction a product, and which code of the group it was is
settled afterwards, in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Codes are padded to a multiple of this, the largest tile of the screening.
TILE = tl.constexpr(128)
# The most programs that look for the largest element.
MOST_PARTS = tl.constexpr(256)
# Norm term of the codes that fill the last tile: no score is as low, and none overflows.
_PAD = tl.constexpr(2.0**86)
# Below this, elements may be lost beside the largest where denormals are flushed.
_TINY = tl.constexpr(2.0**-100)


@triton.jit
def _bits(x):
    """Of |x|. In this order NaN comes last, and does not get lost in a maximum."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest):
    """The power of two that brings ``largest`` to between 2^14 and 2^15: no float16 overflows, and
    those that a device may flush to zero are too small to matter. At most 2^114."""
    exponent = tl.maximum(largest, _TINY).to(tl.int32, bitcast=True) & 0x7F800000
    return (0x7F000000 - (exponent - (14 << 23))).to(tl.float32, bitcast=True)


@triton.jit
def halves(b_x, scale):
    """Scaled rows as two float16 to add up, and squared norms: of the rows, of what the first
    leaves of them, and of what both leave."""
    b_x = b_x * scale
    b_high = b_x.to(tl.float16)
    b_left = b_x - b_high.to(tl.float32)
    b_low = b_left.to(tl.float16)
    b_rest = b_left - b_low.to(tl.float32)
    square, left, rest = (
        tl.sum(b_x * b_x, 1),
        tl.sum(b_left * b_left, 1),
        tl.sum(b_rest * b_rest, 1),
    )
    return b_high, b_low, square, left, rest


@triton.jit
def centred(p_x, p_centre, m_n, m_d, CENTRE: tl.constexpr, WIDE: tl.constexpr):
    """Rows less the centre, in float32 after one rounding of the difference."""
    mask = m_n & m_d
    b_x = tl.load(p_x, mask=mask, other=0.0)  # [BN, BD]
    b_x = b_x.to(tl.float64 if WIDE else tl.float32)
    if CENTRE:
        b_x = tl.where(mask, b_x - tl.load(p_centre, mask=m_d, other=0.0), 0.0)
    return b_x.to(tl.float32)


@triton.jit(do_not_specialize=["K"])
def nearest_code_centre_kernel(
    code_ptr,
    centre_ptr,  # [H, D]
    # [H, programs] bits of the largest element of the codes less their centre, among a program's
    largest_ptr,
    number_ptr,  # [H, NUMBERS], of which all become zero
    K,
    D: tl.constexpr,
    stride_ch,
    stride_ck,
    stride_cd,
    WIDE: tl.constexpr,
    NUMBERS: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    code_ptr += head * stride_ch
    o_k = tl.arange(0, BLOCK_K)[:, None]
    sampled = tl.arange(0, SAMPLE).to(tl.int64)[:, None] * K // SAMPLE
    largest = tl.zeros([BLOCK_K, BLOCK_D], tl.int32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_c = code_ptr + o_d[None, :].to(tl.int64) * stride_cd
        b_sample = tl.load(p_c + sampled * stride_ck, mask=m_d[None, :], other=0.0)
        b_sample = b_sample.to(tl.float64 if WIDE else tl.float32)
        centre = tl.sum(b_sample, 0) * (1.0 / SAMPLE)
        if tl.program_id(0) == 0:
            tl.store(centre_ptr + head * D + o_d, centre, mask=m_d)
        for k in range(tl.program_id(0) * BLOCK_K, K, tl.num_programs(0) * BLOCK_K):
            mask = (k + o_k < K) & m_d[None, :]
            b_c = tl.load(p_c + (k + o_k).to(tl.int64) * stride_ck, mask=mask, other=0.0)
            b_c = b_c.to(tl.float64 if WIDE else tl.float32) - centre[None, :]
            # As the codes are packed: from float32.
            largest = tl.maximum(largest, tl.where(mask, _bits(b_c.to(tl.float32)), 0))
    largest = tl.max(tl.max(largest, 1), 0)
    tl.store(largest_ptr + head * tl.num_programs(0) + tl.program_id(0), largest)
    if tl.program_id(0) == 0:
        o_n = tl.arange(0, 16)
        tl.store(number_ptr + head * NUMBERS + o_n, o_n * 0, mask=o_n < NUMBERS)


@triton.jit(do_not_specialize=["K", "parts"])
def nearest_code_pack_kernel(
    code_ptr,
    centre_ptr,  # [H, D]
    largest_ptr,  # [H, parts] bits
    half_ptr,  # [2, H, padded K, PADDED_D] float16, scaled: codes, and what their rounding left
    term_ptr,  # [H, padded K] |scaled code|^2 / 2, or 0
    # [H, 8] bits of: the scale; squares of the largest norm, of what one and two float16 leave, of
    # the norm with the centre
    stats_ptr,
    K,
    parts,
    D: tl.constexpr,
    stride_ch,
    stride_ck,
    stride_cd,
    EUCLIDEAN: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    centre_ptr += head * D
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    m_k = codes < K
    o_p = tl.arange(0, MOST_PARTS)
    largest = tl.load(largest_ptr + head * parts + o_p, mask=o_p < parts, other=0)
    largest = tl.max(largest, 0).to(tl.float32, bitcast=True)
    scale = scale_of(largest)
    square = tl.zeros([BLOCK_K], tl.float32)
    left = tl.zeros([BLOCK_K], tl.float32)
    rest = tl.zeros([BLOCK_K], tl.float32)
    whole = tl.zeros([BLOCK_K], tl.float32)
    p_c = code_ptr + head * stride_ch + codes[:, None].to(tl.int64) * stride_ck
    # Of each 8 columns of a tensor core's result, lane q of four has columns 2 q and 2 q + 1.
    member = codes % GROUP
    column = member // 2 * 8 + codes // GROUP % 4 * 2 + member % 2
    padded = tl.num_programs(0) * BLOCK_K
    rows = head * padded + codes // (4 * GROUP) * (4 * GROUP) + column  # [BK] int64
    p_half = half_ptr + rows[:, None] * PADDED_D
    lower = tl.num_programs(1) * padded.to(tl.int64) * PADDED_D
    for d in range(0, PADDED_D, BLOCK_D):
        m_d = (d + o_d < D)[None, :]
        p_d = p_c + (d + o_d)[None, :].to(tl.int64) * stride_cd
        b_c = centred(p_d, centre_ptr + (d + o_d)[None, :], m_k[:, None], m_d, True, WIDE)
        b_high, b_low, b_square, b_left, b_rest = halves(b_c, scale)
        tl.store(p_half + (d + o_d)[None, :], b_high)
        tl.store(p_half + lower + (d + o_d)[None, :], b_low)
        square += b_square
        left += b_left
        rest += b_rest
        if not EUCLIDEAN:
            b_c = tl.load(p_d, mask=m_k[:, None] & m_d, other=0.0).to(tl.float32) * scale
            whole += tl.sum(b_c * b_c, 1)
    term = square * 0.5
    if not EUCLIDEAN:
        term = square * 0.0
    tl.store(term_ptr + rows, tl.where(m_k, term, _PAD))
    # Codes so close to each other are not for screening.
    square = tl.where(largest < _TINY, float("inf"), square)
    p_stats = stats_ptr + head * 8
    tl.store(p_stats, scale.to(tl.int32, bitcast=True))
    tl.atomic_max(p_stats + 1, tl.max(_bits(square), 0), sem="relaxed")
    tl.atomic_max(p_stats + 2, tl.max(_bits(left), 0), sem="relaxed")
    tl.atomic_max(p_stats + 3, tl.max(_bits(rest), 0), sem="relaxed")
    tl.atomic_max(p_stats + 4, tl.max(_bits(whole), 0), sem="relaxed")
