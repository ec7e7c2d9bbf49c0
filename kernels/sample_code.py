"""Gumbel-max sampling of codes in Triton.

A program holds a block of rows and meets tile after tile of codes, twice. Float32 gives every score
an interval that contains its rounding errors. The first time leaves the best lower end of each row;
the second time the codes whose interval reaches it, few but the winner, are evaluated in float64.

Workspace: the codebook in float32, and for a moment in float64. Nothing is read back to the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import at_most, num_threads, strides
from mmfast.kernels.philox import (
    MINUS_TWO_LOG_2,
    in_order,
    log_quotient,
    minus_two_log,
    split,
    uniform,
    uniforms,
    words,
)

METRICS = {"euclidean": 0, "cosine": 1, "dot": 2}
_MOST_HEADS = 65535
_BELOW_ONE = tl.constexpr(1 - 2.0**-24)
_NO_CODE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _gumbel_near(u):
    """-log(-log(1 - u)) in float32."""
    u = tl.minimum(u, _BELOW_ONE)
    exponent, f = split(1.0 - u)
    f = tl.where(u < 0.33, -u, f)  # without the rounding of 1 - u
    return 0.5 * minus_two_log(0.5 * tl.fma(exponent, MINUS_TWO_LOG_2, f * log_quotient(f)))


@triton.jit
def _gumbel(u):
    """The same in float64."""
    u = tl.minimum(u, _BELOW_ONE).to(tl.float64)
    rest = 1.0 - u
    # What the difference rounds away is made up for by the quotient.
    waiting = -tl.log(rest) * (u / (1.0 - rest))
    return -tl.log(waiting)


@triton.jit
def _intervals(
    p_x, m_n, packed_ptr, square_ptr, mean_ptr, codes, norm, square, slack, noise, screened,
    seed, offset, first, K, D, temperature, stride_xd,
    METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lower and upper ends of the scores of a tile, [BN, BK]; ``codes`` [BK]."""
    m_k = codes < K
    product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for d in range(0, D, BLOCK_D):
        columns = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_d = columns < D
        b_x = tl.load(
            p_x + columns[None, :] * stride_xd, mask=m_n[:, None] & m_d[None, :], other=0.0
        ).to(tl.float64)
        if METRIC == 0:
            b_x -= tl.load(mean_ptr + columns, mask=m_d, other=0.0)[None, :]
        if METRIC == 1:
            b_x /= norm[:, None]
        b_code = tl.load(
            packed_ptr + codes[None, :].to(tl.int64) * D + columns[:, None],
            mask=m_k[None, :] & m_d[:, None],
            other=0.0,
        )
        product = tl.dot(b_x.to(tl.float32), b_code, product, input_precision="ieee")
    blocks = tl.min(codes, 0) // 4 + tl.arange(0, BLOCK_K // 4)
    w0, w1, w2, w3 = words(seed[:, None], offset[:, None], first[:, None] + blocks[None, :])
    noisy = _gumbel_near(uniform(in_order(w0, w1, w2, w3)))
    if METRIC == 0:
        b_square = tl.load(square_ptr + codes, mask=m_k, other=0.0)[None, :]
        distance = square[:, None] + b_square - 2.0 * product
        low = -tl.sqrt(tl.maximum(distance + slack[:, None], 0.0))
        high = -tl.sqrt(tl.maximum(distance - slack[:, None], 0.0))
    else:
        low = product - slack[:, None]
        high = product + slack[:, None]
    per_temperature = (1.0 / temperature).to(tl.float32)
    low = low * per_temperature + noisy - noise[:, None]
    high = high * per_temperature + noisy + noise[:, None]
    # Of what float32 cannot hold, every code is evaluated.
    low = tl.where(screened[:, None], low, -3e38)
    high = tl.where(screened[:, None], high, float("inf"))
    return tl.where(m_k[None, :], low, float("-inf")), tl.where(m_k[None, :], high, float("-inf"))


@triton.jit
def _score(
    p_x, m_n, code_ptr, norm_ptr, code, norm, seed, offset, first, D, temperature,
    stride_xd, stride_ck, stride_cd,
    METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a code for each row, ``code`` [BN], float64."""
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    p_code = code_ptr + code[:, None].to(tl.int64) * stride_ck
    for d in range(0, D, BLOCK_D):
        columns = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = m_n[:, None] & (columns < D)
        b_x = tl.load(p_x + columns * stride_xd, mask=mask, other=0.0).to(tl.float64)
        b_code = tl.load(p_code + columns * stride_cd, mask=mask, other=0.0).to(tl.float64)
        if METRIC == 0:
            total += (b_x - b_code) * (b_x - b_code)
        else:
            total += b_x * b_code
    logit = tl.sum(total, 1)
    if METRIC == 0:
        logit = -tl.sqrt(logit)
    if METRIC == 1:
        norms = norm * tl.load(norm_ptr + code, mask=m_n, other=1.0)
        logit = tl.where(norms == 0, tl.abs(logit) * 0, logit / tl.where(norms == 0, 1.0, norms))
    return logit / temperature + _gumbel(uniforms(seed, offset, first * 4 + code))


@triton.jit(
    do_not_specialize=[
        "N", "K", "D", "each", "seed_step", "offset_step", "stride_xh", "stride_xn", "stride_ch",
        "stride_ck",
    ]
)  # fmt: skip
def sample_code_kernel(
    x_ptr,
    code_ptr,
    packed_ptr,  # [H, K, D] float32
    square_ptr,  # [H, K] float32, of the packed codes
    norm_ptr,  # [H, K] float64, of the codes
    mean_ptr,  # [H, D] float64
    limit_ptr,  # [H, 3] float64
    seed_ptr,
    offset_ptr,
    index_ptr,  # [H, N]
    N,
    K,
    D,
    each,
    seed_step,
    offset_step,
    temperature: tl.float64,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ch,
    stride_ck,
    stride_cd,
    METRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    temperature = tl.full([], temperature, tl.float64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = row < N
    p_x = x_ptr + head * stride_xh + row[:, None] * stride_xn
    code_ptr += head * stride_ch
    packed_ptr += head * K * D
    square_ptr += head * K
    norm_ptr += head * K
    mean_ptr += head * D
    sample = row // each
    seed = tl.load(seed_ptr + sample * seed_step, mask=m_n, other=0)
    offset = tl.load(offset_ptr + sample * offset_step, mask=m_n, other=0)
    first = (row % each * tl.num_programs(1) + head) * tl.cdiv(K, 4)  # block of code 0

    largest = tl.load(limit_ptr + head * 3)
    largest_given = tl.load(limit_ptr + head * 3 + 1)
    trusted = tl.load(limit_ptr + head * 3 + 2 + tl.zeros([BLOCK_N], tl.int64)) > 0
    b_given = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    b_square = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    for d in range(0, D, BLOCK_D):
        columns = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = m_n[:, None] & (columns < D)
        b_x = tl.load(p_x + columns * stride_xd, mask=mask, other=0.0).to(tl.float64)
        b_given += b_x * b_x
        if METRIC == 0:
            b_x -= tl.load(mean_ptr + columns, mask=columns < D, other=0.0)
        b_square += tl.where(mask, b_x * b_x, 0.0)
    norm = tl.sqrt(tl.sum(b_given, 1))
    square = tl.sum(b_square, 1)
    length = tl.sqrt(square)
    if METRIC == 1:
        length = tl.full([BLOCK_N], 1.0, tl.float64)
    # How far the float32 logit (its square, if euclidean) may lie from the exact one.
    relative = (D + 16) * tl.full([], 2.0**-22, tl.float64)
    size = length * largest
    error = relative * size
    if METRIC == 0:
        size = length + largest
        rounded_away = (norm + 2.0 * largest_given) * tl.full([], 2.0**-49, tl.float64)
        error = size * (size * relative + rounded_away)
    size /= temperature
    screened = trusted & (norm < 1e15) & (size < 1e25) & (error < 1e30)
    if METRIC == 1:
        screened = screened & (norm > 1e-15)
    slack = (error * 1.01 + 1e-30).to(tl.float32)
    noise = (size * 4.8e-7 + 4e-5).to(tl.float32)
    square = square.to(tl.float32)

    best_low = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for number in range(0, K, BLOCK_K):
        codes = number + tl.arange(0, BLOCK_K)
        low, _ = _intervals(
            p_x, m_n, packed_ptr, square_ptr, mean_ptr, codes, norm, square, slack, noise, screened,
            seed, offset, first, K, D, temperature, stride_xd, METRIC, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        best_low = tl.maximum(best_low, tl.max(low, 1))
    index = tl.full([BLOCK_N], 0, tl.int32)
    best = tl.full([BLOCK_N], float("-inf"), tl.float64)
    for number in range(0, K, BLOCK_K):
        codes = number + tl.arange(0, BLOCK_K)
        _, high = _intervals(
            p_x, m_n, packed_ptr, square_ptr, mean_ptr, codes, norm, square, slack, noise, screened,
            seed, offset, first, K, D, temperature, stride_xd, METRIC, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        left = tl.where((high >= best_low[:, None]) & m_n[:, None], codes[None, :], _NO_CODE)
        code = tl.min(left, 1)
        while tl.min(code, 0) < _NO_CODE:
            mine = code < _NO_CODE
            score = _score(
                p_x, mine, code_ptr, norm_ptr, tl.where(mine, code, 0), norm, seed, offset, first,
                D, temperature, stride_xd, stride_ck, stride_cd, METRIC, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            # The first NaN is the best.
            better = mine & (best == best) & ((score > best) | (score != score))
            index = tl.where(better, code, index)
            best = tl.where(better, score, best)
            code = tl.min(tl.where(left > code[:, None], left, _NO_CODE), 1)
    tl.store(index_ptr + head * N + row, index.to(tl.int64), mask=m_n)


def _prepare(codes: Tensor, metric: str, temperature: float) -> tuple[Tensor, ...]:
    """Of codes (H, K, D): packed, their squares, norms, mean; the largest norms after and before
    packing, and whether float32 can screen."""
    given = codes.double()
    norms = given.norm(dim=2)  # [H, K]
    mean = given.mean(1) if metric == "euclidean" else torch.zeros_like(given[:, 0])  # [H, D]
    shifted = given - mean[:, None] if metric == "euclidean" else given
    if metric == "cosine":
        # 1 / inf = 0, the similarity with a zero code.
        shifted = given / norms.where(norms > 0, torch.inf)[..., None]
    squares = shifted.square().sum(2)
    tame = ((norms == 0) | ((norms > 1e-15) & (norms < 1e15))).all(1)
    tame = tame.double() if 1 / temperature < 1e25 else torch.zeros_like(norms[:, 0])
    limits = torch.stack([squares.amax(1).sqrt(), norms.amax(1), tame], 1)  # [H, 3]
    return shifted.float().contiguous(), squares.float(), norms, mean, limits


def sample_code(
    x: Tensor, codebook: Tensor, temperature: float, metric: str, seed: Tensor, offset: Tensor
) -> Tensor:
    """``torch.ops.mmfast.sample_code`` on checked arguments."""
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    heads = codebook.dim() - 2
    codes = codebook if heads else codebook[None]
    num_heads, num_codes, num_dims = codes.shape
    if num_heads > _MOST_HEADS:
        raise RuntimeError(f"sample_code: at most {_MOST_HEADS} heads, got {num_heads}")
    rows = x.reshape(num_heads, -1, num_dims)
    samples = x.shape[heads] if seed.dim() or offset.dim() else 1
    steps = [t.stride(0) if t.dim() else 0 for t in (seed, offset)]
    num_rows, block_n = rows.shape[1], 16
    sample_code_kernel[(triton.cdiv(num_rows, block_n), num_heads)](
        rows, codes, *_prepare(codes, metric, temperature), seed, offset, indices,
        num_rows, num_codes, num_dims, num_rows // samples, *steps, temperature,
        *strides(rows), *strides(codes), METRIC=METRICS[metric],
        BLOCK_N=block_n, BLOCK_K=32, BLOCK_D=16, enable_fp_fusion=False, **num_threads(256),
        **at_most(192),
    )  # fmt: skip
    return indices


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(metric: str, dtype: torch.dtype, dims: int) -> Variant:
        def launch(n: int, k: int) -> None:
            x, codes = torch.ones(n, dims, dtype=dtype), torch.ones(k, dims, dtype=dtype)
            sample_code(x, codes, 1.0, metric, torch.tensor(1), torch.tensor(0))

        name = f"sample_code: {metric}, {dtype}, D {dims}".replace("torch.", "")
        return Variant(name, launch, quick=(metric, dtype) == ("euclidean", torch.float32))

    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return [variant(metric, dtype, 64) for metric in METRICS for dtype in dtypes]
