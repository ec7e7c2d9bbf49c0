"""The residual connection of a diffusion transformer's block: a branch added through a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice
from mmfast.ops.modulation import (
    GATES,
    along_tokens,
    bytes_of,
    check_tokens,
    drawn,
    eps_of,
    modulations_of,
    over_frames,
    tokens_of,
)
from mmfast.ops.per_sample import differences
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register


def gated_residual(
    x: Tensor, gate: Tensor, y: Tensor, *, gate_activation: str = "linear"
) -> Tensor:
    """``x + act(gate) y``, in one pass.

    Computed in float32 (float64 if x is) and rounded once. Gradients go to x, gate and y; that of
    the gate is a sum over its tokens in an order that depends on nothing but their number.

    Args:
        x: ``(B, ..., C)``, L tokens in each of B samples; float16, bfloat16, float32 or float64.
            Any strides.
        gate: ``(B, C)``, one for each sample; ``(B, F, C)``, one for each of F frames of L / F
            consecutive tokens; or ``(B, L, C)``, x's own shape, one for each token. B may be 1, and
            ``(C,)`` is for all. Any strides, such as those of ``chunk(6, -1)``, and any of the
            dtypes, whatever x's.
        y: the branch's output, x's shape and dtype.
        gate_activation: ``"linear"``, or ``"tanh"`` of the gate.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or ``gate_activation`` do not fit.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), fig. 3.
    """
    check_tokens(x, y=y)
    check_choice("gate_activation", gate_activation, GATES)
    (gates,) = modulations_of(x, {"gate": gate})
    result = backends.call(OP, tokens_of(x), gates, tokens_of(y), gate_activation)
    return result.view(x.shape)


def gate_values(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """What the branch is multiplied with, and its derivative, float64 like ``gate``."""
    if activation == "linear":
        return gate, torch.ones_like(gate)
    return gate.tanh(), gate.cosh().square().reciprocal()


def values(
    x: Tensor, gate: Tensor | None, y: Tensor, activation: str, *, absolute: bool = False
) -> Tensor:
    """The sum in float64; ``absolute``: of the absolute values of its terms."""
    x, y = x.double(), y.double()  # [B, L, C]
    part = y
    if gate is not None:
        part = gate_values(along_tokens(gate, x.shape[1]), activation)[0] * y
    return x.abs() + part.abs() if absolute else x + part


def values_bwd(
    grad: Tensor, gate: Tensor, y: Tensor, activation: str, *, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of the gate and of y in float64, from that of the sum, [B, L, C]."""
    grad, y = grad.double(), y.double()
    if absolute:
        grad, y = grad.abs(), y.abs()
    value, slope = gate_values(gate.double(), activation)  # [B, F, C]
    to_gate = over_frames(grad * y, gate.shape[1]) * slope
    to_y = grad * along_tokens(value, grad.shape[1])
    return to_gate, to_y.abs() if absolute else to_y


def reference(
    x: Tensor,  # [B, L, C]
    gate: Tensor,  # [B, F, C]
    y: Tensor,  # [B, L, C]
    gate_activation: str,
) -> Tensor:
    """The specification, in float64."""
    return fake(x, gate, y, gate_activation).copy_(values(x, gate, y, gate_activation))


def fake(x: Tensor, gate: Tensor, y: Tensor, gate_activation: str) -> Tensor:
    """The output without values."""
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, gate, y, ctx.gate_activation = inputs
    ctx.save_for_backward(gate, y)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    need_x, need_gate, need_y, _ = ctx.needs_input_grad
    to_gate = to_y = None
    if need_gate or need_y:
        to_gate, to_y = backends.call(
            BACKWARD, grad, *ctx.saved_tensors, ctx.gate_activation, need_gate, need_y
        )
    return grad if need_x else None, to_gate if need_gate else None, to_y if need_y else None, None


def reference_bwd(
    grad: Tensor,  # [B, L, C]
    gate: Tensor,  # [B, F, C]
    y: Tensor,  # [B, L, C]
    gate_activation: str,
    need_gate: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the gate and of y; no elements of what is not needed. x's is ``grad``."""
    outputs = fake_bwd(grad, gate, y, gate_activation, need_gate, need_y)
    made = values_bwd(grad, gate, y, gate_activation)
    for output, value, need in zip(outputs, made, (need_gate, need_y), strict=True):
        if need:
            output.copy_(value)
    return outputs


def fake_bwd(
    grad: Tensor, gate: Tensor, y: Tensor, gate_activation: str, need_gate: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    return (
        gate.new_empty(gate.shape if need_gate else (0,)),
        y.new_empty(y.shape if need_y else (0,)),
    )


def cost(x: Tensor, gate: Tensor, y: Tensor, gate_activation: str) -> Cost:
    """x, y and the gate read once, the sum written once."""
    return Cost(bytes=2 * x.nbytes + bytes_of(y, gate), flops=2 * x.numel())


def cost_bwd(
    grad: Tensor, gate: Tensor, y: Tensor, gate_activation: str, need_gate: bool, need_y: bool
) -> Cost:
    """The gradient and y read once, gradients of the gate and of y written once."""
    moved = bytes_of(grad, gate) + need_gate * bytes_of(y, gate) + need_y * y.nbytes
    return Cost(bytes=moved, flops=(2 * need_gate + need_y) * grad.numel())


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Within the rounding of the terms and of the result itself."""
    eps = 4 * eps_of(arguments[0])
    return differences(
        "sums", result, fake(*arguments), values(*arguments), values(*arguments, absolute=True), eps
    )


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Likewise, with the sums over tokens."""
    made = values_bwd(*arguments[:4])
    sizes = values_bwd(*arguments[:4], absolute=True)
    return compare_needed(
        ("gate", "y"), result, fake_bwd(*arguments), made, sizes, 16 * eps_of(arguments[0])
    )


def compare_needed(
    names: tuple[str, ...],
    result: tuple[Tensor, ...],
    likes: tuple[Tensor, ...],
    made: tuple[Tensor | None, ...],
    sizes: tuple[Tensor | None, ...],
    eps: float,
) -> list[str]:
    """Gradients by name, against their values in float64; without elements where not needed."""
    complaints = []
    for name, got, like, want, size in zip(names, result, likes, made, sizes, strict=True):
        if like.shape == (0,) or want is None or size is None:
            complaints += [] if got.shape == like.shape else [f"{name}: a gradient nobody needs"]
        else:
            complaints += differences(f"gradients of {name}", got, like, want, size, eps)
    return complaints


def sample(
    batch: int,
    length: int,
    channels: int,
    frames: int = 1,
    activation: str = "linear",
    mixed: bool = False,
    bench: bool = False,
) -> Sample:
    """``mixed``: the gate is float32 whatever x is, and lies as chunk(6) leaves it."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        x, y = (drawn(generator, device, dtype, batch, length, channels) for _ in range(2))
        own = torch.float32 if mixed else dtype
        gate = drawn(generator, device, own, batch, frames, 6 * channels).chunk(6, -1)[2]
        return x, gate if mixed else gate.contiguous(), y, activation

    name = f"{batch}x{length}x{channels}" + (f"_f{frames}" if frames != 1 else "")
    name += ("_tanh" if activation == "tanh" else "") + ("_mixed" if mixed else "")
    sizes = {"N": batch * length, "K": max(frames, 2), "D": channels}
    return Sample(name, make, sizes, bench)


def samples() -> Iterable[Sample]:
    """Blocks of DiT-XL and beyond the caches (``bench``), and odd shapes."""
    yield sample(8, 256, 1152, bench=True)
    yield sample(4, 1024, 1536, bench=True)
    yield sample(2, 6, 20)
    yield sample(3, 35, 33, mixed=True)
    yield sample(2, 70, 72, frames=5, activation="tanh")
    yield sample(2, 9, 17, frames=9, activation="tanh", mixed=True)
    yield sample(1, 1, 1, activation="tanh")
    yield sample(0, 3, 5)
    yield sample(2, 0, 5)


def _sample_bwd(forward: Sample, *missing: str) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        grad, gate, y, activation = forward.make(device, dtype, seed)
        return grad, gate, y, activation, "gate" not in missing, "y" not in missing

    name = "_".join((forward.name, *(f"no_{m}" for m in missing)))
    return Sample(name, make, forward.shape, forward.bench)


def samples_bwd() -> Iterable[Sample]:
    """Of the forward's."""
    for forward in samples():
        yield _sample_bwd(forward)
    yield _sample_bwd(sample(2, 35, 33), "gate")
    yield _sample_bwd(sample(2, 35, 33), "y")


def _load_triton() -> Callable[..., Tensor]:
    from mmfast.kernels.gated_residual import gated_residual as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, Tensor]]:
    from mmfast.kernels.gated_residual import gated_residual_bwd as launch

    return launch


OP = register(
    Op(
        name="gated_residual",
        schema="(Tensor x, Tensor gate, Tensor y, str gate_activation) -> Tensor",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("gated_residual"),
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
        name="gated_residual_bwd",
        schema="(Tensor grad, Tensor gate, Tensor y, str gate_activation, bool need_gate, "
        "bool need_y) -> (Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("gated_residual_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
