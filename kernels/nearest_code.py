"""Exact nearest codes in Triton: tensor cores screen in float16, float64 settles what is close.

Scores are x.c - |c|^2 / 2 (euclidean) or x.c, with codes less their centre: larger is nearer. For
cosine the codes are normalised first; the norm of x changes no order.

1. ``nearest_code_centre_kernel`` and ``nearest_code_pack_kernel``: the codes less a centre, scaled
   by a power of two and rounded to float16, and what the rounding left in another float16.
2. ``nearest_code_screen_kernel``: a block of rows, rounded likewise, meets tile after tile of
   codes, which TMA fetches where there is one. Of each group of 2 to 8 codes that follow each other
   only the best score is looked at. Each place of a tile keeps its best group, with the tile's
   number in the lowest bits, and its second best. Two scores further apart than twice the error
   bound (Cauchy-Schwarz on the measured rounding residuals, plus the accumulation's own rounding)
   cannot have swapped. Rows with several groups that close go onto a list with these groups.
3. The same again for rows with too many of them, with both float16 of rows and codes: three
   products instead of one, and a bound of float32's accumulation alone.
4. ``nearest_code_exact_kernel``: the groups that are left to the listed rows, in float64, in the
   definition's order; of rows with too many still, or of which nothing is known (NaN, overflow),
   all codes. Of the other rows, which code of the winning group it is, and the metric, likewise.

Five launches, and one more for cosine, whatever the size.

Workspace: 4 bytes per element of the codebook, padded, and 40 bytes per row; for cosine 4 bytes
more per element; above 256 dimensions 4 bytes per element of the rows at work. Nothing is read
back to the host.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmfast.kernels import nearest_code_tiles as tiles
from mmfast.kernels.common import (
    at_most,
    ceil_div,
    device_limits,
    interpreting,
    num_programs,
    strides,
)
from mmfast.kernels.nearest_code_exact import (
    nearest_code_exact_kernel,
    nearest_code_norm_kernel,
)
from mmfast.kernels.nearest_code_pack import (
    MOST_PARTS,
    TILE,
    nearest_code_centre_kernel,
    nearest_code_pack_kernel,
)
from mmfast.kernels.nearest_code_screen import NEAR, nearest_code_screen_kernel
from mmfast.kernels.tuned import Problem, Tuned

METRICS = {"euclidean": 0, "cosine": 1, "dot": 2}
_MOST_ROWS = 2**31 - 2**10
_MOST_CODES = 2**24  # the number of a tile goes into the lowest bits of a score
_MOST_PACKED = 2**30  # packed codes of all heads, whose rows are counted in 32 bits
_MOST_HEADS = 65535
_STEP_D = 64
_MOST_BLOCK_N = 256

_screen = Tuned(nearest_code_screen_kernel, tiles.SCREEN, ["PADDED_D"], tiles.fitting)
# The few rows that it leaves: no choice.
_screen_again = Tuned(
    nearest_code_screen_kernel, tiles.AGAIN, ["PADDED_D", "AGAIN"], tiles.first_fitting
)


def _padded(num_dims: int) -> dict[str, int]:
    """Compile-time sizes of the screening: of a row, and of a step through it."""
    if num_dims > _whole_dims():
        return {"PADDED_D": ceil_div(num_dims, _STEP_D) * _STEP_D, "STEP_D": _STEP_D}
    power = max(16, triton.next_power_of_2(num_dims))
    return {"PADDED_D": power, "STEP_D": power}


def _whole_dims() -> int:
    """Rows of so many dimensions stay on the chip in float16; longer ones are walked in steps."""
    if interpreting():
        return 256
    backend, arch, _ = device_limits(triton.runtime.driver.active.get_current_device())
    return 128 if backend == "cuda" and arch < 90 else 256


def _group(padded: int) -> int:
    """Codes of which only the best score is kept. The wider the rows, the more it costs to tell
    which code it was, and the less beside the products to look at every score."""
    return 8 if padded <= 64 else 4 if padded <= 128 else 2


def _problems(device: torch.device) -> list[Problem]:
    """Of every width that has tiles of its own."""
    made = []
    for num_dims in (16, 32, 64, 128, 256, 512):
        x, codes = (torch.randn(n, num_dims, device=device) for n in (65536, 8192))
        call = functools.partial(nearest_code, x, codes, "euclidean")
        made.append(Problem(_padded(num_dims), call))
    return made


# What ``python -m mmfast.kernels.tuned`` searches.
tuning = _screen, _problems


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """``torch.ops.mmfast.nearest_code`` on checked arguments."""
    shape = x.shape[:-1]
    codes = codebook if codebook.dim() == 3 else codebook[None]  # [H, K, D]
    num_heads, num_codes, num_dims = codes.shape
    wide = torch.float64 in (x.dtype, codebook.dtype)
    indices = x.new_empty(shape, dtype=torch.int64)
    distances = x.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    if indices.numel() == 0:
        return indices, distances
    at_a_time = min(_MOST_HEADS, max(1, _MOST_PACKED // (num_codes + TILE.value)))
    if num_heads > at_a_time:
        parts = zip(x.split(at_a_time), codes.split(at_a_time), strict=True)
        results = [nearest_code(a, b, metric) for a, b in parts]
        return torch.cat([i for i, _ in results]), torch.cat([d for _, d in results])
    rows = x.reshape(num_heads, -1, num_dims)  # [H, N, D]
    num_rows = rows.shape[1]
    if num_rows > _MOST_ROWS or num_codes > _MOST_CODES:
        raise ValueError(
            f"the Triton kernels take at most {_MOST_ROWS} vectors and {_MOST_CODES} codes, "
            f"got {num_rows} and {num_codes}"
        )
    x_strides, code_strides = strides(rows), strides(codes)
    packed_rows = x_strides[1:] == (num_dims, 1) and x_strides[0] in (0, num_rows * num_dims)
    euclidean = metric == "euclidean"
    norms = x.new_empty((num_heads, 0 if metric != "cosine" else num_codes), dtype=torch.float64)
    source, source_strides = codes, code_strides
    if metric == "cosine":
        source = x.new_empty(codes.shape, dtype=torch.float32)
        source_strides = source.stride()
        nearest_code_norm_kernel[(ceil_div(num_codes, 32), num_heads)](
            codes, norms, source, num_codes, num_dims, *code_strides,
            BLOCK_K=32, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip

    sizes = _padded(num_dims)
    padded = sizes["PADDED_D"]
    block_d = min(padded, _STEP_D)
    group = _group(padded)
    padded_codes = ceil_div(num_codes, TILE.value) * TILE.value
    wide_codes = source.dtype == torch.float64
    centre = x.new_empty(
        (num_heads, num_dims), dtype=torch.float64 if wide_codes else torch.float32
    )
    half = x.new_empty((2 * num_heads * padded_codes, padded), dtype=torch.float16)
    terms = x.new_empty((num_heads, padded_codes), dtype=torch.float32)
    numbers = x.new_empty((num_heads * 12,), dtype=torch.int32)
    statistics, counts = numbers[: num_heads * 8], numbers[num_heads * 8 :]
    parts = min(ceil_div(num_codes, 32), MOST_PARTS.value, num_programs(x.device))
    largest = x.new_empty((num_heads, parts), dtype=torch.int32)
    options = {"WIDE": wide_codes, "BLOCK_D": block_d, "BLOCK_K": 32, **at_most(128)}
    nearest_code_centre_kernel[(parts, num_heads)](
        source, centre, largest, numbers, num_codes, num_dims, *source_strides, NUMBERS=12,
        SAMPLE=32, **options,
    )  # fmt: skip
    nearest_code_pack_kernel[(padded_codes // 32, num_heads)](
        source, centre, largest, half, terms, statistics, num_codes, parts, num_dims,
        *source_strides, EUCLIDEAN=euclidean, PADDED_D=padded, GROUP=group, **options,
    )  # fmt: skip

    again, listed = (x.new_empty((num_heads, num_rows), dtype=torch.int32) for _ in range(2))
    near = x.new_empty((num_heads, num_rows, NEAR.value), dtype=torch.int32)
    # Persistent where each program has memory of its own. Otherwise more than fit at a time, so
    # that the device deals them out.
    stepping = block_d < padded
    programs = ceil_div(num_programs(x.device, 2 if stepping else 4), num_heads)
    scratch = num_heads * programs * 2 * _MOST_BLOCK_N * padded if stepping else 0
    rounded = x.new_empty(scratch, dtype=torch.float16)

    def packed(constants: dict[str, Any]) -> Tensor | TensorDescriptor:
        if not constants["TMA"]:
            return half
        step = constants["STEP_D"] // (1 + constants["AHEAD"])
        return TensorDescriptor.from_tensor(half, [constants["BLOCK_K"], step])

    def grid(constants: dict[str, Any]) -> tuple[int, int]:
        return min(programs, ceil_div(num_rows, constants["BLOCK_N"])), num_heads

    for kernel, is_again in ((_screen, False), (_screen_again, True)):
        kernel[grid](
            rows, centre, packed, terms, statistics, rounded, indices, again, listed, near, counts,
            num_rows, num_codes, num_dims, *x_strides, EUCLIDEAN=euclidean, WIDE=wide,
            PACKED=packed_rows, AGAIN=is_again, BLOCK_D=block_d, GROUP=group, PADDED_D=padded,
            STEP_D=block_d if is_again else sizes["STEP_D"], facts={"WHOLE": num_dims == padded},
        )  # fmt: skip
    programs = ceil_div(num_programs(x.device, 4), num_heads)
    both = (num_rows, num_codes, num_dims, *x_strides, *code_strides)
    four = not any(n % 4 for n in (num_dims, *x_strides[:2], *code_strides[:2]))
    options = {"METRIC": METRICS[metric], "FOUR": four, "GROUP": group, "enable_fp_fusion": False}
    # Fewer at a time in float64, whose numbers take two registers.
    sizes = {"BLOCK_N": 8, "BLOCK_ROWS": 16} if wide else {"BLOCK_N": 16, "BLOCK_ROWS": 32}
    nearest_code_exact_kernel[(programs, num_heads)](
        rows, codes, norms, indices, distances, listed, near, counts, *both,
        SCREEN=not wide and metric != "cosine", BLOCK_K=32, **sizes, **options,
        **at_most(255 if wide else 168),
    )  # fmt: skip
    return indices, distances


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dims: int, dtype: torch.dtype, metric: str, quick: bool) -> Variant:
        return Variant(
            f"nearest_code: {metric}, {dtype}, D {dims}".replace("torch.", ""),
            lambda n, k: nearest_code(
                torch.ones(n, dims, dtype=dtype), torch.ones(k, dims, dtype=dtype), metric
            ),
            matrix=frozenset({"nearest_code_screen_kernel"}),
            wide=wide if dtype.itemsize > 2 else wide[: dims >= 32],
            quick=quick,
        )

    # The kernels that read all vectors.
    wide = (
        ("nearest_code_screen_kernel", "b_x = tl.load(p_x"),
        ("nearest_code_exact_kernel", "b = tl.load(p["),
    )
    dims = (8, 32, 64, 128, 256, 512)
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    some = {("euclidean", torch.float32, 64), ("cosine", torch.float16, 512)}
    made = [variant(d, t, m, (m, t, d) in some) for m in METRICS for t in floats for d in dims]
    # Rows that are narrower than their tiles, which may have others to choose from.
    narrow = itertools.product((24, 48, 100, 200), (torch.float32, torch.float64))
    return made + [variant(d, t, "euclidean", False) for d, t in narrow]
