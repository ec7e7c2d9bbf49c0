"""Gated activations: GELU and SiLU, alone or times another tensor (GEGLU, SwiGLU)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice, check_device, check_floating
from mmfast.ops.per_sample import differences, rounding
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")

# What x holds: the gate alone, or both halves of one projection, in this order.
LAYOUTS = ("gate", "gate_value", "value_gate")

_LINEAR = 2 * math.sqrt(2 / math.pi)  # of twice the argument of the tanh


def gated_activation(
    gate: Tensor, value: Tensor | None = None, *, activation: str = "gelu_tanh"
) -> Tensor:
    """``activation(gate) * value``, or the activation alone, in one pass.

    In float32 (float64 for float64), rounded once. The gradients recompute the activation: what is
    saved for them is ``gate`` and ``value`` themselves.

    Args:
        gate: ``(..., C)``, float16, bfloat16, float32 or float64. Any strides; halves of a
            projection, ``chunk(2, -1)``, are read in place.
        value: None, or like ``gate``.
        activation: ``"gelu"`` (of the normal distribution function), ``"gelu_tanh"`` (its
            approximation) or ``"silu"``.

    Returns:
        ``(..., C)``, contiguous, of ``gate``'s dtype.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes or devices do not fit, or there is no such activation.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016); Shazeer, "GLU Variants
    Improve Transformer" (2020).
    """
    check_floating("gate", gate)
    check_choice("activation", activation, ACTIVATIONS)
    if gate.dim() < 1:
        raise ValueError("gate must be (..., C), got a number")
    if value is not None:
        check_floating("value", value)
        check_device(gate=gate, value=value)
        if value.shape != gate.shape:
            raise ValueError(
                f"value must have the gate's shape {tuple(gate.shape)}, got {tuple(value.shape)}"
            )
        if value.dtype != gate.dtype:
            raise TypeError(f"value must have the gate's dtype {gate.dtype}, got {value.dtype}")
    return backends.call(OP, gate, value, activation, "gate")


def geglu(x: Tensor, *, approximate: str = "none", gate: str = "last") -> Tensor:
    """GELU of one half of x times the other half: ``value * gelu(gate)``.

    Like :func:`gated_activation` of the halves, but the gradient of x is one tensor.

    Args:
        x: ``(..., 2 C)``, a projection: ``value, gate = x.chunk(2, -1)``.
        approximate: ``"none"`` or ``"tanh"``, as in ``torch.nn.functional.gelu``.
        gate: which half the gate is: ``"last"``, as in diffusers' ``GEGLU``, or ``"first"``.

    Returns:
        ``(..., C)``, contiguous.

    Raises:
        TypeError: x is no tensor, or has another dtype.
        ValueError: x has no two halves, or an option is none of these.
    """
    check_choice("approximate", approximate, ("none", "tanh"))
    return _packed(x, "gelu" if approximate == "none" else "gelu_tanh", gate)


def swiglu(x: Tensor, *, gate: str = "last") -> Tensor:
    """SiLU of one half of x times the other half: ``value * silu(gate)``.

    Args:
        x: ``(..., 2 C)``, a projection.
        gate: which half the gate is: ``"last"``, as in diffusers' ``SwiGLU``, or ``"first"``, as in
            Flux 2 and LLaMA.

    Returns:
        ``(..., C)``, contiguous.

    Raises:
        TypeError: x is no tensor, or has another dtype.
        ValueError: x has no two halves, or ``gate`` is neither.
    """
    return _packed(x, "silu", gate)


def _packed(x: Tensor, activation: str, gate: str) -> Tensor:
    check_floating("x", x)
    check_choice("gate", gate, ("first", "last"))
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x must be (..., 2 C), got shape {tuple(x.shape)}")
    return backends.call(OP, x, None, activation, "gate_value" if gate == "first" else "value_gate")


def _parts(x: Tensor, value: Tensor | None, layout: str) -> tuple[Tensor, Tensor | None]:
    """The gate and the value."""
    if layout == "gate":
        return x, value
    first, last = x.chunk(2, -1)
    return (first, last) if layout == "gate_value" else (last, first)


def _activated(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation x s(x) and its derivative."""
    if activation == "gelu":
        s = torch.erfc(x * -math.sqrt(0.5)) / 2
        bend = (x * x / -2).exp() / math.sqrt(2 * math.pi)
        slope: Tensor | float = 1.0
    else:
        # tanh(z) = 2 sigmoid(2 z) - 1
        linear, cubic = (1.0, 0.0) if activation == "silu" else (_LINEAR, _LINEAR * 0.044715)
        y = x if activation == "silu" else x * (linear + cubic * x * x)
        s = y.sigmoid()
        bend = s * (-y).sigmoid()
        slope = linear + 3 * cubic * x * x
    # Where nothing bends any more, x and the slope may be infinite.
    return x * s, torch.where(bend == 0, s, s + x * bend * slope)


def _wide(tensor: Tensor | None) -> Tensor | None:
    """In the dtype of the arithmetic; dense, for torch's last bits depend on strides."""
    if tensor is None:
        return None
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def reference(
    x: Tensor,  # [..., C], [..., 2 C] if it holds both
    value: Tensor | None,  # [..., C]
    activation: str,
    layout: str,
) -> Tensor:
    """The specification."""
    gate, of = map(_wide, _parts(x, value, layout))  # [..., C]
    assert gate is not None
    result, _ = _activated(gate, activation)
    result = result if of is None else result * of
    return result.to(x.dtype).contiguous()


def fake(x: Tensor, value: Tensor | None, activation: str, layout: str) -> Tensor:
    """The output without values."""
    return x.new_empty(_parts(x, value, layout)[0].shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, value, ctx.activation, ctx.layout = inputs
    ctx.save_for_backward(x, value)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    x, value = ctx.saved_tensors
    of_x, of_value = ctx.needs_input_grad[:2]
    if grad is None or not (of_x or of_value):
        return None, None, None, None
    grads = backends.call(BACKWARD, grad, x, value, ctx.activation, ctx.layout, of_x, of_value)
    return grads[0] if of_x else None, grads[1] if of_value else None, None, None


def reference_bwd(
    grad: Tensor,  # [..., C]
    x: Tensor,  # as in the forward
    value: Tensor | None,  # [..., C]
    activation: str,
    layout: str,
    want_x: bool,
    want_value: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and value; empty, (0,), where they are not wanted."""
    wide = _wide(grad)
    assert wide is not None
    gate, of = map(_wide, _parts(x, value, layout))  # [..., C]
    assert gate is not None
    active, derivative = _activated(gate, activation)
    grad_value = wide * active  # [..., C]
    grad_x = (wide if of is None else wide * of) * derivative
    if layout != "gate":
        halves = [grad_x, grad_value]
        grad_x = torch.cat(halves if layout == "gate_value" else halves[::-1], -1)  # [..., 2 C]
    return (
        grad_x.to(x.dtype).contiguous() if want_x else x.new_empty((0,)),
        grad_value.to(x.dtype).contiguous() if want_value else x.new_empty((0,)),
    )


def fake_bwd(
    grad: Tensor,
    x: Tensor,
    value: Tensor | None,
    activation: str,
    layout: str,
    want_x: bool,
    want_value: bool,
) -> tuple[Tensor, Tensor]:
    """The outputs without values."""
    return x.new_empty(x.shape if want_x else (0,)), x.new_empty(x.shape if want_value else (0,))


def cost(x: Tensor, value: Tensor | None, activation: str, layout: str) -> Cost:
    """Everything read once, the result written once."""
    result = x.nbytes // (1 if layout == "gate" else 2)
    moved = x.nbytes + (0 if value is None else value.nbytes) + result
    return Cost(bytes=moved, flops=20 * result // x.element_size())


def cost_bwd(
    grad: Tensor,
    x: Tensor,
    value: Tensor | None,
    activation: str,
    layout: str,
    want_x: bool,
    want_value: bool,
) -> Cost:
    """Likewise."""
    moved = grad.nbytes + x.nbytes + (0 if value is None else value.nbytes)
    return Cost(bytes=moved + (want_x + want_value) * x.nbytes, flops=30 * grad.numel())


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Within the rounding of |gate value|, of which the activation is a part, and of the result."""
    x, value, activation, layout = arguments
    gate, of = _parts(x.double(), _double(value), layout)
    size = gate.abs() if of is None else (gate * of).abs()
    want = reference(x.double(), _double(value), activation, layout)
    eps = 4 * rounding(x.dtype, is_drawn=False)
    return differences("numbers", result, fake(*arguments), want, size.nan_to_num(), eps)


def compare_bwd(
    result: tuple[Tensor, Tensor],
    arguments: Arguments,
    expected: tuple[Tensor, Tensor] | None = None,
) -> list[str]:
    """Likewise; a derivative is a sum of terms of which none is much more than 1."""
    grad, x, value, *options = arguments
    layout = options[1]
    wide = [_double(t) for t in (grad, x, value)]
    want = reference_bwd(*wide, *options)  # type: ignore[arg-type]
    gate, of = _parts(wide[1], wide[2], layout)  # type: ignore[arg-type]
    of_gate = grad.double().abs() * (1 if of is None else of.abs())
    of_value = (grad.double() * gate).abs()
    sizes = [of_gate, of_value]
    if layout != "gate":
        sizes[0] = torch.cat(sizes if layout == "gate_value" else sizes[::-1], -1)
    eps = 8 * rounding(x.dtype, is_drawn=False)
    complaints = []
    for i, name in enumerate(("gradients of x", "gradients of value")):
        if options[2 + i]:
            like = fake_bwd(*arguments)[i]
            size = sizes[i].nan_to_num()
            complaints += differences(name, result[i], like, want[i], size, eps)
        elif result[i].shape != (0,):
            complaints.append(f"{name} that nobody wanted")
    return complaints


def _inputs(
    shape: tuple[int, ...],
    layout: str,
    gated: bool,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A gradient, x, value."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device, dtype)

    grad = normal(*shape)
    if layout != "gate":
        return grad, normal(*shape[:-1], 2 * shape[-1], scale=2), None
    return grad, normal(*shape, scale=2), normal(*shape) if gated else None


def _sizes(shape: tuple[int, ...], bench: bool) -> dict[str, Any]:
    rows = torch.Size(shape[:-1]).numel()
    return {"shape": {"N": rows, "K": 2, "D": shape[-1], "H": 1}, "bench": bench}


def _sample(
    shape: tuple[int, ...],
    activation: str,
    layout: str = "gate",
    gated: bool = False,
    bench: bool = False,
) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        _, x, value = _inputs(shape, layout, gated, device, dtype, seed)
        return x, value, activation, layout

    name = f"{activation}_{layout}{'_value' * gated}_{'x'.join(map(str, shape))}"
    return Sample(name, make, **_sizes(shape, bench))


def samples() -> Iterable[Sample]:
    """MLPs of diffusion transformers (``bench``) and odd shapes."""
    yield _sample((4, 256, 4608), "gelu_tanh", bench=True)
    yield _sample((4, 256, 4608), "silu", "value_gate", bench=True)
    for activation in ACTIVATIONS:
        yield _sample((3, 37), activation)
        yield _sample((2, 5, 67), activation, gated=True)
        yield _sample((5, 40), activation, "value_gate")
    yield _sample((2, 3, 5), "silu", "gate_value")
    yield _sample((1,), "gelu", gated=True)
    yield _sample((0, 7), "silu", gated=True)
    yield _sample((3, 0), "gelu_tanh", "gate_value")


def _sample_bwd(
    shape: tuple[int, ...],
    activation: str,
    layout: str = "gate",
    gated: bool = False,
    missing: str = "",
    bench: bool = False,
) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        grad, x, value = _inputs(shape, layout, gated, device, dtype, seed)
        return grad, x, value, activation, layout, missing != "x", gated and missing != "value"

    name = f"{activation}_{layout}{'_value' * gated}_{'x'.join(map(str, shape))}"
    return Sample(name + f"_no_{missing}" * bool(missing), make, **_sizes(shape, bench))


def samples_bwd() -> Iterable[Sample]:
    """As above."""
    yield _sample_bwd((4, 256, 4608), "gelu_tanh", bench=True)
    yield _sample_bwd((4, 256, 4608), "silu", "value_gate", bench=True)
    for activation in ACTIVATIONS:
        yield _sample_bwd((3, 37), activation)
        yield _sample_bwd((2, 5, 67), activation, gated=True)
        yield _sample_bwd((5, 40), activation, "value_gate")
    yield _sample_bwd((2, 3, 5), "silu", "gate_value")
    yield _sample_bwd((2, 19), "gelu", gated=True, missing="x")
    yield _sample_bwd((2, 19), "gelu_tanh", gated=True, missing="value")
    yield _sample_bwd((0, 7), "silu", gated=True)
    yield _sample_bwd((3, 0), "gelu_tanh", "gate_value")


def _load_triton() -> Callable[..., Tensor]:
    from mmfast.kernels.gated_activation import gated_activation as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, Tensor]]:
    from mmfast.kernels.gated_activation import gated_activation_bwd as launch

    return launch


OP = register(
    Op(
        name="gated_activation",
        schema="(Tensor x, Tensor? value, str activation, str layout) -> Tensor",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("gated_activation"),
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
        name="gated_activation_bwd",
        schema="(Tensor grad, Tensor x, Tensor? value, str activation, str layout, bool want_x, "
        "bool want_value) -> (Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("gated_activation_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
