"""Adaptive layer normalisation: a norm over channels, scaled and shifted by a condition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice
from mmfast.ops.gated_residual import compare_needed
from mmfast.ops.modulation import (
    NORMS,
    along_tokens,
    bytes_of,
    check_affine,
    check_tokens,
    drawn,
    eps_of,
    frames_of,
    modulations_of,
    over_frames,
    tokens_of,
    wide_of,
)
from mmfast.ops.per_sample import differences
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register

GRADIENTS = ("x", "shift", "scale", "weight", "bias")


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``(norm(x) weight + bias) (1 + scale) + shift``, in one pass.

    Computed in float32 (float64 if x is) and rounded once; variances are of differences to the
    mean. Gradients go to all tensors; for them only x and two numbers per token are kept, and
    those of shift, scale, weight and bias are sums over tokens in an order that depends on nothing
    but their number.

    Args:
        x: ``(B, ..., C)``, L tokens in each of B samples; float16, bfloat16, float32 or float64.
            Any strides.
        shift, scale: ``(B, C)``, one for each sample; ``(B, F, C)``, one for each of F frames of
            L / F consecutive tokens; or ``(B, L, C)``, x's own shape, one for each token. B may be
            1, and ``(C,)`` is for all. Any strides, such as those of ``chunk(6, -1)``, and any of
            the dtypes, whatever x's. None for none.
        eps: added to the variance.
        norm: ``"layer"``: less the mean and divided by the standard deviation. ``"rms"``: divided
            by the root of the mean square.
        weight, bias: ``(C,)``, of the norm itself; None for none.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices, ``eps`` or ``norm`` do not fit.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), fig. 3; Ba et
    al., "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer Normalization"
    (2019).
    """
    check_tokens(x)
    check_affine(x, weight, bias, eps)
    check_choice("norm", norm, NORMS)
    shifts, scales = modulations_of(x, {"shift": shift, "scale": scale})
    result, *_ = backends.call(OP, tokens_of(x), shifts, scales, weight, bias, eps, norm)
    return result.view(x.shape)


def statistics(x: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of rows [B, L, C], each [B, L], float64."""
    x = x.double()
    mean = x.mean(2) if norm == "layer" else x.new_zeros(x.shape[:2])
    variance = (x - mean[..., None]).square().mean(2)
    return mean, (variance + eps).rsqrt()


def _affine(
    x: Tensor, scale: Tensor | None, weight: Tensor | None, absolute: bool
) -> tuple[Tensor, Tensor]:
    """1 + scale along the tokens, and the weight, float64."""
    one, factor = x.new_ones((), dtype=torch.float64), x.new_ones(1, dtype=torch.float64)
    if scale is not None:
        along = along_tokens(scale, x.shape[1])
        one = one + (along.abs() if absolute else along)
    if weight is not None:
        factor = weight.double().abs() if absolute else weight.double()
    return one, factor


def modulate(
    normed: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    absolute: bool = False,
) -> Tensor:
    """(normed weight + bias) (1 + scale) + shift, float64 [B, L, C]; ``absolute``: of the absolute
    values of all terms."""
    one, factor = _affine(normed, scale, weight, absolute)
    result = normed * factor
    if bias is not None:
        result = result + (bias.double().abs() if absolute else bias.double())
    result = result * one
    if shift is not None:
        along = along_tokens(shift, normed.shape[1])
        result = result + (along.abs() if absolute else along)
    return result


def values_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    *,
    absolute: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, shift, scale, weight and bias, float64."""
    grad, x, rstd = grad.double(), x.double(), rstd.double()[..., None]  # [B, L, C], [B, L, 1]
    normed = (x - mean.double()[..., None] if norm == "layer" else x) * rstd
    if absolute:
        grad, normed = grad.abs(), normed.abs()
    one, factor = _affine(x, scale, weight, absolute)
    to_product = grad * one  # of normed weight + bias
    to_normed = to_product * factor
    along = (to_normed * normed).mean(2, keepdim=True) * normed
    level = to_normed.mean(2, keepdim=True) if norm == "layer" else torch.zeros_like(rstd)
    to_x = rstd * (to_normed + level + along if absolute else to_normed - level - along)
    frames = frames_of(shift, scale)
    product = modulate(normed, None, None, weight, bias, absolute=absolute)
    return (
        to_x,
        None if shift is None else over_frames(grad, frames),
        None if scale is None else over_frames(grad * product, frames),
        None if weight is None else (to_product * normed).sum((0, 1)),
        None if bias is None else to_product.sum((0, 1)),
    )


def reference(
    x: Tensor,  # [B, L, C]
    shift: Tensor | None,  # [B, F, C]
    scale: Tensor | None,  # [B, F, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in float64: with it the mean (no elements for RMS) and 1 / deviation."""
    outputs = fake(x, shift, scale, weight, bias, eps, norm)
    mean, rstd = statistics(x, eps, norm)
    normed = (x.double() - mean[..., None]) * rstd[..., None]
    outputs[0].copy_(modulate(normed, shift, scale, weight, bias))
    if norm == "layer":
        outputs[1].copy_(mean)
    outputs[2].copy_(rstd)
    return outputs


def fake(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs without values."""
    wide = wide_of(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:2] if norm == "layer" else (0,), dtype=wide),
        x.new_empty(x.shape[:2], dtype=wide),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *modulation, _, ctx.norm = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, *modulation)


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[: len(GRADIENTS)]
    if grad is None or not any(needs):
        return (None,) * 7
    made = backends.call(BACKWARD, grad, *ctx.saved_tensors, ctx.norm, *needs)
    return *(g if need else None for g, need in zip(made, needs, strict=True)), None, None


def reference_bwd(
    grad: Tensor,  # [B, L, C]
    x: Tensor,  # [B, L, C]
    mean: Tensor,  # [B, L], [0] for RMS
    rstd: Tensor,  # [B, L]
    shift: Tensor | None,  # [B, F, C]
    scale: Tensor | None,  # [B, F, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    norm: str,
    need_x: bool,
    need_shift: bool,
    need_scale: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, shift, scale, weight and bias; no elements of what is not needed."""
    inputs = (grad, x, mean, rstd, shift, scale, weight, bias, norm)
    needs = (need_x, need_shift, need_scale, need_weight, need_bias)
    outputs = fake_bwd(*inputs, *needs)
    for output, value, need in zip(outputs, values_bwd(*inputs), needs, strict=True):
        if need and value is not None:
            output.copy_(value)
    return outputs


def gradients_like(
    like: Tensor, tensors: Iterable[Tensor | None], needs: Iterable[bool]
) -> tuple[Tensor, ...]:
    """Room for the gradients of ``tensors``; no elements where there is no need."""
    return tuple(
        t.new_empty(t.shape) if need and t is not None else like.new_empty((0,))
        for t, need in zip(tensors, needs, strict=True)
    )


def fake_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    """Outputs without values."""
    return gradients_like(x, (x, shift, scale, weight, bias), needs)


def cost(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> Cost:
    """x and the modulation read once, the result and two numbers per token written once."""
    statistics_bytes = 2 * x.shape[:2].numel() * wide_of(x).itemsize
    moved = 2 * x.nbytes + bytes_of(shift, scale, weight, bias) + statistics_bytes
    return Cost(bytes=moved, flops=8 * x.numel())


def cost_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    *needs: bool,
) -> Cost:
    """The gradient, x, its statistics and the modulation read once, gradients written once."""
    modulation = (shift, scale, weight, bias)
    moved = bytes_of(grad, x, mean, rstd, *modulation)
    moved += sum(need * bytes_of(t) for t, need in zip((x, *modulation), needs, strict=True))
    return Cost(bytes=moved, flops=(8 * needs[0] + 2 * sum(needs[1:])) * x.numel())


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Within the rounding of the terms, of the mean, and of the result itself."""
    x, *modulation, eps, norm = arguments
    rounding = eps_of(x)
    likes = fake(*arguments)
    mean, rstd = statistics(x, eps, norm)
    normed = (x.double() - mean[..., None]) * rstd[..., None]
    offset = (mean * rstd).abs()
    want = modulate(normed, *modulation)
    size = modulate(normed.abs() + offset[..., None] + 1, *modulation, absolute=True).abs()
    complaints = differences("modulated", result[0], likes[0], want, size, 8 * rounding)
    if norm == "layer":
        size = x.double().abs().mean(2)
        complaints += differences("means", result[1], likes[1], mean, size, 8 * rounding)
    elif result[1].shape != (0,):
        complaints.append("means that nobody wanted")
    size = rstd * (1 + rounding * offset.square())
    return complaints + differences("rstd", result[2], likes[2], rstd, size, 8 * rounding)


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Within the rounding of the terms and of the sums."""
    inputs = arguments[:9]
    made, sizes = values_bwd(*inputs), values_bwd(*inputs, absolute=True)
    eps = 16 * eps_of(arguments[1])
    return compare_needed(GRADIENTS, result, fake_bwd(*arguments), made, sizes, eps)


def sample(
    batch: int,
    length: int,
    channels: int,
    frames: int = 1,
    norm: str = "layer",
    without: tuple[str, ...] = (),
    mixed: bool = False,
    offset: float = 0.0,
    bench: bool = False,
) -> Sample:
    """Of the forward.

    Args:
        without: arguments that are None.
        mixed: modulation and weights are float32 whatever x is, and lie as chunk(6) leaves them.
        offset: added to x.
    """

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        x = drawn(generator, device, dtype, batch, length, channels) + offset
        own = torch.float32 if mixed else dtype
        table = drawn(generator, device, own, batch, frames, 6 * channels)
        given = dict(zip(("shift", "scale"), table.chunk(6, -1)[3:5], strict=True))
        if not mixed:
            given = {name: t.contiguous() for name, t in given.items()}
        given |= {name: drawn(generator, device, own, channels) for name in ("weight", "bias")}
        modulation = (None if name in without else t for name, t in given.items())
        return x, *modulation, 1e-6, norm

    name = f"{batch}x{length}x{channels}" + (f"_f{frames}" if frames != 1 else "")
    name += ("_rms" if norm == "rms" else "") + "".join(f"_no_{w}" for w in without)
    name += ("_mixed" if mixed else "") + (f"_offset{offset:g}" if offset else "")
    sizes = {"N": batch * length, "K": max(frames, 2), "D": channels}
    return Sample(name, make, sizes, bench)


PLAIN = ("weight", "bias")


def samples() -> Iterable[Sample]:
    """Blocks of DiT-XL and SD3, and beyond the caches (``bench``), and odd shapes."""
    yield sample(8, 256, 1152, without=PLAIN, bench=True)
    yield sample(2, 1024, 1536, without=PLAIN, bench=True)
    yield sample(4, 1024, 1536, without=PLAIN, bench=True)
    yield sample(2, 6, 20)
    yield sample(3, 35, 33, without=PLAIN, mixed=True)
    yield sample(2, 70, 72, frames=5, norm="rms", without=("bias",), mixed=True)
    yield sample(2, 9, 17, frames=9, without=("bias",))
    yield sample(2, 37, 48, frames=37, norm="rms", mixed=True)
    yield sample(2, 70, 130, without=("shift", "scale"))
    yield sample(2, 4, 300, without=("shift", *PLAIN), offset=20)
    yield sample(3, 5, 16, norm="rms", without=("scale", *PLAIN))
    yield sample(1, 1, 1)
    yield sample(0, 3, 5)
    yield sample(2, 0, 5)


def _sample_bwd(forward: Sample, *missing: str) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        x, *modulation, eps, norm = forward.make(device, dtype, seed)
        grad = drawn(torch.Generator().manual_seed(seed + 1), device, dtype, *x.shape)
        mean, rstd = (s.to(wide_of(x)) for s in statistics(x, eps, norm))
        given = dict(zip(GRADIENTS, (x, *modulation), strict=True))
        needs = (t is not None and name not in missing for name, t in given.items())
        return (
            grad,
            x,
            mean if norm == "layer" else mean.new_empty(0),
            rstd,
            *modulation,
            norm,
            *needs,
        )

    name = "_".join((forward.name, *(f"less_{m}" for m in missing)))
    return Sample(name, make, forward.shape, forward.bench)


def samples_bwd() -> Iterable[Sample]:
    """Of the forward's."""
    for forward in samples():
        yield _sample_bwd(forward)
    yield _sample_bwd(sample(2, 35, 33), "x")
    yield _sample_bwd(sample(2, 35, 33), "shift", "scale", "bias")
    yield _sample_bwd(sample(2, 7, 33, frames=7), "scale", "weight")


def _load_triton() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.layer_norm_modulate import layer_norm_modulate as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.layer_norm_modulate import layer_norm_modulate_bwd as launch

    return launch


OP = register(
    Op(
        name="layer_norm_modulate",
        schema="(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, "
        "str norm) -> (Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("layer_norm_modulate"),
            "triton": backends.triton(_load_triton, backends.always),
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
        name="layer_norm_modulate_bwd",
        schema="(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? shift, Tensor? scale, "
        "Tensor? weight, Tensor? bias, str norm, bool need_x, bool need_shift, bool need_scale, "
        "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("layer_norm_modulate_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
