"""A step of a sampler in Triton: each program does some blocks of one sample.

The coefficients are scalars, loaded from the table at the row that a counter on the device names,
so that a captured graph goes on to the next row by itself. What has the weight 0 is not loaded.
Everything is loaded before anything is stored: out may be x, and slots of the history may move.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import (
    add_term,
    at_most,
    ceil_div,
    common_multiple,
    load_used,
    lying_together,
    multiple,
    num_programs,
    num_threads,
    rounded,
)
from mmfast.kernels.launching import Repeated, place
from mmfast.kernels.philox import normals_of_sample
from mmfast.schedule.layout import HISTORY, Layout, M, N, P, X, slots_of

# Blocks of a program, which has the row's weights for all of them; of small batches one, so that no
# multiprocessor is without.
_EACH = 4
_NO_SLOTS = Layout(0).columns
_OPTIONAL = ("unconditional", "noise", "variance", "denoised", "model_input")

_LOW = tl.constexpr(Layout.LOW)
_HIGH = tl.constexpr(Layout.HIGH)
_LOG_SCALE = tl.constexpr(Layout.LOG_SCALE)
_GUIDANCE = tl.constexpr(Layout.GUIDANCE)
_INPUT_SCALE = tl.constexpr(Layout.INPUT_SCALE)
_NEXT = tl.constexpr(Layout.NEXT)
_X = tl.constexpr(X)
_M = tl.constexpr(M)
_N = tl.constexpr(N)
_P = tl.constexpr(P)
_HISTORY = tl.constexpr(HISTORY)


@triton.jit
def prediction(p_row, poison, b_x, b_m, b_u, b_n, conditional, unconditional):
    """The weighted sum of x, the guided model output and the noise, weights at p_row."""
    m = tl.load(p_row + _M)
    b_total = add_term(tl.zeros_like(b_x), tl.load(p_row + _X) + poison, b_x)
    b_total = add_term(b_total, m * conditional + poison, b_m)
    b_total = add_term(b_total, m * unconditional + poison, b_u)
    return add_term(b_total, tl.load(p_row + _N) + poison, b_n)


@triton.jit
def guidance_weights(p_row, u_ptr, guidance_scale: tl.float64, guidance_ptr, offset):
    """Of the conditional and the unconditional output, which may be None as the factors may."""
    conditional = tl.full([], 1.0, tl.float64)
    unconditional = tl.full([], 0.0, tl.float64)
    if u_ptr is not None:
        on = tl.load(p_row + _GUIDANCE)
        if guidance_ptr is not None:
            p_pair = guidance_ptr + offset
            conditional += on * (tl.load(p_pair).to(tl.float64) - 1.0)
            unconditional = on * tl.load(p_pair + 1).to(tl.float64)
        else:
            scale = tl.full([], guidance_scale, tl.float64)
            conditional += on * (scale - 1.0)
            unconditional = on * (1.0 - scale)
    return conditional, unconditional


@triton.jit
def _sum(p_row, poison, sources, slots, b_p, conditional, unconditional, SLOTS: tl.constexpr):
    """That of all sources."""
    b_total = prediction(p_row, poison, *sources, conditional, unconditional)
    for s in tl.static_range(SLOTS):
        b_total = add_term(b_total, tl.load(p_row + _HISTORY + s) + poison, slots[s + 1])
    return add_term(b_total, tl.load(p_row + _P) + poison, b_p)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _uses(p_row, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr):
    """Bits of the sources that have a weight, and of the results (next, slots) that change."""
    column = tl.arange(0, ROW)
    one = tl.full([ROW], 1, tl.int32)
    b_weight = tl.load(p_row + column, mask=column < COLUMNS, other=0.0)
    inside = (column >= _NEXT) & (column < COLUMNS)
    result = (column - _NEXT) // WIDTH  # that the weight belongs to
    source = (column - _NEXT) % WIDTH
    own = tl.where((result > 0) & (source == result + (_HISTORY - 1)), 1.0, 0.0)
    bits = tl.where(inside & (b_weight != own), one << tl.where(inside, result, 0), 0)
    changed = tl.reduce(bits, 0, _either) | 1
    inside = (inside & ((changed >> tl.where(inside, result, 0)) & 1 != 0)) | (column <= _N)
    place = tl.where(column <= _N, column, tl.where(inside, source, 0))
    used = tl.reduce(tl.where(inside & (b_weight != 0), one << place, 0), 0, _either)
    return used, changed


@triton.jit(
    do_not_specialize=[
        "E", "B", "rows", "each", "stride_step", "stride_seed", "stride_guidance", "stride_x",
        "stride_m", "stride_u", "stride_n", "stride_v", "stride_o", "stride_hs", "stride_hb",
        "stride_d", "stride_i",
    ]
)  # fmt: skip
def sampler_step_kernel(
    x_ptr,
    m_ptr,
    u_ptr,  # or None, like every tensor that may be absent
    guidance_scale: tl.float64,
    guidance_ptr,
    table_ptr,
    step_ptr,
    n_ptr,
    seed_ptr,
    v_ptr,
    threshold_ptr,
    out_ptr,
    h_ptr,
    d_ptr,
    i_ptr,
    B,
    E,
    rows,
    each,  # blocks of a program
    stride_step,
    stride_seed,
    stride_guidance,
    stride_x,
    stride_m,
    stride_u,
    stride_n,
    stride_v,
    stride_o,
    stride_hs,
    stride_hb,
    stride_d,
    stride_i,
    SLOTS: tl.constexpr,
    ROW: tl.constexpr,  # at least the columns
    COPIES: tl.constexpr,
    FACTOR: tl.constexpr,
    FOURS: tl.constexpr,  # blocks start at a multiple of four elements of their stream
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    WIDTH: tl.constexpr = _HISTORY + SLOTS
    COLUMNS: tl.constexpr = _NEXT + (1 + SLOTS) * WIDTH
    place = tl.program_id(0).to(tl.int64)
    E = multiple(E, FACTOR)
    parts = tl.cdiv(tl.cdiv(E, BLOCK), each)
    b = place // parts
    begin = place % parts * each * BLOCK

    # The row. One that is not there, or asks for what is not there, gives NaN.
    step = tl.load(step_ptr + b * stride_step)
    inside = (step >= 0) & (step < rows)
    p_row = table_ptr + tl.where(inside, step, 0) * COLUMNS
    used, changed = _uses(p_row, WIDTH, COLUMNS, ROW)
    use_x = (used >> _X) & 1 != 0
    use_m = (used >> _M) & 1 != 0
    use_n = (used >> _N) & 1 != 0
    factor = tl.load(p_row + _LOG_SCALE + 1)
    poison = tl.where(inside, 0.0, float("nan")).to(tl.float64)
    if n_ptr is None and seed_ptr is None:
        poison = tl.where(use_n, float("nan"), poison)
    if v_ptr is None:
        poison = tl.where(use_n & (factor != 0), float("nan"), poison)

    conditional, unconditional = guidance_weights(
        p_row, u_ptr, guidance_scale, guidance_ptr, b * stride_guidance
    )

    for first in range(begin, tl.minimum(begin + each * BLOCK, E), BLOCK):
        places = first + tl.arange(0, BLOCK)
        mask = places < E
        b_x = load_used(x_ptr + b * multiple(stride_x, FACTOR), places, mask, use_x, DTYPE)
        b_m = load_used(
            m_ptr + b * multiple(stride_m, FACTOR), places, mask, use_m & (conditional != 0), DTYPE
        )
        b_u = tl.zeros_like(b_x)
        if u_ptr is not None:
            use_u = use_m & (unconditional != 0)
            b_u = load_used(u_ptr + b * multiple(stride_u, FACTOR), places, mask, use_u, DTYPE)
        b_n = tl.zeros_like(b_x)
        if n_ptr is not None:
            b_n = load_used(n_ptr + b * multiple(stride_n, FACTOR), places, mask, use_n, DTYPE)
        elif seed_ptr is not None:  # noqa: SIM102 (the other condition is on the device)
            if use_n:
                seed = tl.load(seed_ptr + b * stride_seed)
                b_n = normals_of_sample(seed, step, b, stride_seed, E, first, BLOCK, FOURS).to(
                    DTYPE
                )
        if v_ptr is not None:
            use_v = use_n & (factor != 0)
            b_v = load_used(v_ptr + b * multiple(stride_v, FACTOR), places, mask, use_v, DTYPE)
            b_log = add_term(
                tl.zeros_like(b_v) + tl.load(p_row + _LOG_SCALE).to(DTYPE), factor, b_v
            )
            b_n *= tl.exp(b_log)

        slots = (b_x,)  # and from 1 on those of the history
        if SLOTS > 0:
            p_h = h_ptr + b * multiple(stride_hb, FACTOR)
            for s in tl.static_range(SLOTS):
                use_h = (used >> (_HISTORY + s)) & 1 != 0
                p_s = p_h + s * multiple(stride_hs, FACTOR)
                slots = slots + (load_used(p_s, places, mask, use_h, DTYPE),)  # noqa: RUF005

        sources = (b_x, b_m, b_u, b_n)
        b_p = prediction(p_row, poison, *sources, conditional, unconditional)
        # Comparisons that are false for NaN leave it as it is.
        if threshold_ptr is not None:
            t = tl.load(threshold_ptr + b).to(DTYPE)
            b_p = tl.where(b_p > t, t, b_p)
            b_p = tl.where(b_p < -t, -t, b_p) / t
        low = tl.load(p_row + _LOW).to(DTYPE)
        high = tl.load(p_row + _HIGH).to(DTYPE)
        b_p = tl.where(b_p > high, high, b_p)
        b_p = tl.where(b_p < low, low, b_p)

        b_next = _sum(p_row + _NEXT, poison, sources, slots, b_p, conditional, unconditional, SLOTS)
        made = (b_next,)
        for s in tl.static_range(SLOTS):
            p_slot = p_row + _NEXT + (1 + s) * WIDTH
            b_slot = _sum(p_slot, poison, sources, slots, b_p, conditional, unconditional, SLOTS)
            made = made + (b_slot,)  # noqa: RUF005

        # Another thread may store what this one loads.
        tl.debug_barrier()
        if SLOTS > 0:
            p_h = h_ptr + b * multiple(stride_hb, FACTOR)
            for s in tl.static_range(SLOTS):
                written = ((changed >> (s + 1)) & 1 != 0) | (poison != poison)
                p_s = p_h + s * multiple(stride_hs, FACTOR) + places
                tl.store(
                    p_s,
                    rounded(made[s + 1], h_ptr.dtype.element_ty),
                    mask=tl.where(written, mask, False),
                )
        p_out = out_ptr + b * multiple(stride_o, FACTOR) + places
        tl.store(p_out, rounded(b_next, out_ptr.dtype.element_ty), mask=mask)
        if d_ptr is not None:
            p_d = d_ptr + b * multiple(stride_d, FACTOR) + places
            tl.store(p_d, rounded(b_p, d_ptr.dtype.element_ty), mask=mask)
        if i_ptr is not None:
            b_next *= (tl.load(p_row + _INPUT_SCALE) + poison).to(DTYPE)
            for copy in tl.static_range(COPIES):
                p_i = i_ptr + (copy * B + b) * multiple(stride_i, FACTOR) + places
                tl.store(p_i, rounded(b_next, i_ptr.dtype.element_ty), mask=mask)


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    guidance_scale: float,
    guidance: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    out: Tensor,
    history: Tensor | None,
    denoised: Tensor | None,
    model_input: Tensor | None,
) -> None:
    """``torch.ops.mmfast.sampler_step`` on checked arguments."""
    rows_columns = table.shape
    if rows_columns[1] == _NO_SLOTS:
        history = None
    given = x, model_output, unconditional, noise, variance, out, history, denoised, model_input
    used, layouts = given, _layouts(given)
    if layouts is None:
        # All of these are read by samples; of the history by slots too.
        used = tuple(None if t is None else lying_together(t, 1 + (t is history)) for t in given)
        layouts = tuple(None if t is None else (t.dtype, t.stride()) for t in used)
    again = _plan(
        place(), x.device, x.shape, rows_columns, step.stride(0) if step.dim() else 0,
        None if seed is None else seed.dim(),
        None if guidance is None else (guidance.dtype, guidance.shape),
        None if threshold is None else threshold.dtype,
        0 if model_input is None else model_input.shape[0],
        (table.dtype, step.dtype, None if seed is None else seed.dtype), *layouts,
    )  # fmt: skip
    if again is None:
        return
    again(
        *used[:3], guidance_scale, None if guidance is None else guidance.contiguous(),
        table.contiguous(), step, used[3], None if seed is None else seed.contiguous(), used[4],
        None if threshold is None else threshold.contiguous(), *used[5:],
    )  # fmt: skip
    if used is not given:
        for tensor, target in zip(given[5:], used[5:], strict=True):
            if tensor is not target and tensor is not None:
                tensor.copy_(target)


_Layout = torch.dtype | tuple[torch.dtype, tuple[int, ...]] | None


def _layouts(given: tuple[Tensor | None, ...]) -> tuple[_Layout, ...] | None:
    """Of dense tensors the dtypes; nothing if there is another."""
    found: list[_Layout] = []
    for t in given:
        if t is None:
            found.append(None)
        elif t.is_contiguous():
            found.append(t.dtype)
        else:
            return None
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _plan(
    place: Any,
    device: torch.device,
    shape: torch.Size,
    rows_columns: tuple[int, int],
    stride_step: int,
    seeds: int | None,
    guidance: Any,
    threshold: Any,
    inputs: int,
    dtypes: tuple[torch.dtype | None, ...],
    *layouts: _Layout,
) -> Repeated | None:
    """The launch for tensors of these dtypes, shapes and strides, if there is anything to do: one
    for all steps of a loop.

    Args:
        place: what it is launched on.
        shape: of x.
        seeds: dimensions of the seed.
        guidance, threshold: what there is of them.
        inputs: samples of the model's input.
        dtypes: of the table, the counter and the seed.
        layouts: of x, the model's outputs, noise, variance, and of what is written: the dtype, with
            strides where numbers do not lie one behind the other.
    """
    batch, numbers = shape[0], shape[1:].numel()
    if not (batch and numbers):
        return None
    slots = slots_of(rows_columns[1])

    def stride(layout: _Layout, dim: int = 0) -> int:
        """The stride of samples, or of slots before them."""
        if layout is None:
            return 0
        if isinstance(layout, tuple):
            return layout[1][dim]
        return numbers

    # That of a single sample would be but another number.
    strides = [stride(layout) if batch > 1 else 0 for layout in layouts[:6]]
    history = layouts[6] if slots else None
    if isinstance(history, tuple):
        of_slots, of_samples = history[1][:2]
    elif history is not None:
        of_slots, of_samples = batch * numbers, numbers
    else:
        of_slots = of_samples = 0
    strides += [of_slots if slots > 1 else 0, of_samples if batch > 1 else 0]
    strides.append(stride(layouts[7]) if batch > 1 else 0)
    strides.append(stride(layouts[8]) if inputs > 1 else 0)
    dtype = layouts[0][0] if isinstance(layouts[0], tuple) else layouts[0]
    block = 1024 if dtype != torch.float64 else 512 if slots <= 4 else 256
    per_sample = bool(seeds) and batch > 1
    blocks = ceil_div(numbers, block)
    each = max(1, min(_EACH, batch * blocks // num_programs(device, 4 * _EACH)))
    return Repeated(
        sampler_step_kernel,
        (batch * ceil_div(blocks, each),),
        (
            batch, numbers, rows_columns[0], each, stride_step if batch > 1 else 0,
            int(per_sample), 2 if guidance and guidance[1][0] > 1 else 0, *strides,
        ),
        {
            "SLOTS": slots,
            "ROW": triton.next_power_of_2(rows_columns[1]),
            "COPIES": inputs // batch,
            "FACTOR": common_multiple(numbers, *strides),
            "FOURS": per_sample or batch == 1 or numbers % 4 == 0,
            "BLOCK": block,
            "enable_fp_fusion": False,
            **num_threads(128),
            **at_most(255),
        },
    )  # fmt: skip


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(slots: int, dtype: torch.dtype, *more: str, quick: bool = False) -> Variant:
        def launch(n: int, _: int) -> None:
            x = torch.ones(n, 64, dtype=dtype)
            given = {name: x if name in more else None for name in _OPTIONAL}
            table = torch.ones(4, Layout(slots).columns, dtype=torch.float64)
            step = torch.zeros(n, dtype=torch.int64)
            sampler_step(
                x, x, given["unconditional"], 7.5, None, table, step, given["noise"],
                step if "seed" in more else None, given["variance"],
                torch.ones(n) if "threshold" in more else None, x,
                torch.ones(slots, n, 64, dtype=dtype) if slots else None, given["denoised"],
                given["model_input"],
            )  # fmt: skip

        name = ", ".join(("sampler_step: " + str(dtype).removeprefix("torch."), *more))
        return Variant(
            f"{name}, {slots} slots",
            launch,
            wide=(("sampler_step_kernel", "tl.load(pointer + places"),),
            quick=quick,
        )

    some = ((0, torch.float32, True), (3, torch.bfloat16, False))
    return [
        variant(slots, dtype, *more, quick=(slots, dtype, not more) in some)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        for slots in (0, 2, 3, 6)
        for more in ((), ("unconditional", "seed", "denoised", "model_input"))
    ] + [variant(2, torch.bfloat16, "noise", "variance", "threshold")]
