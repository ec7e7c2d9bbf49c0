"""Sines and cosines of timesteps in Triton, in float64.

Not among the variants that are compiled offline: libdevice takes whole turns off large angles in an
array of local memory, which is no different there from spilled registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import num_threads, rounded

_BLOCK = 256


@triton.jit(do_not_specialize=["stride", "dim"])
def timestep_embedding_kernel(
    time_ptr,  # [B], its stride
    out_ptr,  # [B, dim]
    stride,
    dim,
    step: tl.float64,
    scale: tl.float64,
    COS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    half = dim // 2
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    time = tl.load(time_ptr + b * stride).to(tl.float64)
    b_angle = time * (scale * tl.exp(i.to(tl.float64) * step))
    sine = rounded(tl.sin(b_angle), out_ptr.dtype.element_ty)
    cosine = rounded(tl.cos(b_angle), out_ptr.dtype.element_ty)
    p_out = out_ptr + b * dim + i
    tl.store(p_out + (half if COS_FIRST else 0), sine, mask=i < half)
    tl.store(p_out + (0 if COS_FIRST else half), cosine, mask=i < half)
    if dim % 2 == 1:
        tl.store(p_out + 2 * half, tl.zeros_like(sine), mask=i == 0)


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: float, flip_sin_to_cos: bool,
    downscale_freq_shift: float, scale: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``torch.ops.mmfast.timestep_embedding`` on checked arguments."""
    batch = timesteps.shape[0]
    out = timesteps.new_empty((batch, dim), dtype=dtype)
    if batch == 0:
        return out
    step = -math.log(max_period) / (dim // 2 - downscale_freq_shift)
    timestep_embedding_kernel[(batch, triton.cdiv(dim // 2, _BLOCK))](
        timesteps, out, timesteps.stride(0), dim, step, scale, COS_FIRST=flip_sin_to_cos,
        BLOCK=_BLOCK, **num_threads(128),
    )  # fmt: skip
    return out
