"""From one branch of a diffusion transformer's block to the next, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice
from mmfast.ops import gated_residual, layer_norm_modulate
from mmfast.ops.modulation import (
    GATES,
    NORMS,
    bytes_of,
    check_affine,
    check_tokens,
    drawn,
    eps_of,
    modulations_of,
    tokens_of,
    wide_of,
)
from mmfast.ops.per_sample import differences
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register
from mmfast.results import exportable

GRADIENTS = ("x", "gate", "y", "shift", "scale", "weight", "bias")


@exportable
class GatedResidualModulated(NamedTuple):
    """What :func:`gated_residual_modulate` returns.

    Attributes:
        residual: the sum, x's shape and dtype.
        modulated: its norm, scaled and shifted, likewise.
    """

    residual: Tensor
    modulated: Tensor


def gated_residual_modulate(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate_activation: str = "linear",
) -> GatedResidualModulated:
    """Add a branch to the residual and make the next branch's input::

        residual  = x + act(gate) y
        modulated = (norm(residual) weight + bias) (1 + scale) + shift

    That is :func:`mmfast.gated_residual` and :func:`mmfast.layer_norm_modulate` of its result,
    which are computed from x and y read once. The norm is that of the residual as it was rounded.
    Of the block's activations, the gradients need y, the residual, and two numbers per token.

    Args:
        x: ``(B, ..., C)``, L tokens in each of B samples; float16, bfloat16, float32 or float64.
            Any strides.
        gate, shift, scale: ``(B, C)``, one for each sample; ``(B, F, C)``, one for each of F
            frames of L / F consecutive tokens; or ``(B, L, C)``, x's own shape, one for each
            token. B may be 1, and ``(C,)`` is for all. Any strides, such as those of
            ``chunk(6, -1)``, and any of the dtypes, whatever x's. None for none. They are read in
            place where all have the same F.
        y: the branch's output, x's shape and dtype.
        eps, norm, weight, bias: as :func:`mmfast.layer_norm_modulate` has them.
        gate_activation: ``"linear"``, or ``"tanh"`` of the gate.

    Returns:
        :class:`GatedResidualModulated`.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices, ``eps``, ``norm`` or ``gate_activation`` do not fit.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), fig. 3.
    """
    check_tokens(x, y=y)
    check_affine(x, weight, bias, eps)
    check_choice("norm", norm, NORMS)
    check_choice("gate_activation", gate_activation, GATES)
    gates, shifts, scales = modulations_of(x, {"gate": gate, "shift": shift, "scale": scale})
    residual, modulated, *_ = backends.call(
        OP, tokens_of(x), gates, tokens_of(y), shifts, scales, weight, bias, eps, norm,
        gate_activation,
    )  # fmt: skip
    return GatedResidualModulated(residual.view(x.shape), modulated.view(x.shape))


def reference(
    x: Tensor,  # [B, L, C]
    gate: Tensor | None,  # [B, F, C]
    y: Tensor,  # [B, L, C]
    shift: Tensor | None,  # [B, F, C]
    scale: Tensor | None,  # [B, F, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    norm: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification, in float64: residual, modulated, its mean and 1 / deviation."""
    residual = x.new_empty(x.shape).copy_(gated_residual.values(x, gate, y, gate_activation))
    made = layer_norm_modulate.reference(residual, shift, scale, weight, bias, eps, norm)
    return residual, *made


def fake(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values."""
    made = layer_norm_modulate.fake(x, shift, scale, weight, bias, eps, norm)
    return x.new_empty(x.shape), *made


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gate, y, *modulation, _, ctx.norm, ctx.gate_activation = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # Without a gate, nothing multiplies y.
    y = None if gate is None else y
    ctx.save_for_backward(residual, mean, rstd, gate, y, *modulation)


def _gradients(
    ctx: Any, grad_residual: Tensor | None, grad_modulated: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    need_x, need_gate, need_y, *others = ctx.needs_input_grad[: len(GRADIENTS)]
    if not any((need_x, need_gate, need_y, *others)):
        return (None,) * 10
    if grad_residual is None and grad_modulated is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them
    gated = saved[3] is not None
    needs = (need_x or (need_y and not gated), need_gate, need_y and gated, *others)
    made = backends.call(
        BACKWARD, grad_residual, grad_modulated, *saved, ctx.norm, ctx.gate_activation, *needs
    )  # fmt: skip
    grads = [g if need else None for g, need in zip(made, needs, strict=True)]
    if not gated:
        grads[2] = grads[0] if need_y else None
    return grads[0] if need_x else None, *grads[1:], None, None, None


def _values_bwd(
    grad_residual: Tensor | None,
    grad_modulated: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    gate_activation: str,
    *,
    absolute: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients by :data:`GRADIENTS`, float64."""
    passed = torch.zeros_like(residual) if grad_modulated is None else grad_modulated
    to_residual, *others = layer_norm_modulate.values_bwd(
        passed, residual, mean, rstd, shift, scale, weight, bias, norm, absolute=absolute
    )
    assert to_residual is not None
    if grad_modulated is None:
        # Nothing that is not finite comes from a norm that nobody used.
        to_residual = torch.zeros_like(to_residual)
        others = [None if t is None else torch.zeros_like(t) for t in others]
    if grad_residual is not None:
        own = grad_residual.double()
        to_residual = to_residual + (own.abs() if absolute else own)
    to_gate = to_y = None
    if gate is not None and y is not None:
        to_gate, to_y = gated_residual.values_bwd(
            to_residual, gate, y, gate_activation, absolute=absolute
        )
    return to_residual, to_gate, to_y, *others


def reference_bwd(
    grad_residual: Tensor | None,  # [B, L, C], one of them at least
    grad_modulated: Tensor | None,  # [B, L, C]
    residual: Tensor,  # [B, L, C]
    mean: Tensor,  # [B, L], [0] for RMS
    rstd: Tensor,  # [B, L]
    gate: Tensor | None,  # [B, F, C]
    y: Tensor | None,  # [B, L, C]
    shift: Tensor | None,  # [B, F, C]
    scale: Tensor | None,  # [B, F, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    norm: str,
    gate_activation: str,
    need_x: bool,
    need_gate: bool,
    need_y: bool,
    need_shift: bool,
    need_scale: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, gate, y, shift, scale, weight and bias; no elements of what is not needed.

    Without a gate there is no y either, whose gradient would be x's.
    """
    inputs = (
        grad_residual, grad_modulated, residual, mean, rstd, gate, y, shift, scale, weight, bias,
        norm, gate_activation,
    )  # fmt: skip
    needs = (need_x, need_gate, need_y, need_shift, need_scale, need_weight, need_bias)
    outputs = fake_bwd(*inputs, *needs)
    for output, value, need in zip(outputs, _values_bwd(*inputs), needs, strict=True):
        if need and value is not None:
            output.copy_(value)
    return outputs


def fake_bwd(
    grad_residual: Tensor | None,
    grad_modulated: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    gate_activation: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    """Outputs without values."""
    tensors = (residual, gate, y, shift, scale, weight, bias)
    return layer_norm_modulate.gradients_like(residual, tensors, needs)


def cost(x: Tensor, gate: Tensor | None, y: Tensor, *arguments: Any) -> Cost:
    """x, y and the modulation read once, residual, result and two numbers per token written."""
    norm = layer_norm_modulate.cost(x, *arguments[:-1])
    moved = norm.bytes + x.nbytes + bytes_of(y, gate)
    return Cost(bytes=moved, flops=norm.flops + 2 * x.numel())


def cost_bwd(
    grad_residual: Tensor | None,
    grad_modulated: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    gate_activation: str,
    *needs: bool,
) -> Cost:
    """Both gradients, the residual, y and the modulation read once, gradients written once."""
    tensors = (residual, gate, y, shift, scale, weight, bias)
    # y is only for the gate.
    read = (residual, gate, y if needs[1] else None, shift, scale, weight, bias)
    moved = bytes_of(grad_residual, grad_modulated, mean, rstd, *read)
    moved += sum(need * bytes_of(t) for t, need in zip(tensors, needs, strict=True))
    return Cost(bytes=moved, flops=(9 + 2 * sum(needs[1:])) * residual.numel())


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Within the rounding of the terms; the norm is that of the result's own residual."""
    x, gate, y, *norm, activation = arguments
    want = gated_residual.values(x, gate, y, activation)
    size = gated_residual.values(x, gate, y, activation, absolute=True)
    complaints = differences("sums", result[0], x, want, size, 4 * eps_of(x))
    if complaints:
        return complaints
    return layer_norm_modulate.compare(result[1:], (result[0], *norm))


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Within the rounding of the terms and of the sums."""
    inputs = arguments[:13]
    made, sizes = _values_bwd(*inputs), _values_bwd(*inputs, absolute=True)
    eps = 16 * eps_of(arguments[2])
    likes = fake_bwd(*arguments)
    return gated_residual.compare_needed(GRADIENTS, result, likes, made, sizes, eps)


def _sample(norm: Sample, activation: str = "linear", gated: bool = True) -> Sample:
    """The sample of :func:`mmfast.layer_norm_modulate`, with a gate of its frames."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        x, shift, scale, *others = norm.make(device, dtype, seed)
        generator = torch.Generator().manual_seed(seed + 2)
        y = drawn(generator, device, dtype, *x.shape)
        like = shift if shift is not None else scale
        if like is None:
            like = x.new_empty(x.shape[0], 1, x.shape[2])
        gate = drawn(generator, device, like.dtype, *like.shape) if gated else None
        return x, gate, y, shift, scale, *others, activation

    name = norm.name + ("_tanh" if activation == "tanh" else "") + ("" if gated else "_no_gate")
    return Sample(name, make, norm.shape, norm.bench)


def samples() -> Iterable[Sample]:
    """Blocks of DiT-XL and beyond the caches (``bench``), and odd shapes."""
    for i, norm in enumerate(layer_norm_modulate.samples()):
        yield _sample(norm, "tanh" if i % 3 == 1 and not norm.bench else "linear")
    yield _sample(layer_norm_modulate.sample(2, 11, 40), gated=False)


def _sample_bwd(forward: Sample, *missing: str) -> Sample:
    """``missing``: gradients that are not there (``grad_...``), or not needed."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        x, gate, y, *modulation, eps, norm, activation = forward.make(device, dtype, seed)
        # Any residual does; x is one.
        mean, rstd = (s.to(wide_of(x)) for s in layer_norm_modulate.statistics(x, eps, norm))
        generator = torch.Generator().manual_seed(seed + 1)
        grads = (drawn(generator, device, dtype, *x.shape) for _ in range(2))
        own = (
            None if name in missing else grad
            for name, grad in zip(("grad_residual", "grad_modulated"), grads, strict=True)
        )
        y = None if gate is None else y
        given = dict(zip(GRADIENTS, (x, gate, y, *modulation), strict=True))
        needs = (t is not None and name not in missing for name, t in given.items())
        mean = mean if norm == "layer" else mean.new_empty(0)
        return *own, x, mean, rstd, gate, y, *modulation, norm, activation, *needs

    name = "_".join((forward.name, *(f"less_{m}" for m in missing)))
    return Sample(name, make, forward.shape, forward.bench)


def samples_bwd() -> Iterable[Sample]:
    """Of the forward's."""
    for forward in samples():
        yield _sample_bwd(forward)
    small = _sample(layer_norm_modulate.sample(2, 35, 33), "tanh")
    for missing in (
        ("grad_residual",),
        ("grad_modulated",),
        ("x",),
        ("y", "shift"),
        ("gate", "scale", "bias"),
        ("x", "gate", "y"),
    ):
        yield _sample_bwd(small, *missing)


def _load_triton() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.gated_residual_modulate import gated_residual_modulate as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.gated_residual_modulate import gated_residual_modulate_bwd as launch

    return launch


OP = register(
    Op(
        name="gated_residual_modulate",
        schema="(Tensor x, Tensor? gate, Tensor y, Tensor? shift, Tensor? scale, Tensor? weight, "
        "Tensor? bias, float eps, str norm, str gate_activation) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("gated_residual_modulate"),
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
        name="gated_residual_modulate_bwd",
        schema="(Tensor? grad_residual, Tensor? grad_modulated, Tensor residual, Tensor mean, "
        "Tensor rstd, Tensor? gate, Tensor? y, Tensor? shift, Tensor? scale, Tensor? weight, "
        "Tensor? bias, str norm, str gate_activation, bool need_x, bool need_gate, bool need_y, "
        "bool need_shift, bool need_scale, bool need_weight, bool need_bias) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("gated_residual_modulate_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
