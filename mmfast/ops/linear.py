"""Linear layers, with an activation of their input."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice, check_device, check_dtype, check_floating
from mmfast.ops import gated_activation
from mmfast.ops.per_sample import differences
from mmfast.regions import autocast_dtype
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register

ACTIVATIONS = ("none", *gated_activation.ACTIVATIONS)

# Where products are faster than torch's, or as fast and without its memory: by their dtype, the
# instruction sets of the processors that were measured. With tiles torch's are faster.
_FASTER = {
    torch.float32: ("avx512vnni", "avx512bf16"),
    torch.bfloat16: ("avx2", "avx512", "avx512vnni", "avx512bf16"),
}


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """``activation(x) weight^T + bias``: a linear layer with the activation that stands before it.

    The activation is computed while rows are multiplied: no tensor holds it, neither for the result
    nor for the gradients, which make it again from x. Under autocast the products have its dtype,
    like those of ``torch.nn.functional.linear``, and weights are rounded while they are read.

    mmfast's own products serve bfloat16 on CPUs with AVX2 or AVX-512 but without matrix
    instructions, and float32 on those with AVX512-VNNI, or whatever backend is forced. Elsewhere,
    on GPUs too, torch's are faster: they are torch's, behind :func:`mmfast.gated_activation`.

    Args:
        x: ``(..., K)``, float16, bfloat16, float32 or float64. Any strides; rows that are equally
            far apart are read in place.
        weight: ``(N, K)``, x's dtype; under autocast any.
        bias: ``(N,)``, likewise.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.

    Returns:
        ``(..., N)``, contiguous, of x's dtype or autocast's.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes or devices do not fit, or there is no such activation.
    """
    check_floating("x", x)
    check_choice("activation", activation, ACTIVATIONS)
    kind = x.device.type
    dtype: torch.dtype = x.dtype
    others: tuple[torch.dtype, ...] = (dtype,)
    lowered = autocast_dtype(kind)
    if lowered is not None and dtype != torch.float64:  # which stays under torch's too
        dtype = lowered
        others = tuple(d for d in FLOATING if d != torch.float64)
    check_dtype("weight", weight, others)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "x must be (..., K) and weight (N, K), "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None:
        check_dtype("bias", bias, others)
        check_device(x=x, weight=weight, bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    else:
        check_device(x=x, weight=weight)
    if not pays(kind, dtype):
        if activation != "none":
            x = gated_activation.gated_activation(x, activation=activation)
        return F.linear(x, weight, bias)
    return backends.call(OP, x, weight, bias, activation, str(dtype).removeprefix("torch."))


def pays(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` are left to mmfast's kernels."""
    if backends.forced() is not None:
        return True
    return device_type == "cpu" and backends.isa() in _FASTER.get(dtype, ())


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _active(x: Tensor, activation: str) -> Tensor:
    return x if activation == "none" else gated_activation.reference(x, None, activation, "gate")


def reference(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    activation: str,
    dtype: str,
) -> Tensor:
    """The specification: the operands are rounded to ``dtype``, of which the result is."""
    to = getattr(torch, dtype)
    x, weight = x.contiguous(), weight.contiguous()  # or the last bits would depend on strides
    with torch.autocast(x.device.type, enabled=False):
        made = F.linear(  # [..., N]
            _active(x, activation).to(to), weight.to(to), None if bias is None else bias.to(to)
        )
    return made.contiguous()


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: str) -> Tensor:
    """The output without values."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=getattr(torch, dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.activation, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    if grad is None or not any(needs):
        return None, None, None, None, None
    x, weight = ctx.saved_tensors
    grads = backends.call(BACKWARD, grad, x, weight, ctx.activation, *needs)
    made = [g if need else None for g, need in zip(grads, needs, strict=True)]
    if made[2] is not None and made[2].dtype != ctx.bias_dtype:
        made[2] = made[2].to(ctx.bias_dtype)
    return *made, None, None


def reference_bwd(
    grad: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    activation: str,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the last of weight's dtype; (0,) where they are not wanted.

    Products are of grad's dtype.
    """
    grads = list(fake_bwd(grad, x, weight, activation, want_x, want_weight, want_bias))
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    flat = _rows(grad)  # [M, N]
    if want_x:
        to_active = grad @ weight.to(grad.dtype)  # [..., K]
        if activation != "none":
            bwd = gated_activation.reference_bwd
            to_active, _ = bwd(to_active.to(x.dtype), x, None, activation, "gate", True, False)
        grads[0].copy_(to_active)
    if want_weight:
        active = _rows(_active(x, activation).to(grad.dtype))  # [M, K]
        grads[1].copy_(flat.mT @ active)
    if want_bias:
        grads[2].copy_(flat.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)))
    return grads[0], grads[1], grads[2]


def fake_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs without values."""
    return (
        x.new_empty(x.shape if want_x else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
        weight.new_empty(weight.shape[:1] if want_bias else (0,)),
    )


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: str) -> Cost:
    """Everything read once, the result written once."""
    results = math.prod(x.shape[:-1]) * weight.shape[0]
    read = x.nbytes + weight.nbytes + (0 if bias is None else bias.nbytes)
    size = getattr(torch, dtype).itemsize
    return Cost(bytes=read + results * size, flops=2 * results * x.shape[-1])


def cost_bwd(grad: Tensor, x: Tensor, weight: Tensor, activation: str, *wanted: bool) -> Cost:
    """Likewise."""
    made = (x.nbytes, weight.nbytes, len(weight) * weight.element_size())
    moved = grad.nbytes + sum(n for n, want in zip(made, wanted, strict=True) if want)
    moved += weight.nbytes * wanted[0] + x.nbytes * wanted[1]
    products = (wanted[0] + wanted[1]) * grad.numel() * x.shape[-1]
    return Cost(bytes=moved, flops=2 * products + wanted[2] * grad.numel())


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).double()


def _operand(x: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, float]:
    """act(x) in float64, and what its rounding to ``dtype`` may have moved it, relative to |x|."""
    if activation == "none":
        return _rounded(x, dtype), 0.0
    active = _active(x.double(), activation)
    return active, torch.finfo(dtype).eps + 4 * torch.finfo(_wide(x.dtype)).eps


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _terms(dtype: torch.dtype, count: int) -> float:
    """The error of a sum of ``count`` terms, relative to their absolute values."""
    return (4 + math.sqrt(count)) * torch.finfo(_wide(dtype)).eps


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Within the rounding of the terms and of the result."""
    x, weight, bias, activation, name = arguments
    dtype = getattr(torch, name)
    active, moved = _operand(x, activation, dtype)
    of_weight = _rounded(weight, dtype)
    of_bias = torch.zeros_like(of_weight[:, 0]) if bias is None else bias.double()
    want = active @ of_weight.mT + of_bias
    size = (active.abs() @ of_weight.abs().mT + of_bias.abs()) * _terms(dtype, x.shape[-1])
    size = size + moved * (x.double().abs() @ of_weight.abs().mT)
    if bias is not None:
        size = size + torch.finfo(dtype).eps * of_bias.abs()
    return differences("numbers", result, fake(*arguments), want, size, 1.0)


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Likewise; of an activation's derivative, a sum of terms, none is much more than 1."""
    grad, x, weight, activation, *wanted = arguments
    likes, dtype = fake_bwd(*arguments), grad.dtype
    flat = _rows(grad.double())  # [M, N]
    rows = _rows(x)
    active, moved = _operand(rows, activation, dtype)
    of_weight = _rounded(weight, dtype)
    to_active, size = flat @ of_weight, flat.abs() @ of_weight.abs()
    to_x, slack = to_active, _terms(dtype, flat.shape[1])
    if activation != "none":
        bwd = gated_activation.reference_bwd
        to_x, _ = bwd(to_active, rows.double(), None, activation, "gate", True, False)
        # torch rounds what is passed to the derivative.
        slack += 8 * torch.finfo(_wide(x.dtype)).eps + torch.finfo(x.dtype).eps
        slack += torch.finfo(dtype).eps
    checks = [
        ("numbers of grad_x", to_x.view(x.shape), (slack * size).view(x.shape)),
        (
            "numbers of grad_weight",
            flat.mT @ active,
            flat.abs().mT @ (_terms(dtype, len(flat)) * active.abs() + moved * rows.double().abs()),
        ),
        ("numbers of grad_bias", flat.sum(0), _terms(dtype, len(flat)) * flat.abs().sum(0)),
    ]
    complaints: list[str] = []
    for (name, want, allowed), got, like, need in zip(checks, result, likes, wanted, strict=True):
        if need:
            complaints += differences(
                name, got, like, want, allowed + _casts(dtype, like, want), 1.0
            )
        elif got.numel():
            complaints.append(f"{name}: there, though not wanted")
    return complaints


def _casts(dtype: torch.dtype, like: Tensor, want: Tensor) -> Tensor:
    """What a result in ``dtype``, which is not that of the output, may have lost."""
    return want.abs() * (0.0 if like.dtype == dtype else torch.finfo(dtype).eps)


def _sample(
    lead: tuple[int, ...],
    inputs: int,
    outputs: int,
    activation: str = "none",
    bias: bool = True,
    low: bool = False,
    bench: bool = False,
) -> Sample:
    """``low``: products are of bfloat16, as under autocast, unless in float64."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        x, weight = normal(*lead, inputs), normal(outputs, inputs) / math.sqrt(max(inputs, 1))
        lowered = low and dtype != torch.float64
        name = "bfloat16" if lowered else str(dtype).removeprefix("torch.")
        return x, weight, normal(outputs) if bias else None, activation, name

    name = "_".join(("x".join(map(str, (*lead, inputs, outputs))), activation))
    name += "_no_bias" * (not bias) + "_low" * low
    return Sample(name, make, {"N": math.prod(lead), "K": outputs, "D": inputs}, bench)


def samples() -> Iterable[Sample]:
    """Of DiT-S and DiT-XL (``bench``), and odd shapes."""
    yield _sample((4, 64), 384, 1536, bench=True)
    yield _sample((4, 64), 1536, 384, "gelu_tanh", bench=True)
    yield _sample((256,), 1152, 4608, bench=True)
    yield _sample((5,), 7, 9)
    yield _sample((2, 3), 17, 70, "gelu")
    yield _sample((49, 2), 66, 33, "gelu_tanh", bias=False)
    yield _sample((3,), 20, 130, "silu")
    yield _sample((), 8, 16)
    yield _sample((4,), 2100, 3)
    yield _sample((2, 5), 18, 21, low=True)
    yield _sample((50,), 9, 12, "gelu_tanh", low=True)
    yield _sample((0,), 4, 3)
    yield _sample((3,), 0, 5)
    yield _sample((3,), 5, 0)
    yield _sample((1,), 1, 1, bias=False)


def _sample_bwd(forward: Sample, missing: str = "") -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        x, weight, _, activation, name = forward.make(device, dtype, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        shape = (*x.shape[:-1], len(weight))
        grad = torch.randn(shape, generator=generator).to(device, getattr(torch, name))
        wanted = (name != missing for name in ("x", "weight", "bias"))
        return grad, x, weight, activation, *wanted

    name = forward.name + f"_less_{missing}" * bool(missing)
    return Sample(name, make, forward.shape, forward.bench)


def samples_bwd() -> Iterable[Sample]:
    """As above, and more rows than are added up at a time, also wider than is packed at a time."""
    for sample in samples():
        yield _sample_bwd(sample)
    for missing in ("x", "weight", "bias"):
        yield _sample_bwd(_sample((2, 9), 18, 35, "silu"), missing)
    yield _sample_bwd(_sample((2300,), 5, 66, "gelu_tanh"))
    yield _sample_bwd(_sample((1100,), 3, 1160))


OP = register(
    Op(
        name="linear",
        schema="(Tensor x, Tensor weight, Tensor? bias, str activation, str dtype) -> Tensor",
        reference=reference,
        fake=fake,
        backends={"cpp": backends.cpp("linear")},
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients),
    )
)

BACKWARD = register(
    Op(
        name="linear_bwd",
        schema="(Tensor grad, Tensor x, Tensor weight, str activation, bool want_x, "
        "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={"cpp": backends.cpp("linear_bwd")},
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
