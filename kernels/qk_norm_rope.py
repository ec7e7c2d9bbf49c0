"""Heads normalised and rotated in Triton: a program has some heads, or all of a token's.

A head is held as two halves, the first and the second numbers of its pairs: they are split from one
tile where they are neighbours, and loaded by themselves where they are not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import (
    at_most,
    ceil_div,
    common_multiple,
    device_kind,
    multiple,
    num_programs,
    num_threads,
    pipelined,
    rounded,
)
from mmfast.kernels.launching import launch

_TILE = 2048
_FAR = 1 << 30  # numbers, from which on places are counted in 64 bits
_MOST_PARTS = 384  # of a sum over tokens; programs of the backward, three for a multiprocessor


@triton.jit
def _places(
    start, total, length, heads, BLOCK_N: tl.constexpr, ACROSS: tl.constexpr, TOKENS: tl.constexpr
):
    """Sample, token, head and mask of the rows from start on, [BLOCK_N, 1], in start's type.
    TOKENS: they are next to each other, not heads."""
    o_n = tl.arange(0, BLOCK_N)[:, None]
    if ACROSS:
        b, t = _divided(start + tl.zeros_like(o_n).to(start.dtype), length)
        h = o_n.to(start.dtype)
        mask = o_n < heads
    else:
        n = start + o_n
        mask = n < total
        if TOKENS:
            rest, t = _divided(n, length)
            b, h = _divided(rest, heads)
        else:
            rest, h = _divided(n, heads)
            b, t = _divided(rest, length)
    return b, t, h, mask


@triton.jit
def _divided(n, by):
    """Quotient and remainder of what is not negative. Divisions are most of the instructions where
    there are more of them, or of 64 bits."""
    if n.dtype == tl.int64:
        quotient = n // by
    else:
        quotient = (n.to(tl.uint32) // tl.cast(by, tl.uint32)).to(tl.int32)
    return quotient, n - quotient * by


@triton.jit
def _load_pairs(
    pointer, mask, E: tl.constexpr, R: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """First and second numbers, [BLOCK_N, P] each, of rows at pointer [BLOCK_N, 1]."""
    if HALF:
        o_p = tl.arange(0, P)[None, :]
        inside = mask & (o_p < R // 2)
        b_a = tl.load(pointer + o_p, mask=inside, other=0.0).to(DTYPE)
        b_b = tl.load(pointer + R // 2 + o_p, mask=inside, other=0.0).to(DTYPE)
    else:
        o_e = tl.arange(0, 2 * P)[None, :]
        b_x = tl.load(pointer + o_e, mask=mask & (o_e < E), other=0.0).to(DTYPE)
        b_a, b_b = tl.split(tl.reshape(b_x, [b_x.shape[0], P, 2]))
    return b_a, b_b


@triton.jit
def _store_pairs(
    pointer, b_a, b_b, mask, E: tl.constexpr, R: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr
):
    dtype: tl.constexpr = pointer.dtype.element_ty
    if HALF:
        o_p = tl.arange(0, P)[None, :]
        inside = mask & (o_p < R // 2)
        tl.store(pointer + o_p, rounded(b_a, dtype), mask=inside)
        tl.store(pointer + R // 2 + o_p, rounded(b_b, dtype), mask=inside)
    else:
        o_e = tl.arange(0, 2 * P)[None, :]
        b_x = rounded(tl.reshape(tl.join(b_a, b_b), [b_a.shape[0], 2 * P]), dtype)
        tl.store(pointer + o_e, b_x, mask=mask & (o_e < E))


@triton.jit
def _load_rest(
    pointer, mask, E: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, DTYPE: tl.constexpr
):
    """What follows the pairs, [BLOCK_N, REST]."""
    o_r = R + tl.arange(0, REST)[None, :]
    return tl.load(pointer + o_r, mask=mask & (o_r < E), other=0.0).to(DTYPE)


@triton.jit
def _row_pairs(pointer, h, mask, E: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
               HALF: tl.constexpr, ACROSS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Of a weight or bias."""
    row = h * E if ACROSS else h * 0
    return _load_pairs(pointer + row, mask, E, R, P, HALF, DTYPE)


@triton.jit
def _table_pairs(
    pointer, mask, R: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """cos or sin of both numbers of each pair."""
    if PAIRS:
        o_p = tl.arange(0, P)[None, :]
        b_a = tl.load(pointer + o_p, mask=mask & (o_p < R // 2), other=0.0).to(DTYPE)
        b_b = b_a
    else:
        b_a, b_b = _load_pairs(pointer, mask, R, R, P, HALF, DTYPE)
    return b_a, b_b


@triton.jit
def _rotate(
    b_a, b_b, cos_ptr, sin_ptr, o_t, mask, R: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The pairs rotated; BACK: by the transposed matrix. o_t: [BLOCK_N, 1], rows of the tables."""
    c_a, c_b = _table_pairs(cos_ptr + o_t, mask, R, P, HALF, PAIRS, b_a.dtype)
    s_a, s_b = _table_pairs(sin_ptr + o_t, mask, R, P, HALF, PAIRS, b_a.dtype)
    if BACK:
        r_a = b_a * c_a + b_b * s_b
        r_b = b_b * c_b - b_a * s_a
    else:
        r_a = b_a * c_a - b_b * s_a
        r_b = b_b * c_b + b_a * s_b
    rotated = tl.arange(0, P)[None, :] < R // 2
    return tl.where(rotated, r_a, b_a), tl.where(rotated, r_b, b_b)


@triton.jit
def _sum(b_x, ACROSS: tl.constexpr):
    """[BLOCK_N, P] to [BLOCK_N, 1], or over all heads."""
    b_sum = tl.sum(b_x, 1)[:, None]
    if ACROSS:
        b_sum = tl.sum(b_sum, 0)[None, :]
    return b_sum


@triton.jit
def _normed(
    b_a, b_b, b_rest, mask, numbers, eps, E: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    REST: tl.constexpr, HALF: tl.constexpr, ACROSS: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """xhat in its parts, and the inverse."""
    if LAYER:
        b_mean = _sum(b_a + b_b, ACROSS)
        if REST:
            b_mean += _sum(b_rest, ACROSS)
        b_mean = b_mean / numbers
        o_p = tl.arange(0, P)[None, :]
        if HALF:
            b_a = tl.where(mask & (o_p < R // 2), b_a - b_mean, 0.0)
            b_b = tl.where(mask & (o_p < R // 2), b_b - b_mean, 0.0)
        else:
            b_a = tl.where(mask & (2 * o_p < E), b_a - b_mean, 0.0)
            b_b = tl.where(mask & (2 * o_p + 1 < E), b_b - b_mean, 0.0)
        if REST:
            o_r = R + tl.arange(0, REST)[None, :]
            b_rest = tl.where(mask & (o_r < E), b_rest - b_mean, 0.0)
    b_square = _sum(b_a * b_a + b_b * b_b, ACROSS)
    if REST:
        b_square += _sum(b_rest * b_rest, ACROSS)
    b_inverse = 1 / tl.sqrt(b_square / numbers + eps)
    return b_a * b_inverse, b_b * b_inverse, b_rest * b_inverse, b_inverse


@triton.jit(do_not_specialize=[
    "tiles", "total", "length", "heads", "x_b", "x_l", "x_h", "out_b", "out_l", "out_h", "t_b",
    "t_l",
])  # fmt: skip
def qk_norm_rope_kernel(
    x_ptr,  # [B, L, H, E], strides x_*
    out_ptr,  # likewise, out_*
    weight_ptr,  # [E] or [H, E], or None, like the others
    bias_ptr,
    cos_ptr,  # rows of R, or of R / 2 if PAIRS
    sin_ptr,
    tiles, total, length, heads, x_b, x_l, x_h, out_b, out_l, out_h, t_b, t_l, eps,
    NORM: tl.constexpr, ACROSS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    TOKENS: tl.constexpr, E: tl.constexpr, R: tl.constexpr, FACTOR: tl.constexpr,
    FAR: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    # The next tiles are on their way while this one is added up.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        place = tl.cast(tile, tl.int64 if FAR else tl.int32)
        start = place if ACROSS else place * BLOCK_N
        b, t, h, mask = _places(start, total, length, heads, BLOCK_N, ACROSS, TOKENS)
        p_x = x_ptr + multiple(b * x_b + t * x_l + h * x_h, FACTOR)
        p_out = out_ptr + multiple(b * out_b + t * out_l + h * out_h, FACTOR)
        b_a, b_b = _load_pairs(p_x, mask, E, R, P, HALF, DTYPE)
        b_rest = tl.zeros([BLOCK_N, 1], DTYPE)
        if REST:
            b_rest = _load_rest(p_x, mask, E, R, REST, DTYPE)
        if NORM != "none":
            numbers = (E * heads if ACROSS else E + heads * 0).to(DTYPE)
            b_a, b_b, b_rest, _ = _normed(
                b_a, b_b, b_rest, mask, numbers, eps, E, R, P, REST, HALF, ACROSS, NORM == "layer"
            )
            row = h * E if ACROSS else h * 0
            if weight_ptr is not None:
                w_a, w_b = _row_pairs(weight_ptr, h, mask, E, R, P, HALF, ACROSS, DTYPE)
                b_a, b_b = b_a * w_a, b_b * w_b
                if REST:
                    b_rest *= _load_rest(weight_ptr + row, mask, E, R, REST, DTYPE)
            if bias_ptr is not None:
                w_a, w_b = _row_pairs(bias_ptr, h, mask, E, R, P, HALF, ACROSS, DTYPE)
                b_a, b_b = b_a + w_a, b_b + w_b
                if REST:
                    b_rest += _load_rest(bias_ptr + row, mask, E, R, REST, DTYPE)
        if cos_ptr is not None:
            o_t = b * t_b + t * t_l
            b_a, b_b = _rotate(b_a, b_b, cos_ptr, sin_ptr, o_t, mask, R, P, HALF, PAIRS, False)
        _store_pairs(p_out, b_a, b_b, mask, E, R, P, HALF)
        if REST:
            o_r = R + tl.arange(0, REST)[None, :]
            b_rest = rounded(b_rest, out_ptr.dtype.element_ty)
            tl.store(p_out + o_r, b_rest, mask=mask & (o_r < E))


@triton.jit(do_not_specialize=[
    "total", "length", "heads", "each", "x_b", "x_l", "x_h", "g_b", "g_l", "g_h", "out_b", "out_l",
    "out_h", "t_b", "t_l",
])  # fmt: skip
def qk_norm_rope_bwd_kernel(
    grad_ptr,  # [B, L, H, E], strides g_*
    x_ptr,  # likewise, x_*
    out_ptr,  # likewise, out_*
    weight_ptr,  # [E] or [H, E], or None, like the others
    cos_ptr,
    sin_ptr,
    to_weight_ptr,  # [programs, E] or [programs, H, E]
    to_bias_ptr,
    total, length, heads, each, x_b, x_l, x_h, g_b, g_l, g_h, out_b, out_l, out_h, t_b, t_l, eps,
    NORM: tl.constexpr, ACROSS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    TOKENS: tl.constexpr, E: tl.constexpr, R: tl.constexpr, FACTOR: tl.constexpr,
    FAR: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Each program has ``each`` tiles, one after another."""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    SUMMED: tl.constexpr = BLOCK_N if ACROSS else 1
    program = tl.program_id(0).to(tl.int64 if FAR else tl.int32)
    wa_sum = tl.zeros([SUMMED, P], DTYPE)
    wb_sum = tl.zeros([SUMMED, P], DTYPE)
    wr_sum = tl.zeros([SUMMED, REST if REST else 1], DTYPE)
    ba_sum = tl.zeros([SUMMED, P], DTYPE)
    bb_sum = tl.zeros([SUMMED, P], DTYPE)
    br_sum = tl.zeros([SUMMED, REST if REST else 1], DTYPE)
    for i in tl.range(0, each, num_stages=STAGES):
        start = program * each + i
        if not ACROSS:
            start *= BLOCK_N
        b, t, h, mask = _places(start, total, length, heads, BLOCK_N, ACROSS, TOKENS)
        if ACROSS:
            mask &= start < total
        p_x = x_ptr + multiple(b * x_b + t * x_l + h * x_h, FACTOR)
        p_g = grad_ptr + multiple(b * g_b + t * g_l + h * g_h, FACTOR)
        p_out = out_ptr + multiple(b * out_b + t * out_l + h * out_h, FACTOR)
        g_a, g_b_ = _load_pairs(p_g, mask, E, R, P, HALF, DTYPE)
        g_rest = tl.zeros([BLOCK_N, 1], DTYPE)
        if REST:
            g_rest = _load_rest(p_g, mask, E, R, REST, DTYPE)
        if cos_ptr is not None:
            o_t = b * t_b + t * t_l
            g_a, g_b_ = _rotate(g_a, g_b_, cos_ptr, sin_ptr, o_t, mask, R, P, HALF, PAIRS, True)
        if NORM != "none":
            b_a, b_b = _load_pairs(p_x, mask, E, R, P, HALF, DTYPE)
            b_rest = tl.zeros([BLOCK_N, 1], DTYPE)
            if REST:
                b_rest = _load_rest(p_x, mask, E, R, REST, DTYPE)
            numbers = (E * heads if ACROSS else E + heads * 0).to(DTYPE)
            b_a, b_b, b_rest, b_inverse = _normed(
                b_a, b_b, b_rest, mask, numbers, eps, E, R, P, REST, HALF, ACROSS,
                NORM == "layer",
            )  # fmt: skip
            if to_weight_ptr is not None:
                if ACROSS:
                    wa_sum += g_a * b_a
                    wb_sum += g_b_ * b_b
                    wr_sum += g_rest * b_rest
                else:
                    wa_sum += tl.sum(g_a * b_a, 0)[None, :]
                    wb_sum += tl.sum(g_b_ * b_b, 0)[None, :]
                    wr_sum += tl.sum(g_rest * b_rest, 0)[None, :]
            if to_bias_ptr is not None:
                if ACROSS:
                    ba_sum += g_a
                    bb_sum += g_b_
                    br_sum += g_rest
                else:
                    ba_sum += tl.sum(g_a, 0)[None, :]
                    bb_sum += tl.sum(g_b_, 0)[None, :]
                    br_sum += tl.sum(g_rest, 0)[None, :]
            if weight_ptr is not None:
                w_a, w_b = _row_pairs(weight_ptr, h, mask, E, R, P, HALF, ACROSS, DTYPE)
                g_a, g_b_ = g_a * w_a, g_b_ * w_b
                if REST:
                    row = h * E if ACROSS else h * 0
                    g_rest *= _load_rest(weight_ptr + row, mask, E, R, REST, DTYPE)
            b_along = _sum(g_a * b_a + g_b_ * b_b, ACROSS)
            if REST:
                b_along += _sum(g_rest * b_rest, ACROSS)
            b_along = b_along / numbers
            b_mean = tl.zeros_like(b_along)
            if NORM == "layer":
                b_mean = _sum(g_a + g_b_, ACROSS)
                if REST:
                    b_mean += _sum(g_rest, ACROSS)
                b_mean = b_mean / numbers
            g_a = (g_a - b_mean - b_a * b_along) * b_inverse
            g_b_ = (g_b_ - b_mean - b_b * b_along) * b_inverse
            g_rest = (g_rest - b_mean - b_rest * b_along) * b_inverse
        _store_pairs(p_out, g_a, g_b_, mask, E, R, P, HALF)
        if REST:
            o_r = R + tl.arange(0, REST)[None, :]
            g_rest = rounded(g_rest, out_ptr.dtype.element_ty)
            tl.store(p_out + o_r, g_rest, mask=mask & (o_r < E))
    o_n = tl.arange(0, SUMMED)[:, None]
    there = o_n < (heads if ACROSS else 1)
    o_row = program * E * (heads if ACROSS else 1) + o_n * E
    if to_weight_ptr is not None:
        _store_pairs(to_weight_ptr + o_row, wa_sum, wb_sum, there, E, R, P, HALF)
        if REST:
            o_r = R + tl.arange(0, REST)[None, :]
            tl.store(to_weight_ptr + o_row + o_r, wr_sum, mask=there & (o_r < E))
    if to_bias_ptr is not None:
        _store_pairs(to_bias_ptr + o_row, ba_sum, bb_sum, there, E, R, P, HALF)
        if REST:
            o_r = R + tl.arange(0, REST)[None, :]
            tl.store(to_bias_ptr + o_row + o_r, br_sum, mask=there & (o_r < E))


def _with_heads(x: Tensor) -> Tensor:
    """x, or a copy of it where the numbers of a head are scattered."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _extent(t: Tensor) -> int:
    """Numbers of the memory that t lies in."""
    return sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True))


def _dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


class _Tables:
    """What q and k share."""

    def __init__(
        self, q: Tensor, cos: Tensor | None, sin: Tensor | None, norm: str, across_heads: bool,
        rotation: str, rotary_dim: int, eps: float,
    ) -> None:  # fmt: skip
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.cos, self.sin = _dense(cos, self.wide), _dense(sin, self.wide)
        width = 0 if cos is None else cos.shape[-1]
        batched = self.cos is not None and self.cos.dim() == 3
        self.strides = (self.cos.stride(0) if batched and self.cos is not None else 0, width)
        num_dims = q.shape[3]
        half = rotation == "half" and rotary_dim > 0
        rest = num_dims - rotary_dim if half else 0
        pairs = rotary_dim // 2 if half else ceil_div(num_dims, 2)
        self.eps = eps
        self.sizes: dict[str, Any] = {
            "NORM": norm,
            "ACROSS": across_heads,
            "HALF": half,
            "PAIRS": width * 2 == rotary_dim,
            "E": num_dims,
            "R": rotary_dim,
            "P": triton.next_power_of_2(pairs),
            "REST": triton.next_power_of_2(rest) if rest else 0,
        }

    def of(self, x: Tensor, *views: Tensor) -> tuple[int, dict[str, Any]]:
        """Tiles, and the launch options for x, views of its shape."""
        batch, length, heads, num_dims = x.shape
        sizes = self.sizes
        block_e = 2 * sizes["P"] + sizes["REST"]
        if sizes["ACROSS"]:
            block_n, tiles = triton.next_power_of_2(heads), batch * length
        else:
            block_n = max(1, _TILE // triton.next_power_of_2(block_e))
            tiles = ceil_div(batch * length * heads, block_n)
        strides = [s for view in (x, *views) for s in view.stride()[:3]]
        threads = 128 * min(max(block_n * block_e // 1024, 1), 4)
        ahead = pipelined() and x.dtype != torch.float64
        return tiles, sizes | {
            "BLOCK_N": block_n,
            "TOKENS": x.stride(1) < x.stride(2),
            "FACTOR": common_multiple(num_dims, *strides),
            "FAR": max(_extent(t) for t in (x, *views, self.cos) if t is not None) >= _FAR,
            "STAGES": 2 if ahead else 1,
            **num_threads(threads),
            **at_most(min(65536 // threads, 255)),
        }


# Registers of a thread of up to 256, and of more, with which nothing is spilled.
_ROOM = {"sm_90": (64, 40)}


def _stages(x: Tensor, sizes: dict[str, Any], tensors: int, kib: int, most: int) -> dict[str, int]:
    """Of the loop over tiles: so many are loaded ahead that ``kib`` are on their way, of as many
    tensors as the programs of a multiprocessor have, or ``most``."""
    rows = x.shape[2] if sizes["ACROSS"] else sizes["BLOCK_N"]
    tile = rows * x.shape[3] * x.element_size()
    return {"STAGES": 1 + min(most, ceil_div(kib << 10, tensors * tile))}


def _total(x: Tensor, across: bool) -> int:
    return x.shape[:2].numel() if across else x.shape[:3].numel()


def qk_norm_rope(
    q: Tensor, k: Tensor | None, weight_q: Tensor | None, bias_q: Tensor | None,
    weight_k: Tensor | None, bias_k: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    norm: str, across_heads: bool, rotation: str, rotary_dim: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.mmfast.qk_norm_rope`` on checked arguments."""
    from mmfast.ops.qk_norm_rope import fake

    outputs = fake(q, k)
    tables = _Tables(q, cos, sin, norm, across_heads, rotation, rotary_dim, eps)
    given = ((q, weight_q, bias_q), (k, weight_k, bias_k))
    for out, (x, weight, bias) in zip(outputs, given, strict=True):
        if x is None or x.numel() == 0:
            continue
        x = _with_heads(x)
        tiles, options = tables.of(x, out)
        programs = tiles
        if options["STAGES"] > 1:
            # As many as there is room for, with so many registers each.
            threads = 32 * options["num_warps"]
            small, large = _ROOM.get(device_kind(), (72, 56))
            registers = small if threads <= 256 else large
            room = 65536 // (threads * registers)
            # Where lanes are idle; elsewhere, and of float32, some registers would be spilled.
            idle = x.shape[3] < 2 * options["P"] + options["REST"]
            most = 2 if idle and x.element_size() == 2 else 1
            options |= at_most(registers) | _stages(x, options, room, 15, most)
            programs = min(tiles, num_programs(x.device, room))
        launch(qk_norm_rope_kernel, (programs,),
            x, out, _dense(weight, tables.wide), _dense(bias, tables.wide), tables.cos, tables.sin,
            tiles, _total(x, across_heads), *x.shape[1:3], *x.stride()[:3], *out.stride()[:3],
            *tables.strides, eps, **options,
        )  # fmt: skip
    return outputs


def qk_norm_rope_bwd(
    grad_q: Tensor | None, grad_k: Tensor | None, q: Tensor, k: Tensor | None,
    weight_q: Tensor | None, bias_q: Tensor | None, weight_k: Tensor | None,
    bias_k: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str, across_heads: bool,
    rotation: str, rotary_dim: int, eps: float, want_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``torch.ops.mmfast.qk_norm_rope_bwd`` on checked arguments."""
    from mmfast.ops.qk_norm_rope import fake_bwd

    rows = weight_q, bias_q, weight_k, bias_k
    options = norm, across_heads, rotation, rotary_dim, eps
    outputs = fake_bwd(grad_q, grad_k, q, k, *rows, cos, sin, *options, want_rows)
    tables = _Tables(q, cos, sin, *options)
    for i, (grad, x) in enumerate(((grad_q, q), (grad_k, k))):
        if grad is None or x is None:
            continue
        out, weight = outputs[i], rows[2 * i]
        asked = [row if want_rows else None for row in rows[2 * i : 2 * i + 2]]
        if x.numel() == 0:
            for place, row in enumerate(asked, 2 + 2 * i):
                if row is not None:
                    outputs[place].zero_()
            continue
        x, grad = _with_heads(x), _with_heads(grad)
        tiles, sizes = tables.of(x, grad, out)
        if sizes["STAGES"] > 1:
            # With which nothing is spilled.
            few = sizes["HALF"] and norm == "rms"
            registers = 128 if sizes["num_warps"] > 8 else 80 if few else 104
            room = 65536 // (32 * sizes["num_warps"] * registers)
            sizes |= at_most(registers) | _stages(grad, sizes, 2 * room, 19, 3)
        each = ceil_div(tiles, _MOST_PARTS)
        programs = ceil_div(tiles, each)
        parts = [
            None if row is None else row.new_empty((programs, row.numel()), dtype=tables.wide)
            for row in asked
        ]
        launch(qk_norm_rope_bwd_kernel, (programs,),
            grad, x, out, _dense(weight, tables.wide), tables.cos, tables.sin, *parts,
            _total(x, across_heads), *x.shape[1:3], each, *x.stride()[:3], *grad.stride()[:3],
            *out.stride()[:3], *tables.strides, eps, **sizes,
        )  # fmt: skip
        for place, part in enumerate(parts, 2 + 2 * i):
            if part is not None:
                outputs[place].copy_(part.sum(0))
    return outputs


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(
        dtype: torch.dtype, num_dims: int, across: bool, rotation: str, norm: str, quick: bool
    ) -> Variant:
        def launch(n: int, _: int) -> None:
            x = torch.ones(1, n, 24, num_dims, dtype=dtype)
            weight = torch.ones(num_dims * (24 if across else 1))
            table = torch.ones(n, num_dims // 2)
            options = norm, across, rotation, num_dims, 1e-6
            bias = weight if norm == "layer" else None
            qk_norm_rope(x, None, weight, bias, None, None, table, table, *options)
            qk_norm_rope_bwd(
                x, None, x, None, weight, bias, None, None, table, table, *options, True
            )

        name = f"qk_norm_rope: {dtype}, {num_dims}, {rotation}, {norm}{', across' * across}"
        wide = ()
        if rotation == "interleaved":
            kernels = ("qk_norm_rope_kernel", "qk_norm_rope_bwd_kernel")
            wide = tuple((k, "b_x = tl.load(pointer + o_e") for k in kernels)
        return Variant(name.replace("torch.", ""), launch, wide=wide, quick=quick)

    cases = (
        (128, False, "interleaved", "rms"),
        (72, False, "interleaved", "rms"),
        (64, False, "interleaved", "layer"),
        (128, True, "interleaved", "rms"),
        (128, False, "half", "rms"),
        (72, False, "half", "layer"),
    )
    return [
        variant(dtype, *case, quick=dtype == torch.bfloat16 and case[0] == 72)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        for case in cases
    ]
