"""Attention of image and text tokens to each other, as SD3 and Flux have it, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, INDEX, check_device, check_dtype
from mmfast.ops.attention import (
    Limits,
    attend,
    attend_bwd,
    check_attention,
    check_heads,
    complaints,
    errors,
    errors_bwd,
    new_like,
    new_lse,
    scale_of,
    too_wide,
)
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register
from mmfast.results import exportable


@exportable
class JointAttention(NamedTuple):
    """What :func:`joint_attention` returns.

    Attributes:
        image: ``(B, H, L, Ev)``.
        text: ``(B, H, T, Ev)``; 0 beyond the length.
    """

    image: Tensor
    text: Tensor


def joint_attention(
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    *,
    text_lengths: Tensor | None = None,
    scale: float | None = None,
) -> JointAttention:
    """Every query, of image and of text, attends to all keys of the image and those of the text.

    As :func:`mmfast.scaled_dot_product_attention` of both streams one behind the other, which are
    never put together. Gradients pass to all six.

    Args:
        q_image: ``(B, H, L, E)``, float16, bfloat16, float32 or float64, any strides.
        k_image: ``(B, Hkv, L, E)``, H a multiple of Hkv; q_image's dtype, as all that follow.
        v_image: ``(B, Hkv, L, Ev)``.
        q_text: ``(B, H, T, E)``.
        k_text: ``(B, Hkv, T, E)``.
        v_text: ``(B, Hkv, T, Ev)``.
        text_lengths: ``(B,)``, int32 or int64 on the device: how many tokens a text has; those
            beyond are not read, and give 0. Counts as 0 or T where it is out of range.
        scale: of the scores; 1 / sqrt(E) by default.

    Returns:
        :class:`JointAttention`, each in the order in memory that its query has.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes or devices do not fit.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis" (2024), sec. 4.
    """
    given = {
        "q_image": q_image, "k_image": k_image, "v_image": v_image,
        "q_text": q_text, "k_text": k_text, "v_text": v_text,
    }  # fmt: skip
    check_attention(**given)
    for name, tensor in given.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, L, E), got {tuple(tensor.shape)}")
    batch, heads, _, num_dims = q_image.shape
    kv_heads, value_dims = k_image.shape[1], v_image.shape[3]
    check_heads("k_image", heads, kv_heads)
    if num_dims < 1:
        raise ValueError(f"q_image must have a head size of at least 1, got {tuple(q_image.shape)}")
    for names, length in ((list(given)[:3], q_image.shape[2]), (list(given)[3:], q_text.shape[2])):
        sizes = (heads, num_dims), (kv_heads, num_dims), (kv_heads, value_dims)
        for name, (h, e) in zip(names, sizes, strict=True):
            if given[name].shape != (batch, h, length, e):
                got = tuple(given[name].shape)
                raise ValueError(f"{name} must be {(batch, h, length, e)}, got {got}")
    if text_lengths is not None:
        check_dtype("text_lengths", text_lengths, INDEX)
        check_device(q_image=q_image, text_lengths=text_lengths)
        if text_lengths.shape != (batch,):
            got = tuple(text_lengths.shape)
            raise ValueError(f"text_lengths must be (B,) = ({batch},), got {got}")
    image, text, _, _ = backends.call(OP, *given.values(), text_lengths, scale_of(scale, num_dims))
    return JointAttention(image, text)


def _there(image: Tensor, text: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Which of the tokens of image [B, H, L, E] and text [B, H, T, E] there are, [B, L + T]."""
    if lengths is None:
        return None
    place = torch.arange(-image.shape[2], text.shape[2], device=lengths.device)
    return place < lengths.clamp(0, text.shape[2]).unsqueeze(1)


def _limits(there: Tensor | None) -> Limits:
    if there is None:
        return Limits()
    return Limits(there[:, None, :, None] & there[:, None, None, :])


def _joined(
    there: Tensor | None, images: Iterable[Tensor], texts: Iterable[Tensor]
) -> list[Tensor]:
    """[B, H, L + T, ...] of each pair; numbers of tokens that are not there are not read."""
    pairs = [torch.cat(pair, 2) for pair in zip(images, texts, strict=True)]
    if there is None:
        return pairs
    return [torch.where(there[:, None, :, None], t, 0) if t.dim() == 4 else t for t in pairs]


def _apart(made: Iterable[Tensor], length: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The parts of all tensors that are the image's, and those that are the text's."""
    made = tuple(made)
    return tuple(t[:, :, :length] for t in made), tuple(t[:, :, length:] for t in made)


def reference(
    q_image: Tensor,  # [B, H, L, E]
    k_image: Tensor,  # [B, Hkv, L, E]
    v_image: Tensor,  # [B, Hkv, L, Ev]
    q_text: Tensor,  # [B, H, T, E]
    k_text: Tensor,  # [B, Hkv, T, E]
    v_text: Tensor,  # [B, Hkv, T, Ev]
    text_lengths: Tensor | None,  # [B]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification: outputs of image and text, then the logarithms of the sums of both."""
    images, texts = (q_image, k_image, v_image), (q_text, k_text, v_text)
    outputs = fake(*images, *texts, text_lengths, scale)
    there = _there(q_image, q_text, text_lengths)
    made = attend(*_joined(there, images, texts), scale=scale, limits=_limits(there))
    (image, lse_image), (text, lse_text) = _apart(made, q_image.shape[2])
    for output, value in zip(outputs, (image, text, lse_image, lse_text), strict=True):
        output.copy_(value)
    return outputs


def fake(
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values."""
    return (
        new_like(q_image, v_image.shape[3]),
        new_like(q_text, v_text.shape[3]),
        new_lse(q_image, q_image.shape[:3]),
        new_lse(q_text, q_text.shape[:3]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, lengths, ctx.factor = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output, lengths)


def _gradients(ctx: Any, image: Tensor | None, text: Tensor | None, *_: None) -> tuple[Any, ...]:
    if image is None and text is None:
        return (None,) * 8
    return *backends.call(BACKWARD, image, text, *ctx.saved_tensors, ctx.factor), None, None


def _gradient_arguments(arguments: Arguments) -> tuple[Tensor | None, int, list[Tensor]]:
    """Which tokens there are, how many are of the image, and what ``attend_bwd`` takes."""
    grad_image, grad_text, *tensors, out_image, out_text, lse_image, lse_text, lengths, _ = (
        arguments
    )
    images, texts = [*tensors[:3], out_image, lse_image], [*tensors[3:], out_text, lse_text]
    grad_image = torch.zeros_like(out_image) if grad_image is None else grad_image
    grad_text = torch.zeros_like(out_text) if grad_text is None else grad_text
    there = _there(tensors[0], tensors[3], lengths)
    joined = _joined(there, [grad_image, *images], [grad_text, *texts])
    return there, tensors[0].shape[2], joined


def reference_bwd(
    grad_image: Tensor | None,  # [B, H, L, Ev], one of them at least
    grad_text: Tensor | None,  # [B, H, T, Ev]
    q_image: Tensor,  # [B, H, L, E]
    k_image: Tensor,  # [B, Hkv, L, E]
    v_image: Tensor,  # [B, Hkv, L, Ev]
    q_text: Tensor,  # [B, H, T, E]
    k_text: Tensor,  # [B, Hkv, T, E]
    v_text: Tensor,  # [B, Hkv, T, Ev]
    out_image: Tensor,  # [B, H, L, Ev]
    out_text: Tensor,  # [B, H, T, Ev]
    lse_image: Tensor,  # [B, H, L]
    lse_text: Tensor,  # [B, H, T]
    text_lengths: Tensor | None,  # [B]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all six."""
    inputs = q_image, k_image, v_image, q_text, k_text, v_text
    saved = out_image, out_text, lse_image, lse_text, text_lengths, scale
    outputs = fake_bwd(grad_image, grad_text, *inputs, *saved)
    arguments = grad_image, grad_text, *inputs, *saved
    there, length, joined = _gradient_arguments(arguments)
    *grads, _ = attend_bwd(*joined, scale=scale, limits=_limits(there))
    image, text = _apart(grads, length)
    for output, value in zip(outputs, (*image, *text), strict=True):
        output.copy_(value)
    return outputs


def fake_bwd(
    grad_image: Tensor | None,
    grad_text: Tensor | None,
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    out_image: Tensor,
    out_text: Tensor,
    lse_image: Tensor,
    lse_text: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values."""
    inputs = q_image, k_image, v_image, q_text, k_text, v_text
    return tuple(new_like(t, t.shape[3]) for t in inputs)  # type: ignore[return-value]


def cost(
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> Cost:
    """Two products for every pair, were the texts of full length; all read and written once."""
    inputs = q_image, k_image, v_image, q_text, k_text, v_text
    outputs = fake(*inputs, text_lengths, scale)
    flops = 2 * _pairs(q_image, q_text) * (q_image.shape[3] + v_image.shape[3])
    return Cost(bytes=sum(t.nbytes for t in (*inputs, *outputs)), flops=flops)


def _pairs(image: Tensor, text: Tensor) -> int:
    return image.shape[0] * image.shape[1] * (image.shape[2] + text.shape[2]) ** 2


def cost_bwd(
    grad_image: Tensor | None,
    grad_text: Tensor | None,
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    out_image: Tensor,
    out_text: Tensor,
    lse_image: Tensor,
    lse_text: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> Cost:
    """Five products for every pair."""
    inputs = q_image, k_image, v_image, q_text, k_text, v_text
    saved = out_image, out_text, lse_image, lse_text
    grads = [t for t in (grad_image, grad_text) if t is not None]
    flops = 2 * _pairs(q_image, q_text) * (3 * q_image.shape[3] + 2 * v_image.shape[3])
    return Cost(bytes=sum(t.nbytes for t in (*inputs, *inputs, *saved, *grads)), flops=flops)


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """As of ``scaled_dot_product_attention``."""
    *tensors, lengths, scale = arguments
    there = _there(tensors[0], tensors[3], lengths)
    joined = _joined(there, tensors[:3], tensors[3:])
    limits, length = _limits(there), tensors[0].shape[2]
    wanted = attend(*(t.double() for t in joined), scale=scale, limits=limits)
    allowed = errors(*joined, scale=scale, limits=limits)
    names = ("image", "text", "lse_image", "lse_text")
    return complaints(
        names, result, fake(*arguments), _in_turn(wanted, length), _in_turn(allowed, length)
    )


def _in_turn(made: Iterable[Tensor], length: int) -> tuple[Tensor, ...]:
    """Of each output the image's part and the text's."""
    return tuple(part for pair in zip(*_apart(made, length), strict=True) for part in pair)


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Likewise."""
    scale = arguments[-1]
    there, length, joined = _gradient_arguments(arguments)
    *wanted, _ = attend_bwd(*(t.double() for t in joined), scale=scale, limits=_limits(there))
    *allowed, _ = errors_bwd(*joined, scale=scale, limits=_limits(there))
    parts = [[t for half in _apart(made, length) for t in half] for made in (wanted, allowed)]
    names = [f"grad_{x}_{of}" for of in ("image", "text") for x in "qkv"]
    return complaints(names, result, fake_bwd(*arguments), *parts)


def _sample(
    batch: int,
    heads: int,
    lengths: tuple[int, int],
    num_dims: int,
    *,
    kv_heads: int | None = None,
    value_dims: int | None = None,
    text_lengths: tuple[int, ...] | None = None,
    dtype_lengths: torch.dtype = torch.int64,
    packed: bool = False,
    name: str = "",
) -> Sample:
    """``lengths``: of image and text; ``packed``: qkv is."""
    kv_heads = heads if kv_heads is None else kv_heads
    value_dims = num_dims if value_dims is None else value_dims

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        tensors: list[Tensor] = []
        for length in lengths:
            if packed:
                qkv = torch.randn(batch, length, 3, heads, num_dims, generator=generator)
                tensors += (t.transpose(1, 2) for t in qkv.to(device, dtype).unbind(2))
                continue
            for h, e in ((heads, num_dims), (kv_heads, num_dims), (kv_heads, value_dims)):
                made = torch.randn(batch, h, length, e, generator=generator)
                tensors.append(made.to(device, dtype))
        given = None
        if text_lengths is not None:
            given = torch.tensor(text_lengths, dtype=dtype_lengths, device=device)
        return *tensors, given, scale_of(None, num_dims)

    tokens = sum(lengths)
    sizes = {"N": batch * heads * tokens, "K": tokens, "D": num_dims, "H": heads}
    shape = f"{batch}x{heads}x{lengths[0]}+{lengths[1]}x{num_dims}"
    bench = batch * heads * tokens**2 >= 1 << 20
    return Sample("_".join(filter(None, (name, shape))), make, sizes, bench)


def samples() -> Iterable[Sample]:
    """Of SD3, smaller (``bench``); odd ones."""
    yield _sample(2, 8, (256, 77), 64, text_lengths=(77, 20), packed=True, name="packed")
    yield _sample(2, 2, (9, 5), 8)
    yield _sample(3, 2, (7, 6), 24, text_lengths=(6, 0, 2), name="padded")
    yield _sample(2, 4, (17, 20), 8, kv_heads=2, value_dims=5, text_lengths=(9, 20), name="grouped")
    yield _sample(
        2, 2, (3, 4), 8, text_lengths=(-3, 9), dtype_lengths=torch.int32, name="out_of_range"
    )
    yield _sample(2, 2, (10, 4), 16, packed=True, name="packed")
    yield _sample(2, 2, (0, 4), 8, text_lengths=(0, 3), name="no_image")
    yield _sample(2, 2, (4, 0), 8, text_lengths=(0, 3), name="no_text")
    yield _sample(0, 2, (4, 3), 8, text_lengths=())


def _backward_of(sample: Sample, missing: str = "") -> Sample:
    """Gradients of ``sample``'s outputs, but for one."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        arguments = sample.make(device, dtype, seed)
        saved = reference(*arguments)
        generator = torch.Generator().manual_seed(seed + 1)
        grads = [
            None if name == missing else torch.randn(out.shape, generator=generator).to(out)
            for name, out in zip(("image", "text"), saved[:2], strict=True)
        ]
        return *grads, *arguments[:6], *saved, *arguments[6:]

    name = f"no_{missing}_gradient_{sample.name}" if missing else sample.name
    return Sample(name, make, sample.shape, sample.bench)


def samples_bwd() -> Iterable[Sample]:
    """As above."""
    for sample in samples():
        yield _backward_of(sample)
    for missing in ("image", "text"):
        yield _backward_of(_sample(2, 2, (9, 5), 8, text_lengths=(2, 5)), missing)


def _load_triton() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.joint_attention import joint_attention as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.joint_attention import joint_attention_bwd as launch

    return launch


_INPUTS = "Tensor q_image, Tensor k_image, Tensor v_image, Tensor q_text, Tensor k_text, "

OP = register(
    Op(
        name="joint_attention",
        schema=f"({_INPUTS}Tensor v_text, Tensor? text_lengths, float scale)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("joint_attention"),
            "triton": backends.triton(_load_triton, too_wide),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients),
    )
)

BACKWARD = register(
    Op(
        name="joint_attention_bwd",
        schema=f"(Tensor? grad_image, Tensor? grad_text, {_INPUTS}Tensor v_text, "
        "Tensor out_image, Tensor out_text, Tensor lse_image, Tensor lse_text, "
        "Tensor? text_lengths, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("joint_attention_bwd"),
            "triton": backends.triton(_load_triton_bwd, too_wide),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
