"""Attention on a GPU: what is measured of it, in bfloat16.

Head size 72 is DiT's, PixArt's and SigLIP's; two streams are those of Stable Diffusion 3, Flux and
Wan. A step is a forward and its backward, by autograd, of which the errors against float64 are kept
too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mmfast
from benchmarks import transformers
from benchmarks.cases import Case
from mmfast.ops import joint_attention, scaled_dot_product_attention, varlen_attention
from mmfast.registry import Sample

STEP = "attention_step"
TOKENS = 16384  # of a batch
LENGTHS = (256, 1024, 4096, 16384)  # at head size 72
CUDNN_SIZES = (64, 128)
OTHER_SIZES = (80, 88, 96, 112)
BATCHES = (64, 128, 256)  # of DiT's training, at 256 tokens
# Of a batch of images of several sizes.
SIZES = (4096, 2304, 1024, 1536, 3072, 256, 640, 77)

_TOLERANCE = 2e-2  # of norms

Sizes = Callable[[int], int]  # of a problem, or smaller


def cases(sizes: Sizes, streams: dict[str, tuple[int, int, int, int]]) -> Iterator[Case]:
    """All of them.

    Args:
        streams: by name, tokens of an image or video and of its text, heads, and head size.
    """
    yield from _one_stream(sizes)
    yield from _steps(sizes)
    yield from _two_streams(sizes, streams)
    yield from _sequences(sizes)


def _case(op: str, key: str, sample: Sample, of: str, **more: Any) -> Case:
    return Case(
        op,
        "_".join(filter(None, (key, sample.name, "bfloat16"))),
        sample.shape,
        f"{of}, bfloat16",
        functools.partial(_made, sample),
        compiled=True,
        **more,
    )


def _made(sample: Sample, device: torch.device) -> tuple[Any, ...]:
    return sample.make(device, torch.bfloat16, 0)


def _one_stream(sizes: Sizes) -> Iterator[Case]:
    op = scaled_dot_product_attention

    def pair(name: str, batch: int, heads: int, length: int, width: int, **more: Any) -> Any:
        options = {n: more.pop(n) for n in ("mask", "is_causal") if n in more}
        sample = op._sample(batch, heads, length, width, **options, name=name)
        gradients = op._backward_of(sample)
        for of, given in ((op.OP.name, sample), (op.BACKWARD.name, gradients)):
            yield _case(of, "", given, f"{batch} x {heads}", **more)

    for length in LENGTHS:
        # Of the longest as many heads as a float64 reference has memory for.
        heads = 16 if length < 16384 else 4
        yield from pair("", sizes(TOKENS // length), heads, sizes(length), 72, quick=length == 256)
    for width in CUDNN_SIZES:
        for length in LENGTHS[1:]:
            heads = 2048 // width if length < 16384 else 4
            batch = sizes(TOKENS // length)
            yield from pair("", batch, heads, sizes(length), width, quick=length == 4096)
    for width in OTHER_SIZES:
        yield from pair("", sizes(4), 16, sizes(4096), width)
    length = sizes(4096)
    padding = (sizes(4), 1, 1, length)
    yield from pair("padded", sizes(4), 16, length, 72, mask=padding)
    yield from pair("causal", sizes(4), 16, length, 128, is_causal=True, full=True)


def _steps(sizes: Sizes) -> Iterator[Case]:
    """DiT's batches, and every head size."""
    shapes = [(batch, 256, 72) for batch in BATCHES]
    shapes += [(2, 2048, width) for width in sorted({72, *CUDNN_SIZES, *OTHER_SIZES})]
    for batch, length, width in shapes:
        shape = sizes(batch), 16, sizes(length), width
        rows = {"N": shape[0] * 16 * shape[2], "K": shape[2], "D": width}
        yield Case(
            STEP,
            "x".join(map(str, shape)) + "_bfloat16",
            rows,
            "Gaussian, bfloat16",
            functools.partial(arguments, shape),
            quick=batch != 128,
            compiled=True,
        )


def _two_streams(sizes: Sizes, streams: dict[str, tuple[int, int, int, int]]) -> Iterator[Case]:
    """As they are, and two samples with texts of their own lengths."""
    op = joint_attention
    for key, (image, text, heads, width) in streams.items():
        lengths = sizes(image), sizes(text)
        long = image > TOKENS
        # Of the longest fewer heads, for the reference.
        heads = 1 if long else heads
        batch = 1 if long else 2
        for own in (None, (lengths[1] // 2, lengths[1])[:batch]):
            name = "" if own is None else "lengths"
            sample = op._sample(
                batch, heads, lengths, width, text_lengths=own, packed=True, name=name
            )
            for of, made in ((op.OP.name, sample), (op.BACKWARD.name, op._backward_of(sample))):
                yield _case(of, key, made, key)


def _sequences(sizes: Sizes) -> Iterator[Case]:
    op = varlen_attention
    lengths = tuple(map(sizes, SIZES))
    for width in (64, 72):
        sample = op._sample(lengths, 16, width, packed=True)
        for of, made in ((op.OP.name, sample), (op.BACKWARD.name, op._backward_of(sample))):
            yield _case(of, "images", made, "images of several sizes", full=width == 64)


# A step.


def arguments(shape: tuple[int, int, int, int], device: torch.device) -> tuple[Tensor, ...]:
    """Query, key, value and the gradient of the output, (B, H, L, E), which lie as (B, L, H, E),
    query, key and value of one projection."""
    batch, heads, length, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, width, generator=generator)
    gradient = torch.randn(batch, length, heads, width, generator=generator)
    tensors = (*qkv.to(device, torch.bfloat16).unbind(2), gradient.to(device, torch.bfloat16))
    return tuple(t.transpose(1, 2) for t in tensors)


def step(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
) -> Callable[[], tuple[Tensor, ...]]:
    """The output, and the gradients of query, key and value."""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]

    def run() -> tuple[Tensor, ...]:
        out = attention(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, gradient)

    return run


own = functools.partial(step, mmfast.scaled_dot_product_attention)


def expected(*given: Tensor) -> tuple[Tensor, ...]:
    """In float64, by PyTorch's definition."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.MATH]):
        wide = (t.double() for t in given)
        return step(torch.nn.functional.scaled_dot_product_attention, *wide)()


def judge(result: tuple[Tensor, ...], given: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str:
    """What no rounding of bfloat16 excuses; how much closer it is, goals say."""
    worst = max(transformers.errors(result, wanted))
    return "" if worst < _TOLERANCE else f"an error of {worst:.1e} of the norm"
