"""Random numbers for Triton kernels: the stream of ``mmfast/philox.py``.

Words and uniform numbers are those of the reference. Normals are those of ``csrc/cpu/philox.h``,
operation for operation: every rounding is written down, so that neither ``enable_fp_fusion`` nor
the device changes them (the interpreter, which has no fused multiply-add, does).

Seeds and offsets are int64 scalars or blocks, which may be loaded from tensors. Elements are
counted within a sample, in int32 or int64.

- ``normals(seed, offset, element)``: of any elements, each with a block of Philox of its own.
- ``normals_in_order(seed, offset, first, COUNT)``: of COUNT elements in a row, from a multiple of
  four on, at a quarter of the cost.
- ``normals_of_sample``: one of these, for a block of a sample's elements.
- ``uniforms`` and ``uniforms_in_order`` likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SCALE = tl.constexpr(2.0**-32)
_HALF = tl.constexpr(2.0**-33)
MINUS_TWO_LOG_2 = tl.constexpr(-1.38629436 * 2.0**-23)  # times an exponent as split has it
_QUARTER_SCALE = tl.constexpr(2.0**-34)


@triton.jit
def words(seed, offset, block):
    """The four words of blocks of four elements, uint32."""
    block = block.to(tl.int64)
    seed = tl.cast(seed, tl.int64)
    offset = tl.cast(offset, tl.int64)
    return tl.philox_impl(
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def uniform(word):
    """word 2^-32 + 2^-33 in float32: from 2^-33 to 1."""
    return word.to(tl.float32) * _SCALE + _HALF


@triton.jit
def log_quotient(f):
    """-2 log(1 + f) / f, f from -1/3 to 1/3."""
    p = tl.fma(f, 0.254839301, -0.268676668)
    p = tl.fma(p, f, 0.244531035)
    p = tl.fma(p, f, -0.282339364)
    p = tl.fma(p, f, 0.333535403)
    p = tl.fma(p, f, -0.400076717)
    p = tl.fma(p, f, 0.499997914)
    p = tl.fma(p, f, -0.666666389)
    p = tl.fma(p, f, 1.0)
    return tl.fma(p, f, -2.0)


@triton.jit
def split(u):
    """2^23 e, the exponent where it lies, and f from -1/3 to 1/3: u = 2^e (1 + f), u normal."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    return exponent.to(tl.float32), f


@triton.jit
def minus_two_log(u):
    """-2 log u, u normal."""
    exponent, f = split(u)
    return tl.fma(exponent, MINUS_TWO_LOG_2, f * log_quotient(f))


@triton.jit
def turns(word):
    """From -1/8 to 1/8, of the lower 30 bits of a word."""
    return (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * _QUARTER_SCALE + _HALF


@triton.jit
def box_muller(word0, word1):
    """Two normals of two words."""
    radius = tl.sqrt_rn(minus_two_log(uniform(word0)))
    bits = radius.to(tl.uint32, bitcast=True) ^ (word1 & 0x80000000)
    radius = bits.to(tl.float32, bitcast=True)
    r = turns(word1)
    z = r * r
    s = tl.fma(z, -75.3935623, 81.5923538)
    s = tl.fma(s, z, -41.3416634)
    s = tl.fma(s, z, 6.28318548) * r
    c = tl.fma(z, 59.4243431, -85.4488220)
    c = tl.fma(c, z, 64.9393692)
    c = tl.fma(c, z, -19.7392082)
    c = tl.fma(c, z, 1.0)
    turned = (word1 & 0x40000000) != 0
    return radius * tl.where(turned, s, c), radius * tl.where(turned, c, s)


@triton.jit
def normals4(seed, offset, block):
    """The four normals of each block."""
    w0, w1, w2, w3 = words(seed, offset, block)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def in_order(x0, x1, x2, x3):
    """Elements 4 i + j of [..., 4 N] from x_j[..., i], [N] or [M, N] each."""
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    if len(x0.shape) == 1:
        return tl.reshape(joined, [4 * x0.shape[0]])
    else:
        return tl.reshape(joined, [x0.shape[0], 4 * x0.shape[1]])


@triton.jit
def normals_in_order(seed, offset, first, COUNT: tl.constexpr):
    """Normals of elements first to first + COUNT, [COUNT], of one sample."""
    n0, n1, n2, n3 = normals4(seed, offset, first // 4 + tl.arange(0, COUNT // 4))
    return in_order(n0, n1, n2, n3)


@triton.jit
def normals(seed, offset, element):
    """Normals of any elements."""
    w0, w1, w2, w3 = words(seed, offset, element >> 2)
    upper = (element & 2) != 0
    even, odd = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, odd, even)


@triton.jit
def normals_of_sample(
    seed, offset, sample, seed_step, numbers, first, COUNT: tl.constexpr, FOURS: tl.constexpr
):
    """Normals of elements first to first + COUNT, [COUNT], of a sample of so many numbers.

    Where all samples have one seed, in one place (seed_step 0), their elements follow each other.
    FOURS: first is a multiple of four elements of the stream.
    """
    if seed_step == 0:
        first += sample * numbers
    if FOURS:
        return normals_in_order(seed, offset, first, COUNT)
    else:
        return normals(seed, offset, first + tl.arange(0, COUNT))


@triton.jit
def uniforms_in_order(seed, offset, first, COUNT: tl.constexpr):
    """Uniform numbers of elements first to first + COUNT, [COUNT], of one sample."""
    w0, w1, w2, w3 = words(seed, offset, first // 4 + tl.arange(0, COUNT // 4))
    return uniform(in_order(w0, w1, w2, w3))


@triton.jit
def uniforms(seed, offset, element):
    """Uniform numbers of any elements."""
    w0, w1, w2, w3 = words(seed, offset, element >> 2)
    even = tl.where((element & 2) != 0, w2, w0)
    odd = tl.where((element & 2) != 0, w3, w1)
    return uniform(tl.where((element & 1) != 0, odd, even))
