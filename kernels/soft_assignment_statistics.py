"""Soft assignment statistics in Triton: logits in tiles on the chip, computed as often as needed.

Vectors and codes are float32, less the codes' mean, multiplied without TF32; where both have the
same half precision they are multiplied as they are, on tensor cores. Vectors for the cosine are
normalised first.

Forward:

1. ``soft_assignment_rows_kernel``: a block of rows meets tile after tile of codes, twice: for the
   largest logit and the sum of exponentials, then for the probabilities, whose sums over the rows
   go to a line of K sums that is the program's own. A program has several blocks of rows where
   the lines would be too many.
2. The lines are added in float64.

Backward:

1. ``soft_assignment_row_gradient_kernel``: a block of rows meets all codes, for the mean of the
   probabilities' gradients, and again for the gradient of x.
2. ``soft_assignment_code_gradient_kernel``: a block of codes meets the rows, in slices of rows
   whose sums are added in float64.

No float is added by an atomic, and nothing is read back to the host. Workspace: at most 1024 lines
of K float32, or one for each mean; backward 8 bytes per row, and for each slice of 4096 rows, of
which there are at most 64, the size of the codebook; for the cosine x in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import at_most, dot, interpreting, strides

_KINDS = {"euclidean": 0, "distance": 1, "cosine": 2, "dot": 2}
_EUCLIDEAN = tl.constexpr(0)
_DISTANCE = tl.constexpr(1)
_DOT = tl.constexpr(2)
_LEAST_SQUARE = tl.constexpr(1e-8)
_LEAST_DISTANCE = tl.constexpr(1e-4)
# These decide the order of the sums, and with it the last bits.
_MOST_LINES = 1024
_SLICE = 4096
_MOST_SLICES = 64


@triton.jit
def _load_rows(p_x, stride_xd, centre_ptr, m_n, d, D, CENTRED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions from d on, [BN, BD]: centred in the codes' dtype, or as they are.

    Behind D the last one is repeated, which the zeros in the codes take out: a mask for each column
    would be kept in registers through the loop over the codes.
    """
    columns = d + tl.arange(0, BLOCK_D)[None, :]
    there = tl.minimum(columns, D - 1).to(tl.int64)
    b_x = tl.load(p_x + there * stride_xd, mask=m_n, other=0.0)
    if CENTRED:
        b_centre = tl.load(centre_ptr + columns)
        b_x = tl.where(m_n, b_x.to(b_centre.dtype) - b_centre, 0.0)
    return b_x


@triton.jit
def _of_rows(
    p_x,
    stride_xd,
    centre_ptr,
    m_n,
    D,
    KIND: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """[BN, 1] that logits need: squares for the distance; else by how much centring would lower
    them, where that is not done."""
    b_total = tl.zeros([BLOCK_N, BLOCK_D], centre_ptr.dtype.element_ty)
    if KIND == _DISTANCE or not CENTRED:
        for d in range(0, WIDTH, BLOCK_D):
            b_x = _load_rows(p_x, stride_xd, centre_ptr, m_n, d, D, CENTRED, BLOCK_D)
            b_x = b_x.to(b_total.dtype)
            columns = d + tl.arange(0, BLOCK_D)[None, :]
            if KIND == _DISTANCE:
                b_total += tl.where(columns < D, b_x * b_x, 0.0)
            else:
                b_centre = tl.load(centre_ptr + columns)
                if KIND == _EUCLIDEAN:
                    b_total += b_centre * (2 * b_x - b_centre)
                else:
                    b_total += b_centre * b_x
    return tl.sum(b_total, 1)[:, None]


@triton.jit
def _logits(
    p_x,
    b_x,
    of_rows,
    stride_xd,
    centre_ptr,
    m_n,
    code_ptr,
    term_ptr,
    k,
    D,
    KIND: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """[BN, BK] of the codes from k on. b_x: the rows, where they fit into one block."""
    codes = k + tl.arange(0, BLOCK_K)[None, :]
    b_term = tl.load(term_ptr + codes)
    b_logit = tl.zeros([BLOCK_N, BLOCK_K], term_ptr.dtype.element_ty)
    for d in range(0, WIDTH, BLOCK_D):
        rows = d + tl.arange(0, BLOCK_D)[:, None]
        b_c = tl.load(code_ptr + codes.to(tl.int64) * WIDTH + rows)  # [BD, BK]
        if WIDTH == BLOCK_D:
            b_logit = dot(b_x, b_c, b_logit, "ieee")
        else:
            b_step = _load_rows(p_x, stride_xd, centre_ptr, m_n, d, D, CENTRED, BLOCK_D)
            b_logit = dot(b_step, b_c, b_logit, "ieee")
    if KIND == _DISTANCE:
        b_square = of_rows + b_term - 2 * b_logit
        b_square = tl.where(b_square < _LEAST_SQUARE, _LEAST_SQUARE, b_square)
        b_logit = -tl.sqrt(b_square)
    else:
        if KIND == _EUCLIDEAN:
            b_logit = 2 * b_logit
        b_logit += b_term
        if not CENTRED:
            b_logit -= of_rows
    return b_logit


@triton.jit
def _logarithm(b_logit, largest, log_sum, inverse):
    """Of the probabilities; what is as good as log 0 is finite."""
    b_log = (b_logit - largest) * inverse - log_sum
    least: tl.constexpr = -800.0 if b_log.dtype == tl.float64 else -200.0
    b_log = tl.where(b_log < least, least, b_log)
    # Above only where logits round otherwise than in the forward.
    return tl.where(b_log > 0, 0.0, b_log)


@triton.jit(
    do_not_specialize=[
        "G", "N", "K", "D", "lines", "blocks", "stride_xh", "stride_xg", "stride_xn"
    ]
)  # fmt: skip
def soft_assignment_rows_kernel(
    x_ptr,
    centre_ptr,  # [H, WIDTH]
    code_ptr,  # [H, K, WIDTH], zeros behind D; K is a multiple of BLOCK_K
    term_ptr,  # [H, K], no probability for the codes that fill it
    weight_ptr,  # [H, G, N]
    saved_ptr,  # [H, G, N, 2]
    line_ptr,  # [H, G, lines, K], sums of probabilities
    entropy_ptr,  # [H, G, lines] float64
    inverse_ptr,  # of the temperature
    G,
    N,
    K,
    D,
    lines,
    blocks,  # of rows, for each line
    stride_xh,
    stride_xg,
    stride_xn,
    stride_xd,
    KIND: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    dtype: tl.constexpr = term_ptr.dtype.element_ty
    inverse = tl.load(inverse_ptr)
    line = tl.program_id(0).to(tl.int64)
    group = line // lines  # of all heads
    head = group // G
    code_ptr += head * K * WIDTH
    term_ptr += head * K
    centre_ptr += head * WIDTH
    p_line = line_ptr + line * K
    entropy = tl.zeros([], tl.float64)
    for block in range(blocks):
        rows = (line % lines * blocks + block) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        inside = rows < N
        weight = tl.load(weight_ptr + group * N + rows, mask=inside, other=0.0)  # [BN, 1]
        m_n = inside & (weight != 0)
        p_x = x_ptr + head * stride_xh + group % G * stride_xg + rows * stride_xn
        of_rows = _of_rows(
            p_x, stride_xd, centre_ptr, m_n, D, KIND, CENTRED, BLOCK_N, BLOCK_D, WIDTH
        )
        b_x = _load_rows(p_x, stride_xd, centre_ptr, m_n, 0, D, CENTRED, BLOCK_D)
        largest = tl.full([BLOCK_N, 1], float("-inf"), dtype)
        total = tl.zeros([BLOCK_N, 1], dtype)
        for k in range(0, K, BLOCK_K):
            b_logit = _logits(
                p_x, b_x, of_rows, stride_xd, centre_ptr, m_n, code_ptr, term_ptr, k, D,
                KIND, CENTRED, BLOCK_N, BLOCK_K, BLOCK_D, WIDTH,
            )  # fmt: skip
            new = tl.maximum(largest, tl.max(b_logit, 1)[:, None])
            b_part = tl.exp((b_logit - new) * inverse)
            total = total * tl.exp((largest - new) * inverse) + tl.sum(b_part, 1)[:, None]
            largest = new
        log_sum = tl.log(total)
        largest = tl.where(log_sum == log_sum, largest, log_sum)
        p_saved = saved_ptr + (group * N + rows) * 2
        tl.store(p_saved, tl.where(m_n, largest, 0.0), mask=inside)
        tl.store(p_saved + 1, tl.where(m_n, log_sum, 0.0), mask=inside)
        own = tl.zeros([BLOCK_N, 1], dtype)
        for k in range(0, K, BLOCK_K):
            b_logit = _logits(
                p_x, b_x, of_rows, stride_xd, centre_ptr, m_n, code_ptr, term_ptr, k, D,
                KIND, CENTRED, BLOCK_N, BLOCK_K, BLOCK_D, WIDTH,
            )  # fmt: skip
            b_log = _logarithm(b_logit, largest, log_sum, inverse)
            b_p = tl.exp(b_log)
            own -= tl.sum(b_p * b_log, 1)[:, None]
            codes = k + tl.arange(0, BLOCK_K)
            b_sum = tl.sum(weight * b_p, 0)
            if block > 0:
                b_sum += tl.load(p_line + codes)
            tl.store(p_line + codes, b_sum)
        entropy += tl.sum(tl.where(m_n, weight * own, 0.0).to(tl.float64))
        tl.debug_barrier()  # before the line is read again
    tl.store(entropy_ptr + line, entropy)


@triton.jit
def _through(
    b_logit,
    b_mean,
    e,
    largest,
    log_sum,
    scale,
    less,
    inverse,
    KIND: tl.constexpr,
):
    """Gradients of logits, or for the distance of half its square."""
    b_log = _logarithm(b_logit, largest, log_sum, inverse)
    b_q = scale * tl.exp(b_log) * (b_mean - e * b_log - less)
    if KIND == _DISTANCE:
        b_q = tl.where(b_logit >= -_LEAST_DISTANCE, 0.0, b_q / -b_logit)
    return b_q


@triton.jit(
    do_not_specialize=[
        "G", "N", "K", "D", "stride_xh", "stride_xg", "stride_xn",
    ]
)  # fmt: skip
def soft_assignment_row_gradient_kernel(
    mean_ptr,  # [H, G, K] gradients, if MEANS
    entropy_ptr,  # [H, G], if ENTROPY
    x_ptr,
    centre_ptr,
    code_ptr,
    term_ptr,
    scale_ptr,  # [H, G, N]: weights over their sum and the temperature
    saved_ptr,
    less_ptr,  # [H, G, N]: what gradients of log probabilities are taken less
    grad_ptr,  # [H, G, N, D], if NEED_X
    inverse_ptr,
    G,
    N,
    K,
    D,
    stride_xh,
    stride_xg,
    stride_xn,
    stride_xd,
    MEANS: tl.constexpr,
    ENTROPY: tl.constexpr,
    NEED_X: tl.constexpr,
    KIND: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    dtype: tl.constexpr = term_ptr.dtype.element_ty
    inverse = tl.load(inverse_ptr)
    place = tl.program_id(0).to(tl.int64)
    group = place // tl.cdiv(N, BLOCK_N)
    rows = place % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    head = group // G
    code_ptr += head * K * WIDTH
    term_ptr += head * K
    centre_ptr += head * WIDTH
    inside = rows < N
    scale = tl.load(scale_ptr + group * N + rows, mask=inside, other=0.0)
    m_n = inside & (scale != 0)
    p_saved = saved_ptr + (group * N + rows) * 2
    largest = tl.load(p_saved, mask=m_n, other=0.0)
    log_sum = tl.load(p_saved + 1, mask=m_n, other=0.0)
    p_x = x_ptr + head * stride_xh + group % G * stride_xg + rows * stride_xn
    of_rows = _of_rows(p_x, stride_xd, centre_ptr, m_n, D, KIND, CENTRED, BLOCK_N, BLOCK_D, WIDTH)
    b_x = _load_rows(p_x, stride_xd, centre_ptr, m_n, 0, D, CENTRED, BLOCK_D)
    e = tl.load(entropy_ptr + group) if ENTROPY else tl.zeros([], dtype)
    less = tl.zeros([BLOCK_N, 1], dtype)
    for k in range(0, K, BLOCK_K):
        codes = k + tl.arange(0, BLOCK_K)[None, :]
        b_mean = tl.zeros([1, BLOCK_K], dtype)
        if MEANS:
            b_mean = tl.load(mean_ptr + group * K + codes)
        b_logit = _logits(
            p_x, b_x, of_rows, stride_xd, centre_ptr, m_n, code_ptr, term_ptr, k, D,
            KIND, CENTRED, BLOCK_N, BLOCK_K, BLOCK_D, WIDTH,
        )  # fmt: skip
        b_log = _logarithm(b_logit, largest, log_sum, inverse)
        less += tl.sum(tl.exp(b_log) * (b_mean - e * b_log), 1)[:, None]
    first = tl.program_id(1) * BLOCK_D
    if first == 0:
        tl.store(less_ptr + group * N + rows, less, mask=inside)
    if NEED_X:
        o_d = first + tl.arange(0, BLOCK_D)[None, :]
        b_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        row_sum = tl.zeros([BLOCK_N, 1], dtype)
        for k in range(0, K, BLOCK_K):
            codes = k + tl.arange(0, BLOCK_K)[None, :]
            b_mean = tl.zeros([1, BLOCK_K], dtype)
            if MEANS:
                b_mean = tl.load(mean_ptr + group * K + codes)
            b_logit = _logits(
                p_x, b_x, of_rows, stride_xd, centre_ptr, m_n, code_ptr, term_ptr, k, D,
                KIND, CENTRED, BLOCK_N, BLOCK_K, BLOCK_D, WIDTH,
            )  # fmt: skip
            b_q = _through(b_logit, b_mean, e, largest, log_sum, scale, less, inverse, KIND)
            lines = k + tl.arange(0, BLOCK_K)[:, None]
            b_c = tl.load(code_ptr + lines.to(tl.int64) * WIDTH + o_d).to(dtype)  # [BK, BD]
            if not CENTRED:
                b_c -= tl.load(centre_ptr + o_d)
            b_grad = dot(b_q, b_c, b_grad, PRECISION)
            if KIND == _DISTANCE:
                row_sum += tl.sum(b_q, 1)[:, None]
        if KIND == _EUCLIDEAN:
            b_grad = 2 * b_grad
        if KIND == _DISTANCE:
            b_own = _load_rows(p_x, stride_xd, centre_ptr, m_n, first, D, True, BLOCK_D)
            b_grad -= row_sum * b_own
        b_grad = tl.where(m_n, b_grad, 0.0)
        p_grad = grad_ptr + (group * N + rows) * D + o_d
        tl.store(p_grad, b_grad, mask=inside & (o_d < D))


@triton.jit(
    do_not_specialize=[
        "G", "N", "K", "D", "slices", "blocks", "stride_xh", "stride_xg", "stride_xn",
    ]
)  # fmt: skip
def soft_assignment_code_gradient_kernel(
    mean_ptr,
    entropy_ptr,
    x_ptr,
    centre_ptr,
    code_ptr,
    term_ptr,
    scale_ptr,
    saved_ptr,
    less_ptr,
    part_ptr,  # [H, slices, K, WIDTH]
    sum_ptr,  # [H, slices, K], of the columns
    inverse_ptr,
    G,
    N,
    K,
    D,
    slices,
    blocks,  # of rows, for each slice
    stride_xh,
    stride_xg,
    stride_xn,
    stride_xd,
    MEANS: tl.constexpr,
    ENTROPY: tl.constexpr,
    KIND: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    dtype: tl.constexpr = term_ptr.dtype.element_ty
    inverse = tl.load(inverse_ptr)
    place = tl.program_id(0).to(tl.int64)
    k = place % tl.cdiv(K, BLOCK_K) * BLOCK_K
    slice = place // tl.cdiv(K, BLOCK_K)  # of all heads
    head = slice // slices
    code_ptr += head * K * WIDTH
    term_ptr += head * K
    centre_ptr += head * WIDTH
    codes = k + tl.arange(0, BLOCK_K)[None, :]
    first = tl.program_id(1) * BLOCK_D
    b_part = tl.zeros([BLOCK_K, BLOCK_D], dtype)
    b_sum = tl.zeros([BLOCK_K], dtype)
    all_of_head = tl.full([], N, tl.int64) * G
    for block in range(blocks):
        # Of the head's rows.
        rows = (slice % slices * blocks + block) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        inside = rows < all_of_head
        all_rows = head * all_of_head + rows
        scale = tl.load(scale_ptr + all_rows, mask=inside, other=0.0)
        m_n = inside & (scale != 0)
        largest = tl.load(saved_ptr + all_rows * 2, mask=m_n, other=0.0)
        log_sum = tl.load(saved_ptr + all_rows * 2 + 1, mask=m_n, other=0.0)
        less = tl.load(less_ptr + all_rows, mask=m_n, other=0.0)
        group = head * G + rows // N
        p_x = x_ptr + head * stride_xh + rows // N * stride_xg + rows % N * stride_xn
        of_rows = _of_rows(
            p_x, stride_xd, centre_ptr, m_n, D, KIND, CENTRED, BLOCK_N, BLOCK_D, WIDTH
        )
        b_x = _load_rows(p_x, stride_xd, centre_ptr, m_n, 0, D, CENTRED, BLOCK_D)
        b_logit = _logits(
            p_x, b_x, of_rows, stride_xd, centre_ptr, m_n, code_ptr, term_ptr, k, D,
            KIND, CENTRED, BLOCK_N, BLOCK_K, BLOCK_D, WIDTH,
        )  # fmt: skip
        e = tl.load(entropy_ptr + group, mask=m_n, other=0.0) if ENTROPY else less * 0
        b_mean = tl.zeros([1, BLOCK_K], dtype)
        if MEANS:
            b_mean = tl.load(mean_ptr + group * K + codes, mask=m_n, other=0.0)
        b_q = _through(b_logit, b_mean, e, largest, log_sum, scale, less, inverse, KIND)
        b_own = _load_rows(p_x, stride_xd, centre_ptr, m_n, first, D, KIND != _DOT, BLOCK_D)
        b_part = dot(tl.trans(b_q), b_own.to(dtype), b_part, PRECISION)
        b_sum += tl.sum(b_q, 0)
    if first == 0:
        own_codes = k + tl.arange(0, BLOCK_K)
        tl.store(sum_ptr + slice * K + own_codes, b_sum)
    lines = k + tl.arange(0, BLOCK_K)[:, None]
    o_d = first + tl.arange(0, BLOCK_D)[None, :]
    tl.store(part_ptr + (slice * K + lines) * WIDTH + o_d, b_part)


class _Prepared(NamedTuple):
    """What the kernels compare. Codes are filled to whole tiles, K' x WIDTH."""

    rows: Tensor  # [H, G, N, D]
    centre: Tensor  # [H, WIDTH]
    codes: Tensor  # [H, K', WIDTH]
    terms: Tensor  # [H, K']
    num_codes: int
    row_factor: Tensor | None  # what they were multiplied with, [H, G, N, 1] and [H, K, 1]
    code_factor: Tensor | None
    constants: dict[str, Any]  # compile-time arguments, and the launch's options

    def arguments(self) -> tuple[Tensor, ...]:
        return self.rows, self.centre, self.codes, self.terms

    def scalar(self, value: float) -> Tensor:
        """For the kernels, which take numbers as float32 only."""
        return torch.full((1,), value, dtype=self.terms.dtype, device=self.terms.device)

    def own_codes(self) -> Tensor:
        """The codes less their mean, (H, K, D) in float64."""
        codes = self.codes[:, : self.num_codes].double()
        if not self.constants["CENTRED"]:
            codes = codes - self.centre[:, None]
        return codes[..., : self.rows.shape[-1]]


def _constants(num_dims: int, kind: int, centred: bool, wide: bool) -> dict[str, Any]:
    tile = (16, 16, 16) if wide else (32, 32, 32)
    if interpreting():
        tile = (64, 64, 32)  # its time goes by the number of tiles
    block_d = min(max(16, triton.next_power_of_2(num_dims)), tile[2])
    return {
        "KIND": kind,
        "CENTRED": centred,
        "BLOCK_N": tile[0],
        "BLOCK_K": tile[1],
        "BLOCK_D": block_d,
        "WIDTH": triton.cdiv(num_dims, block_d) * block_d,
        "num_stages": 1,
        "num_warps": 4 if wide else 8,
        **at_most(255),
    }


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = x.norm(dim=-1, keepdim=True)
    factor = torch.where(norm == 0, 0, 1 / norm)
    return x * factor, factor


def _prepare(x: Tensor, codebook: Tensor, metric: str, batch_dims: int) -> _Prepared:
    own = codebook if codebook.dim() == 3 else codebook[None]
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    num_heads, num_codes, num_dims = own.shape
    heads = codebook.dim() - 2
    groups = x.shape[heads : heads + batch_dims].numel()
    count = x.shape[heads + batch_dims : -1].numel()
    rows = x.reshape(num_heads, groups, count, num_dims)
    codes, row_factor, code_factor = own.double(), None, None
    # Centred or normalised they would not be half precision any more.
    half = x.dtype == codebook.dtype and x.dtype.itemsize == 2 and metric != "cosine"
    constants = _constants(num_dims, _KINDS[metric], not half, dtype == torch.float64)
    centre = codes.new_zeros(num_heads, num_dims) if metric == "cosine" else codes.mean(1)
    centre = centre.to(dtype)
    if metric == "cosine":
        rows, row_factor = _unit(rows.to(dtype))
        codes, code_factor = _unit(codes)
    if not half:
        codes = (codes - centre[:, None]).to(dtype).double()
        if metric == "dot":
            centre.zero_()  # of x, whose centring would change the products' differences
    sign = {"euclidean": -1, "distance": 1}.get(metric, 0)
    block_k, width = constants["BLOCK_K"], constants["WIDTH"]
    padded = triton.cdiv(num_codes, block_k) * block_k
    filled = x.new_zeros((num_heads, padded, width), dtype=x.dtype if half else dtype)
    filled[:, :num_codes, :num_dims] = codes
    # No probability for the codes that fill a tile.
    terms = filled.new_full(filled.shape[:2], torch.inf if sign == 1 else -torch.inf, dtype=dtype)
    terms[:, :num_codes] = sign * codes.square().sum(2)
    wide_centre = filled.new_zeros(num_heads, width, dtype=dtype)
    wide_centre[:, :num_dims] = centre
    return _Prepared(
        rows, wide_centre, filled, terms, num_codes, row_factor, code_factor, constants
    )


def _weights(prepared: _Prepared, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(H, G, N), and their sums (H, G) in float64."""
    rows, dtype = prepared.rows, prepared.terms.dtype
    if weights is None:
        ones = torch.ones(rows.shape[:3], dtype=dtype, device=rows.device)
        return ones, ones.new_full(rows.shape[:2], rows.shape[2], dtype=torch.float64)
    weights = weights.reshape(rows.shape[:3]).contiguous()
    return weights, weights.sum(2, dtype=torch.float64)


def soft_assignment_statistics(
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    temperature: float,
    metric: str,
    batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mmfast.soft_assignment_statistics`` on checked arguments."""
    prepared = _prepare(x, codebook, metric, batch_dims)
    num_heads, groups, num_rows, num_dims = prepared.rows.shape
    num_codes, dtype = prepared.num_codes, prepared.terms.dtype
    lead = x.shape[: codebook.dim() - 2 + batch_dims]
    saved = x.new_empty((*x.shape[:-1], 2), dtype=dtype)
    if saved.numel() == 0:
        return x.new_zeros((*lead, num_codes), dtype=dtype), x.new_zeros(lead, dtype=dtype), saved
    each, totals = _weights(prepared, weights)
    constants, padded = prepared.constants, prepared.codes.shape[1]
    blocks = triton.cdiv(num_rows, constants["BLOCK_N"])
    per_line = triton.cdiv(blocks, max(1, _MOST_LINES // (num_heads * groups)))
    lines = triton.cdiv(blocks, per_line)
    sums = each.new_empty(num_heads, groups, lines, padded)
    entropies = each.new_empty(num_heads, groups, lines, dtype=torch.float64)
    soft_assignment_rows_kernel[(num_heads * groups * lines,)](
        *prepared.arguments(), each, saved, sums, entropies, prepared.scalar(1 / temperature),
        groups, num_rows, padded, num_dims, lines, per_line, *strides(prepared.rows),
        **constants,
    )  # fmt: skip
    added = sums.sum(2, dtype=torch.float64)[..., :num_codes]
    means = torch.where(totals[..., None] == 0, 0, added / totals[..., None])
    entropy = torch.where(totals == 0, 0, entropies.sum(2) / totals)
    return means.to(dtype).reshape(*lead, num_codes), entropy.to(dtype).reshape(lead), saved


def soft_assignment_statistics_bwd(
    means: Tensor | None,
    entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    saved: Tensor,
    temperature: float,
    metric: str,
    batch_dims: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.soft_assignment_statistics_bwd`` on checked arguments."""
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_codebook = codebook.new_empty(codebook.shape if need_codebook else (0,))
    if saved.numel() == 0:
        return grad_x, grad_codebook.zero_()
    prepared = _prepare(x, codebook, metric, batch_dims)
    num_heads, groups, num_rows, num_dims = prepared.rows.shape
    padded, dtype = prepared.codes.shape[1], prepared.terms.dtype
    each, totals = _weights(prepared, weights)
    shares = torch.where(totals == 0, 0, 1 / (totals * temperature))[..., None]
    scale = torch.where(each == 0, 0, (each * shares).to(dtype))
    constants = prepared.constants
    options = {
        "MEANS": means is not None,
        "ENTROPY": entropy is not None,
        # What has half a float32's precision loses nothing in TF32, and no gradient its range.
        "PRECISION": "ieee" if constants["CENTRED"] else "tf32",
        **constants,
    }
    # In place of what is not there any tensor, which is not read.
    given = (
        scale if means is None else _filled(means, padded),
        scale if entropy is None else entropy.contiguous(),
        *prepared.arguments(),
        scale,
        saved.contiguous(),
    )
    sizes = (prepared.scalar(1 / temperature), groups, num_rows, padded, num_dims)
    less = scale.new_empty(scale.shape)
    passes = triton.cdiv(num_dims, constants["BLOCK_D"])
    through_norm = prepared.row_factor is not None
    to_x = prepared.rows.new_empty(prepared.rows.shape) if through_norm else grad_x
    soft_assignment_row_gradient_kernel[
        (num_heads * groups * triton.cdiv(num_rows, constants["BLOCK_N"]), passes if need_x else 1)
    ](
        *given, less, to_x, *sizes, *strides(prepared.rows), NEED_X=need_x, **options
    )  # fmt: skip
    if need_x and through_norm:
        grad_x.copy_(_through_norm(to_x, prepared.rows, prepared.row_factor).view(x.shape))
    if not need_codebook:
        return grad_x, grad_codebook
    blocks = triton.cdiv(groups * num_rows, constants["BLOCK_N"])
    slices = min(triton.cdiv(groups * num_rows, _SLICE), _MOST_SLICES)
    per_slice = triton.cdiv(blocks, slices)
    parts = scale.new_empty(num_heads, slices, padded, constants["WIDTH"])
    sums = scale.new_empty(num_heads, slices, padded)
    soft_assignment_code_gradient_kernel[
        (num_heads * slices * (padded // constants["BLOCK_K"]), passes)
    ](
        *given, less, parts, sums, *sizes, slices, per_slice, *strides(prepared.rows), **options
    )  # fmt: skip
    codes = prepared.own_codes()
    to_codes = parts.sum(1, dtype=torch.float64)[:, : codes.shape[1], :num_dims]
    of_columns = sums.sum(1, dtype=torch.float64)[:, : codes.shape[1], None]
    if metric == "euclidean":
        to_codes = 2 * (to_codes - of_columns * codes)
    elif metric == "distance":
        to_codes = to_codes - of_columns * codes
    elif prepared.code_factor is not None:
        to_codes = _through_norm(to_codes, codes, prepared.code_factor)
    grad_codebook.copy_(to_codes.view(codebook.shape))
    return grad_x, grad_codebook


def _filled(t: Tensor, width: int) -> Tensor:
    """(..., width), zeros behind what ``t`` has."""
    return torch.nn.functional.pad(t, (0, width - t.shape[-1])).contiguous()


def _through_norm(grad: Tensor, unit: Tensor, factor: Tensor) -> Tensor:
    """From the gradient of a vector of norm 1 to that of the one it was made of."""
    return factor * (grad - (grad * unit).sum(-1, keepdim=True) * unit)


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dims: int, dtype: torch.dtype, metric: str, quick: bool) -> Variant:
        def launch(n: int, k: int) -> None:
            x, codebook = (torch.ones(rows, dims, dtype=dtype) for rows in (n, k))
            options = 1.0, metric, 0
            means, entropy, saved = soft_assignment_statistics(x, codebook, None, *options)
            soft_assignment_statistics_bwd(
                means, entropy, x, codebook, None, saved, *options, True, True
            )

        name = f"soft_assignment_statistics: {metric}, {dtype}, D {dims}"
        half = dtype.itemsize == 2 and metric != "cosine"
        return Variant(
            name.replace("torch.", ""),
            launch,
            matrix=frozenset(
                f"soft_assignment_{kernel}_kernel"
                for kernel in ("rows", "row_gradient", "code_gradient")
                if half
            ),
            quick=quick,
        )

    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    some = {(256, torch.float16, "euclidean"), (7, torch.float32, "euclidean")}
    cases = [(d, t, "euclidean") for t in dtypes for d in (7, 64, 256)]
    cases += [(32, t, m) for m in ("distance", "dot") for t in dtypes if t != torch.float16]
    return [variant(*case, case in some) for case in cases]
