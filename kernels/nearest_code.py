"""Exact nearest codes in Triton: tensor cores screen in float16, float64 settles what is close.

Scores are x.c - |c|^2 / 2 (euclidean) or x.c, with codes less their mean: larger is nearer.

1. ``nearest_code_screen_kernel``: vectors and codes, scaled by powers of two, are rounded to
   float16. Codes stream past a block of rows; each row keeps its best score, that code, and the
   second best score. Two scores further apart than twice the error bound (Cauchy-Schwarz on the
   measured rounding residuals, plus the accumulation's own rounding) cannot have swapped. Rows
   where they are not go onto a list, rows whose bound is not finite among them.
2. ``nearest_code_exact_kernel``: the listed rows against all codes. Float32 differences leave the
   blocks of codes that could matter; float64, in the definition's order, decides.

Workspace: 2 bytes per element of the codebook, at most 24 bytes per code, 4 per row. Nothing is
read back to the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import interpreting, num_programs

METRICS = {"euclidean": 0, "cosine": 1, "dot": 2}
# float16 tiles of the whole D up to here stay in shared memory; beyond, D is walked in steps.
_WHOLE_D = 256
_STEP_D = 64


@triton.jit
def _reciprocal_power_of_two(x):
    """1 / 2^floor(log2 x) for normal x > 0; some number for others."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _centred(p_x, p_mean, mask, EUCLIDEAN: tl.constexpr, WIDE: tl.constexpr):
    """Rows less the mean, in float32 after one rounding of the difference."""
    b_x = tl.load(p_x, mask=mask, other=0.0)  # [BN, BD]
    if WIDE:
        b_x = b_x.to(tl.float64)
    else:
        b_x = b_x.to(tl.float32)
    if EUCLIDEAN:
        b_x = tl.where(mask, b_x - tl.load(p_mean, mask=mask, other=0.0), 0.0)
    return b_x.to(tl.float32)


@triton.jit(do_not_specialize=["N", "K"])
def nearest_code_screen_kernel(
    x_ptr,
    mean_ptr,  # [H, D]
    code_ptr,  # [H, K, D] float16, scaled
    term_ptr,  # [H, K] |scaled code|^2 / 2, or 0
    stats_ptr,  # [H, 4] scale, largest |scaled code|, largest residual, largest term
    index_ptr,  # [H, N]
    list_ptr,  # [H, N] rows that are not certain
    count_ptr,  # [H]
    N,
    K,
    D: tl.constexpr,
    stride_xh,
    stride_xn,
    stride_xd,
    EUCLIDEAN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head * stride_xh
    mean_ptr += head * D
    code_ptr += head * K * D
    term_ptr += head * K
    code_scale = tl.load(stats_ptr + head * 4)
    max_code = tl.load(stats_ptr + head * 4 + 1)
    max_residual = tl.load(stats_ptr + head * 4 + 2)
    max_term = tl.load(stats_ptr + head * 4 + 3)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + o_n.to(tl.int64)  # [BN]
        m_n = rows < N
        p_x = x_ptr + rows[:, None] * stride_xn + o_d[None, :].to(tl.int64) * stride_xd
        # Each row is scaled to between 1 and 2 in its largest element.
        largest = tl.zeros([BLOCK_N], tl.float32) + 1e-37
        for d in tl.static_range(0, D, BLOCK_D):
            m_x = m_n[:, None] & (d + o_d < D)[None, :]
            b_x = _centred(p_x + d * stride_xd, mean_ptr + (d + o_d)[None, :], m_x, EUCLIDEAN, WIDE)
            largest = tl.maximum(largest, tl.max(tl.abs(b_x), 1))
        scale = _reciprocal_power_of_two(largest)  # [BN]
        norm = tl.zeros([BLOCK_N], tl.float32)
        residual = tl.zeros([BLOCK_N], tl.float32)
        b_half = tl.zeros([BLOCK_N, BLOCK_D], tl.float16)
        for d in tl.static_range(0, D, BLOCK_D):
            m_x = m_n[:, None] & (d + o_d < D)[None, :]
            b_x = _centred(p_x + d * stride_xd, mean_ptr + (d + o_d)[None, :], m_x, EUCLIDEAN, WIDE)
            b_x = b_x * scale[:, None]
            b_half = b_x.to(tl.float16)
            b_error = b_x - b_half.to(tl.float32)
            norm += tl.sum(b_x * b_x, 1)
            residual += tl.sum(b_error * b_error, 1)
        norm = tl.sqrt(norm) * 1.001
        residual = tl.sqrt(residual) * 1.001
        ratio = scale / code_scale  # of the norm term's unit to the product's

        best = tl.full([BLOCK_N], float("-inf"), tl.float32)
        second = tl.full([BLOCK_N], float("-inf"), tl.float32)
        index = tl.zeros([BLOCK_N], tl.int32)
        for k in range(0, K, BLOCK_K):
            codes = k + o_k  # [BK]
            m_k = codes < K
            b_term = tl.load(term_ptr + codes, mask=m_k, other=0.0)
            p_c = code_ptr + codes[None, :].to(tl.int64) * D + o_d[:, None]
            b_score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for d in tl.static_range(0, D, BLOCK_D):
                if D > BLOCK_D:
                    m_x = m_n[:, None] & (d + o_d < D)[None, :]
                    b_x = _centred(
                        p_x + d * stride_xd, mean_ptr + (d + o_d)[None, :], m_x, EUCLIDEAN, WIDE
                    )
                    b_half = (b_x * scale[:, None]).to(tl.float16)
                b_c = tl.load(p_c + d, mask=m_k[None, :] & (d + o_d < D)[:, None], other=0.0)
                b_score = tl.dot(b_half, b_c, b_score)  # [BN, BK]
            b_score -= ratio[:, None] * b_term[None, :]
            b_score = tl.where(m_k[None, :], b_score, float("-inf"))
            top = tl.max(b_score, 1)
            where = tl.argmax(b_score, 1)
            rest = tl.max(tl.where(o_k[None, :] == where[:, None], float("-inf"), b_score), 1)
            second = tl.maximum(tl.maximum(second, rest), tl.minimum(best, top))
            index = tl.where(top > best, k + where, index)
            best = tl.maximum(best, top)

        # Rounding of the factors; of the sums, which tensor cores may truncate; of x - mean, the
        # norm terms and their difference.
        reach = norm * max_code
        bound = residual * max_code + (norm + residual) * max_residual
        bound += (D + 64) * 2.4e-7 * (reach + ratio * max_term)
        # Comparisons fail for NaN, and for infinities a difference is one.
        certain = (best - second > 2 * bound) & (bound < 1e30)
        tl.store(index_ptr + head * N + rows, index.to(tl.int64), mask=m_n)
        uncertain = m_n & (certain == 0)
        place = tl.atomic_add(
            count_ptr + head + tl.zeros([BLOCK_N], tl.int32), 1, mask=uncertain, sem="relaxed"
        )
        tl.store(list_ptr + head * N + place, rows.to(tl.int32), mask=uncertain)


@triton.jit
def _definition(
    p_x, p_c, m_x, m_c, D, stride_xd, stride_cd, METRIC: tl.constexpr, norm_x, norm_c, total
):
    """The metric in float64, dimension by dimension, smaller is nearer; shapes broadcast to
    that of ``total``, which is zero."""
    for d in range(0, D):
        b_x = tl.load(p_x + d * stride_xd, mask=m_x, other=0.0).to(tl.float64)
        b_c = tl.load(p_c + d * stride_cd, mask=m_c, other=0.0).to(tl.float64)
        if METRIC == 0:
            b_difference = b_x - b_c
            total += b_difference * b_difference
        else:
            total -= b_x * b_c
    if METRIC == 1:
        norms = norm_x * norm_c
        total = tl.where(norms == 0, tl.abs(total) * 0, total / norms)
    return total


@triton.jit
def _defined_norm(p_x, m_x, D, stride_xd, total):
    for d in range(0, D):
        b_x = tl.load(p_x + d * stride_xd, mask=m_x, other=0.0).to(tl.float64)
        total += b_x * b_x
    return tl.sqrt(total)


@triton.jit(do_not_specialize=["K"])
def nearest_code_norm_kernel(
    code_ptr,
    norm_ptr,  # [H, K] float64
    K,
    D,
    stride_ch,
    stride_ck,
    stride_cd,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    codes = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = codes < K
    p_c = code_ptr + head * stride_ch + codes * stride_ck
    norm = _defined_norm(p_c, m_k, D, stride_cd, tl.zeros([BLOCK_K], tl.float64))
    tl.store(norm_ptr + head * K + codes, norm, mask=m_k)


@triton.jit(do_not_specialize=["N", "K"])
def nearest_code_exact_kernel(
    x_ptr,
    code_ptr,
    norm_ptr,  # [H, K] of the codes, for cosine
    index_ptr,  # [H, N]
    list_ptr,
    count_ptr,
    N,
    K,
    D,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ch,
    stride_ck,
    stride_cd,
    METRIC: tl.constexpr,
    SCREEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head * stride_xh
    code_ptr += head * stride_ch
    count = tl.load(count_ptr + head)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    stride_xd = stride_xd.to(tl.int64)
    stride_cd = stride_cd.to(tl.int64)
    for first in range(tl.program_id(0) * BLOCK_N, count, tl.num_programs(0) * BLOCK_N):
        m_n = first + o_n < count
        rows = tl.load(list_ptr + head * N + first + o_n, mask=m_n, other=0).to(tl.int64)
        p_x = x_ptr + rows[:, None] * stride_xn  # [BN, 1]
        m_x = m_n[:, None]
        norm_x = tl.zeros([BLOCK_N, 1], tl.float64)
        if METRIC == 1:
            norm_x = _defined_norm(p_x, m_x, D, stride_xd, norm_x)
        best = tl.full([BLOCK_N], float("inf"), tl.float64)
        index = tl.zeros([BLOCK_N], tl.int64)
        first_nan = tl.zeros([BLOCK_N], tl.int64) + K
        for k in range(0, K, BLOCK_K):
            codes = (k + o_k).to(tl.int64)
            m_k = codes < K
            p_c = code_ptr + codes[None, :] * stride_ck  # [1, BK]
            m_c = m_k[None, :]
            needed = True
            if SCREEN:
                b_value = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                b_size = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for d in range(0, D):
                    b_x = tl.load(p_x + d * stride_xd, mask=m_x, other=0.0).to(tl.float32)
                    b_c = tl.load(p_c + d * stride_cd, mask=m_c, other=0.0).to(tl.float32)
                    if METRIC == 0:
                        b_difference = b_x - b_c
                        b_value += b_difference * b_difference
                    else:
                        b_value -= b_x * b_c
                        b_size += tl.abs(b_x * b_c)
                if METRIC == 0:
                    b_size = b_value
                b_error = (D + 8) * 1.2e-7 * b_size + 1e-36
                # Underflow is covered by the constant, overflow and NaN by the negation.
                far = (b_value - b_error).to(tl.float64) > best[:, None]
                needed = tl.max((m_x & m_c & (far == 0)).to(tl.int32)) > 0
            if needed:
                norm_c = tl.zeros([1, BLOCK_K], tl.float64)
                if METRIC == 1:
                    norm_c = tl.load(norm_ptr + head * K + codes[None, :], mask=m_c, other=1.0)
                b_value = _definition(
                    p_x, p_c, m_x, m_c, D, stride_xd, stride_cd, METRIC, norm_x, norm_c,
                    tl.zeros([BLOCK_N, BLOCK_K], tl.float64),
                )  # fmt: skip
                b_code = tl.zeros([BLOCK_N, BLOCK_K], tl.int64) + codes[None, :]
                b_nan = (b_value != b_value) & m_c
                first_nan = tl.minimum(first_nan, tl.min(tl.where(b_nan, b_code, K), 1))
                b_value = tl.where(m_c & (b_nan == 0), b_value, float("inf"))
                least = tl.min(b_value, 1)
                where = tl.min(tl.where(b_value == least[:, None], b_code, K), 1)
                # Codes come in order: of equal values the first stays.
                index = tl.where(least < best, where, index)
                best = tl.minimum(best, least)
        # NaN is nearest of all.
        index = tl.where(first_nan < K, first_nan, index)
        tl.store(index_ptr + head * N + rows, index, mask=m_n)


@triton.jit(do_not_specialize=["N", "K"])
def nearest_code_distance_kernel(
    x_ptr,
    code_ptr,
    norm_ptr,
    index_ptr,
    distance_ptr,
    N,
    K,
    D,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ch,
    stride_ck,
    stride_cd,
    METRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = rows < N
    index = tl.load(index_ptr + head * N + rows, mask=m_n, other=0)
    p_x = x_ptr + head * stride_xh + rows * stride_xn
    p_c = code_ptr + head * stride_ch + index * stride_ck
    stride_xd = stride_xd.to(tl.int64)
    stride_cd = stride_cd.to(tl.int64)
    norm_x = tl.zeros([BLOCK_N], tl.float64)
    norm_c = norm_x
    if METRIC == 1:
        norm_x = _defined_norm(p_x, m_n, D, stride_xd, norm_x)
        norm_c = tl.load(norm_ptr + head * K + index, mask=m_n, other=1.0)
    value = _definition(
        p_x, p_c, m_n, m_n, D, stride_xd, stride_cd, METRIC, norm_x, norm_c,
        tl.zeros([BLOCK_N], tl.float64),
    )  # fmt: skip
    if METRIC != 0:
        value = 0.0 - value
    p_distance = distance_ptr + head * N + rows
    tl.store(p_distance, value.to(distance_ptr.dtype.element_ty), mask=m_n)


SCREEN_CONFIGS = [
    triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for n, k, warps, stages in ((128, 128, 8, 2), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 2))
]


def shared_memory(block_n: int, block_k: int, block_d: int, num_stages: int) -> int:
    """Bytes of the screening's float16 tiles, [BN, BD] once and [BD, BK] for each stage."""
    return 2 * block_d * (block_n + block_k * num_stages)


def _fitting(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Configurations whose tiles fit this device's shared memory."""
    device = torch.cuda.current_device()
    limit = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    fitting = [
        c
        for c in configs
        if shared_memory(**_sizes(c), block_d=arguments["BLOCK_D"]) < 0.9 * limit
    ]
    return fitting or configs[-1:]


def _sizes(config: triton.Config) -> dict[str, int]:
    return {
        "block_n": config.kwargs["BLOCK_N"],
        "block_k": config.kwargs["BLOCK_K"],
        "num_stages": config.num_stages,
    }


# Interpreting, nothing is to be gained from a search.
_screen = triton.autotune(
    [triton.Config({"BLOCK_N": 32, "BLOCK_K": 32})] if interpreting() else SCREEN_CONFIGS,
    key=["D", "EUCLIDEAN", "WIDE"],
    prune_configs_by={} if interpreting() else {"early_config_prune": _fitting},
    reset_to_zero=["count_ptr"],
)(nearest_code_screen_kernel)


def _pack(codebook: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (H, D), scaled float16 codes (H, K, D), their norm terms (H, K), and statistics (H, 4)
    for codes (H, K, D)."""
    wide = codebook.dtype == torch.float64
    codes = codebook if wide else codebook.float()
    if metric == "cosine":
        norm = torch.linalg.vector_norm(codes, dim=2, keepdim=True)
        codes = torch.where(norm > 0, codes / norm, 0)
    mean = codes.mean(1)  # [H, D]
    centred = (codes - mean[:, None]).float()  # [H, K, D]
    largest = centred.abs().amax((1, 2)).clamp_min(1e-37)  # [H]
    _, exponent = torch.frexp(largest)
    scale = torch.ldexp(torch.ones_like(largest), 1 - exponent)  # [H]
    centred *= scale[:, None, None]
    half = centred.half()
    squares = centred.square().sum(2)  # [H, K]
    residual = (centred - half.float()).square().sum(2)
    terms = squares / 2 if metric == "euclidean" else torch.zeros_like(squares)
    statistics = torch.stack(
        [scale, squares.amax(1).sqrt() * 1.001, residual.amax(1).sqrt() * 1.001, terms.amax(1)], 1
    )
    return mean, half, terms, statistics


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.nearest_code`` on checked arguments."""
    shape = x.shape[:-1]
    codes = codebook if codebook.dim() == 3 else codebook[None]  # [H, K, D]
    num_heads, num_codes, num_dims = codes.shape
    rows = x.reshape(num_heads, -1, num_dims)  # [H, N, D]
    num_rows = rows.shape[1]
    wide = torch.float64 in (x.dtype, codebook.dtype)
    indices = x.new_empty((num_heads, num_rows), dtype=torch.int64)
    distances = x.new_empty(
        (num_heads, num_rows), dtype=torch.float64 if wide else torch.float32
    )
    if indices.numel() == 0:
        return indices.view(shape), distances.view(shape)
    metric_code = METRICS[metric]
    mean, half, terms, statistics = _pack(codes, metric)
    uncertain = x.new_empty((num_heads, num_rows), dtype=torch.int32)
    count = x.new_zeros(num_heads, dtype=torch.int32)
    norms = x.new_empty((num_heads, num_codes if metric == "cosine" else 0), dtype=torch.float64)
    if metric == "cosine":
        nearest_code_norm_kernel[(triton.cdiv(num_codes, 128), num_heads)](
            codes, norms, num_codes, num_dims, *codes.stride(), BLOCK_K=128, enable_fp_fusion=False
        )
    block_d = max(16, triton.next_power_of_2(num_dims)) if num_dims <= _WHOLE_D else _STEP_D
    programs = num_programs(x.device)
    _screen[lambda meta: (min(programs, triton.cdiv(num_rows, meta["BLOCK_N"])), num_heads)](
        rows, mean, half, terms, statistics, indices, uncertain, count,
        num_rows, num_codes, num_dims, *rows.stride(),
        EUCLIDEAN=metric == "euclidean", WIDE=wide, BLOCK_D=block_d,
    )  # fmt: skip
    both = (num_rows, num_codes, num_dims, *rows.stride(), *codes.stride())
    nearest_code_exact_kernel[(programs, num_heads)](
        rows, codes, norms, indices, uncertain, count, *both,
        METRIC=metric_code, SCREEN=not wide and metric != "cosine", BLOCK_N=16, BLOCK_K=64,
        enable_fp_fusion=False,
    )  # fmt: skip
    nearest_code_distance_kernel[(triton.cdiv(num_rows, 128), num_heads)](
        rows, codes, norms, indices, distances, *both,
        METRIC=metric_code, BLOCK_N=128, enable_fp_fusion=False,
    )  # fmt: skip
    return indices.view(shape), distances.view(shape)
