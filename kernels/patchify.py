"""Patches in Triton: each program moves a block of numbers, in the order of what is written.

The numbers of a row of a patch lie together on both sides; the rest is left to the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.common import num_threads

_BLOCK = 1024


@triton.jit(
    do_not_specialize=["total", "C", "F", "H", "W", "stride_b", "stride_c", "stride_f", "stride_h"]
)
def patchify_kernel(
    image_ptr,  # [B, C, F PF, H PH, W PW]
    token_ptr,  # [B, F H W, C PF PH PW]
    total,  # numbers of a sample
    C,
    F,  # patches in each dimension
    H,
    W,
    stride_b,  # of the image
    stride_c,
    stride_f,
    stride_h,
    stride_w,
    stride_tb,  # of the tokens
    stride_tl,
    stride_td,
    PF: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TO_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Divisions are of 32 bits: those of 64 would spill.
    blocks = tl.cdiv(total, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    left = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = left < total
    if TO_TOKENS:
        # Numbers in the order of the tokens.
        if CHANNELS_LAST:
            c = left % C
            left = left // C
        pw = left % PW
        left = left // PW
        ph = left % PH
        left = left // PH
        pf = left % PF
        left = left // PF
        if not CHANNELS_LAST:
            c = left % C
            left = left // C
        w = left % W
        left = left // W
        h = left % H
        f = left // H
    else:
        # In the order of the image.
        pw = left % PW
        left = left // PW
        w = left % W
        left = left // W
        ph = left % PH
        left = left // PH
        h = left % H
        left = left // H
        pf = left % PF
        left = left // PF
        f = left % F
        c = left // F
    p_image = image_ptr + b * stride_b + c.to(tl.int64) * stride_c
    p_image += (f * PF + pf).to(tl.int64) * stride_f + (h * PH + ph).to(tl.int64) * stride_h
    p_image += (w * PW + pw).to(tl.int64) * stride_w
    place = (pf * PH + ph) * PW + pw
    place = place * C + c if CHANNELS_LAST else place + c * (PF * PH * PW)
    p_token = token_ptr + b * stride_tb + ((f * H + h) * W + w).to(tl.int64) * stride_tl
    p_token += place.to(tl.int64) * stride_td
    if TO_TOKENS:
        tl.store(p_token, tl.load(p_image, mask=mask), mask=mask)
    else:
        tl.store(p_image, tl.load(p_token, mask=mask), mask=mask)


def _launch(
    image: Tensor, tokens: Tensor, patch: Sequence[int], channels_last: bool, to_tokens: bool
) -> None:
    if image.numel() == 0:
        return
    missing = 3 - len(patch)
    patch = [1] * missing + list(patch)
    sizes = [1] * missing + list(image.shape[2:])
    strides = [*image.stride()[:2], *[0] * missing, *image.stride()[2:]]
    numbers = image.shape[1:].numel()
    patchify_kernel[(image.shape[0] * triton.cdiv(numbers, _BLOCK),)](
        image, tokens, numbers, image.shape[1],
        *(s // p for s, p in zip(sizes, patch, strict=True)), *strides, *tokens.stride(),
        PF=patch[0], PH=patch[1], PW=patch[2], CHANNELS_LAST=channels_last, TO_TOKENS=to_tokens,
        BLOCK=_BLOCK, **num_threads(128),
    )  # fmt: skip


def patchify(x: Tensor, patch: Sequence[int], channels_last: bool) -> Tensor:
    """``torch.ops.mmfast.patchify`` on checked arguments."""
    length, numbers = 1, x.shape[1]
    for size, p in zip(x.shape[2:], patch, strict=True):
        length, numbers = length * (size // p), numbers * p
    tokens = x.new_empty((x.shape[0], length, numbers))
    _launch(x, tokens, patch, channels_last, True)
    return tokens


def unpatchify(
    tokens: Tensor, patch: Sequence[int], sizes: Sequence[int], channels_last: bool
) -> Tensor:
    """``torch.ops.mmfast.unpatchify`` on checked arguments."""
    channels = tokens.shape[2]
    for p in patch:
        channels //= p
    image = tokens.new_empty((tokens.shape[0], channels, *sizes))
    _launch(image, tokens, patch, channels_last, False)
    return image


def offline_variants() -> list[Any]:
    """Launches for ``mmfast.kernels.offline``."""
    from mmfast.kernels.offline import Variant

    def variant(dtype: torch.dtype, channels_last: bool) -> Variant:
        def launch(n: int, _: int) -> None:
            tokens = patchify(torch.ones(n, 4, 8, 8, dtype=dtype), (2, 2), channels_last)
            unpatchify(tokens, (2, 2), (8, 8), channels_last)

        name = f"patchify: {dtype}, channels {'last' if channels_last else 'first'}"
        return Variant(name.replace("torch.", ""), launch, quick=dtype == torch.bfloat16)

    return [variant(t, last) for t in (torch.float32, torch.bfloat16) for last in (False, True)]
