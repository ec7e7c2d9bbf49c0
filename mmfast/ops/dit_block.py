"""A whole block of DiT as one op: its parts' kernels, without what eight ops cost around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice
from mmfast.ops import (
    gated_residual,
    gated_residual_modulate,
    layer_norm_modulate,
    scaled_dot_product_attention,
)
from mmfast.ops import linear as linear_op
from mmfast.ops.attention import new_lse
from mmfast.ops.modulation import bytes_of, drawn, wide_of
from mmfast.regions import autocast_dtype
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register

Layer = tuple[Tensor, Tensor | None]  # weight and bias

# What the gradients need of a forward, in the order of its outputs.
KEPT = (
    "mean", "rstd", "qkv", "attended", "lse", "y", "residual", "mlp_mean", "mlp_rstd", "hidden",
    "fed",
)  # fmt: skip
INPUTS = (
    "x", "modulation", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "fc1_weight",
    "fc1_bias", "fc2_weight", "fc2_bias",
)  # fmt: skip


def dit_block(
    x: Tensor,
    modulation: Tensor,
    layers: Sequence[Layer],
    *,
    num_heads: int,
    scale: float,
    eps: float,
    mlp_eps: float,
    activation: str,
) -> Tensor | None:
    """A block with adaLN-Zero, self-attention and an MLP, if one op can make it here::

        x = x + gate proj(attention(qkv(norm(x) (1 + scale) + shift)))
        x = x + mlp_gate fc2(act(fc1(norm(x) (1 + mlp_scale) + mlp_shift)))

    The same as by :func:`mmfast.layer_norm_modulate`, :func:`mmfast.linear`,
    :func:`mmfast.scaled_dot_product_attention`, :func:`mmfast.gated_residual_modulate` and
    :func:`mmfast.gated_residual`, to the bit where there is no autocast. Under autocast what goes
    into a product is written in its dtype. Gradients make the norms' outputs again.

    Args:
        x: tokens ``(B, L, C)``.
        modulation: shift, scale, gate, and the same of the MLP: ``(B, 6 C)``, or for each of F
            frames ``(B, F, 6 C)``.
        layers: ``qkv`` to ``(B, L, 3 A)``, ``proj``, ``fc1`` and ``fc2``, weights and biases.
        num_heads: of the attention, whose width A is a multiple.
        scale: of the scores.
        eps, mlp_eps: of the norms.
        activation: of :func:`mmfast.linear`.

    Returns:
        ``(B, L, C)``, of x's dtype; None where the parts are to be called instead: mmfast's
        products are not the faster ones, dtypes or devices are several, or there is nothing to do.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), fig. 3.
    """
    check_choice("activation", activation, linear_op.ACTIVATIONS)
    if modulation.dim() == 2:
        modulation = modulation[:, None]
    dtype = _products(x, modulation, layers)
    if dtype is None or not _fits(x, modulation, layers, num_heads):
        return None
    weights = [tensor for layer in layers for tensor in layer]
    out, *_ = backends.call(
        OP, x, modulation, *weights, num_heads, scale, eps, mlp_eps, activation,
        str(dtype).removeprefix("torch."), torch.is_grad_enabled(),
    )  # fmt: skip
    return out


def _products(x: Tensor, modulation: Tensor, layers: Sequence[Layer]) -> torch.dtype | None:
    """The dtype of the products, if all that goes into them may be of its own."""
    kind, dtype = x.device.type, x.dtype
    lowered = autocast_dtype(kind)
    if lowered is not None:
        dtype = lowered
    halves = (torch.bfloat16, torch.float16)
    if dtype != x.dtype and not (x.dtype == torch.float32 and dtype in halves):
        return None
    tensors = [t for layer in layers for t in layer if t is not None]
    if any(t.device != x.device for t in (modulation, *tensors)):
        return None
    # Without autocast, layers take no other dtype than their weights'.
    dtypes = (dtype,) if lowered is None else (torch.float32, *halves)
    if any(t.dtype not in dtypes for t in tensors) or modulation.dtype not in FLOATING:
        return None
    # Where its products are slower than PyTorch's, the block is too.
    return dtype if linear_op.pays(kind, dtype) else None


def _fits(x: Tensor, modulation: Tensor, layers: Sequence[Layer], num_heads: int) -> bool:
    """Whether the shapes are a block's."""
    if x.dim() != 3 or x.numel() == 0:
        return False
    batch, length, channels = x.shape
    (qkv, _), (proj, _), (fc1, _), (fc2, _) = layers
    frames = modulation.shape[1]
    width = proj.shape[1]
    return (
        modulation.shape == (batch, frames, 6 * channels)
        and frames > 0
        and length % frames == 0
        and qkv.shape == (3 * width, channels)
        and width % num_heads == 0
        and proj.shape[0] == fc2.shape[0] == fc1.shape[1] == channels
        and fc1.shape[0] == fc2.shape[1]
        and all(bias is None or bias.shape == weight.shape[:1] for weight, bias in layers)
    )


def _heads(packed: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, H, L, E] of [B, L, 3 A]."""
    return packed.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _tokens(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def _normed(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """In the branch's dtype, with mean and 1 / deviation."""
    made, mean, rstd = layer_norm_modulate.reference(x, shift, scale, None, None, eps, "layer")
    return made.to(dtype), mean, rstd


def reference(
    x: Tensor,  # [B, L, C]
    modulation: Tensor,  # [B, F, 6 C]
    qkv_weight: Tensor,  # [3 A, C]
    qkv_bias: Tensor | None,
    proj_weight: Tensor,  # [C, A]
    proj_bias: Tensor | None,
    fc1_weight: Tensor,  # [M, C]
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,  # [C, M]
    fc2_bias: Tensor | None,
    heads: int,
    scale: float,
    eps: float,
    mlp_eps: float,
    activation: str,
    dtype: str,
    keep: bool,
) -> tuple[Tensor, ...]:
    """The specification: its parts' one after another. The result, and :data:`KEPT`."""
    low = getattr(torch, dtype)
    x, modulation = x.contiguous(), modulation.contiguous()  # or last bits would depend on strides
    shift, factor, gate, mlp_shift, mlp_factor, mlp_gate = modulation.chunk(6, -1)  # [B, F, C]
    normed, mean, rstd = _normed(x, shift, factor, eps, low)
    qkv = linear_op.reference(normed, qkv_weight, qkv_bias, "none", dtype)  # [B, L, 3 A]
    q, k, v = _heads(qkv, heads)
    out, lse = scaled_dot_product_attention.reference(
        q, k, v, None, 0.0, False, scale, None, None
    )  # [B, H, L, E], [B, H, L]
    attended = _tokens(out)  # [B, L, A]
    y = linear_op.reference(attended, proj_weight, proj_bias, "none", dtype)  # [B, L, C]
    residual = gated_residual.reference(x, gate, y, "linear")
    normed, mlp_mean, mlp_rstd = _normed(residual, mlp_shift, mlp_factor, mlp_eps, low)
    hidden = linear_op.reference(normed, fc1_weight, fc1_bias, "none", dtype)  # [B, L, M]
    fed = linear_op.reference(hidden, fc2_weight, fc2_bias, activation, dtype)  # [B, L, C]
    made = gated_residual.reference(residual, mlp_gate, fed, "linear")
    kept = (
        mean, rstd, qkv, attended.contiguous(), lse, y, residual, mlp_mean, mlp_rstd, hidden, fed,
    )  # fmt: skip
    return made, *(kept if keep else (x.new_empty(0) for _ in kept))


def fake(
    x: Tensor,
    modulation: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    heads: int,
    scale: float,
    eps: float,
    mlp_eps: float,
    activation: str,
    dtype: str,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Outputs without values."""
    if not keep:
        return x.new_empty(x.shape), *(x.new_empty(0) for _ in KEPT)
    low = getattr(torch, dtype)
    lead = x.shape[:2]
    mean, rstd, mlp_mean, mlp_rstd = (x.new_empty(lead, dtype=wide_of(x)) for _ in range(4))
    qkv, attended, y, hidden, fed = (
        x.new_empty((*lead, width), dtype=low)
        for width in (
            qkv_weight.shape[0], proj_weight.shape[1], x.shape[2], fc1_weight.shape[0], x.shape[2],
        )
    )  # fmt: skip
    lse = new_lse(qkv, (x.shape[0], heads, x.shape[1]))
    residual = x.new_empty(x.shape)
    return (
        x.new_empty(x.shape), mean, rstd, qkv, attended, lse, y, residual, mlp_mean, mlp_rstd,
        hidden, fed,
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    *ctx.options, ctx.dtype, ctx.keep = inputs[10:]
    ctx.bias_dtypes = [None if b is None else b.dtype for b in inputs[3:10:2]]
    if ctx.keep:
        ctx.save_for_backward(*inputs[:2], *inputs[2:10:2], *output[1:])
    else:
        ctx.save_for_backward(*inputs[:10])


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:10]
    if grad is None or not any(needs):
        return (None,) * 17
    saved = ctx.saved_tensors
    if not ctx.keep:  # the forward once more
        _, *kept = backends.call(OP, *saved, *ctx.options, ctx.dtype, True)
        saved = (*saved[:2], *saved[2::2], *kept)
    wanted = sum(need << i for i, need in enumerate(needs))
    made = backends.call(BACKWARD, grad, *saved, *ctx.options, wanted)
    grads = [g if need else None for g, need in zip(made, needs, strict=True)]
    for i, dtype in zip(range(3, 10, 2), ctx.bias_dtypes, strict=True):
        bias = grads[i]
        if bias is not None and bias.dtype != dtype:
            grads[i] = bias.to(dtype)
    return *grads, *(None,) * 7


def reference_bwd(
    grad: Tensor,  # [B, L, C]
    x: Tensor,  # [B, L, C]
    modulation: Tensor,  # [B, F, 6 C]
    qkv_weight: Tensor,  # [3 A, C]
    proj_weight: Tensor,  # [C, A]
    fc1_weight: Tensor,  # [M, C]
    fc2_weight: Tensor,  # [C, M]
    mean: Tensor,  # [B, L]
    rstd: Tensor,  # [B, L]
    qkv: Tensor,  # [B, L, 3 A]
    attended: Tensor,  # [B, L, A]
    lse: Tensor,  # [B, H, L]
    y: Tensor,  # [B, L, C]
    residual: Tensor,  # [B, L, C]
    mlp_mean: Tensor,  # [B, L]
    mlp_rstd: Tensor,  # [B, L]
    hidden: Tensor,  # [B, L, M]
    fed: Tensor,  # [B, L, C]
    heads: int,
    scale: float,
    eps: float,
    mlp_eps: float,
    activation: str,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Gradients of :data:`INPUTS`, biases' of their weights' dtypes; (0,) unless bit i of
    ``wanted`` is set."""
    low = qkv.dtype
    grad, x, modulation, qkv, attended, lse, y, residual, hidden, fed = (
        t.contiguous() for t in (grad, x, modulation, qkv, attended, lse, y, residual, hidden, fed)
    )
    shift, factor, gate, mlp_shift, mlp_factor, mlp_gate = modulation.chunk(6, -1)  # [B, F, C]

    def layer(passed: Tensor, given: Tensor, weight: Tensor, act: str = "none") -> tuple[Any, ...]:
        return linear_op.reference_bwd(passed, given, weight, act, True, True, True)

    to_mlp_gate, to_fed = gated_residual.reference_bwd(grad, mlp_gate, fed, "linear", True, True)
    to_hidden, *of_fc2 = layer(to_fed, hidden, fc2_weight, activation)
    normed, *_ = _normed(residual, mlp_shift, mlp_factor, mlp_eps, low)
    to_normed, *of_fc1 = layer(to_hidden, normed, fc1_weight)
    to_residual, to_gate, to_y, to_mlp_shift, to_mlp_factor, *_ = (
        gated_residual_modulate.reference_bwd(
            grad, to_normed, residual, mlp_mean, mlp_rstd, gate, y, mlp_shift, mlp_factor, None,
            None, "layer", "linear", *(True,) * 5, False, False,
        )
    )  # fmt: skip
    to_attended, *of_proj = layer(to_y, attended, proj_weight)
    q, k, v = _heads(qkv, heads)
    spread = to_attended.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, L, E]
    out = attended.unflatten(-1, (heads, -1)).transpose(1, 2)
    *to_heads, _ = scaled_dot_product_attention.reference_bwd(
        spread, q, k, v, out, lse, None, 0.0, False, scale, None, None, False
    )
    to_qkv = torch.cat([_tokens(t) for t in to_heads], -1)  # [B, L, 3 A]
    normed, *_ = _normed(x, shift, factor, eps, low)
    to_normed, *of_qkv = layer(to_qkv, normed, qkv_weight)
    to_x, _, _, to_shift, to_factor, *_ = gated_residual_modulate.reference_bwd(
        to_residual, to_normed, x, mean, rstd, None, None, shift, factor, None, None, "layer",
        "linear", True, False, False, True, True, False, False,
    )  # fmt: skip
    parts = (to_shift, to_factor, to_gate, to_mlp_shift, to_mlp_factor, to_mlp_gate)
    made = (to_x, torch.cat(parts, -1), *of_qkv, *of_proj, *of_fc1, *of_fc2)
    return tuple(g if wanted >> i & 1 else x.new_empty(0) for i, g in enumerate(made))


def fake_bwd(
    grad: Tensor,
    x: Tensor,
    modulation: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    """Outputs without values."""
    wanted = others[-1]
    made = [x.new_empty(x.shape), modulation.new_empty(modulation.shape)]
    for weight in (qkv_weight, proj_weight, fc1_weight, fc2_weight):
        made += [weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])]
    return tuple(g if wanted >> i & 1 else x.new_empty(0) for i, g in enumerate(made))


def _flops(x: Tensor, *weights: Tensor) -> int:
    """Of the products with weights, and of the attention forwards."""
    batch, length, _ = x.shape
    width = weights[1].shape[1]
    return 2 * batch * length * (sum(w.numel() for w in weights) + 2 * length * width)


def cost(x: Tensor, modulation: Tensor, *others: Any) -> Cost:
    """What goes in read once, the result and what is kept written once."""
    tensors = [t for t in others if isinstance(t, Tensor)]
    made = fake(x, modulation, *others)
    moved = bytes_of(x, modulation, *tensors, *made)
    return Cost(bytes=moved, flops=_flops(x, *others[:8:2]))


def cost_bwd(grad: Tensor, x: Tensor, modulation: Tensor, *others: Any) -> Cost:
    """Likewise; two products for each of the forward, five for two of the attention."""
    tensors = [t for t in others if isinstance(t, Tensor)]
    moved = bytes_of(grad, x, modulation, *tensors, *fake_bwd(grad, x, modulation, *others))
    return Cost(bytes=moved, flops=2 * _flops(x, *others[:4]))


def _wide(value: Any, low: torch.dtype | None = None) -> Any:
    """A tensor in float64, rounded to ``low`` before."""
    if not isinstance(value, Tensor):
        return value
    return (value if low is None else value.to(low)).double()


def _norms(
    names: Sequence[str],
    result: Sequence[Tensor],
    likes: Sequence[Tensor],
    wanted: Sequence[Tensor],
    low: torch.dtype,
) -> list[str]:
    """What is further from float64 than roundings to ``low`` explain, by its norm."""
    limit = (8 if low.itemsize == 2 else 64) * torch.finfo(low).eps
    complaints = []
    for name, got, like, want in zip(names, result, likes, wanted, strict=True):
        if (got.dtype, got.shape) != (like.dtype, like.shape):
            complaints.append(f"{name}: {got.dtype} {tuple(got.shape)}, expected {like.dtype}")
        elif got.numel() and not (got.double() - want).norm() <= limit * want.norm():
            error = float((got.double() - want).norm() / want.norm())
            complaints.append(f"{name}: an error of {error:.1e} of the norm")
    return complaints


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """By norms: roundings of a part go through the ones behind it."""
    x, modulation, *given = arguments
    *options, dtype, keep = given[8:]
    low = getattr(torch, dtype)
    weights = [_wide(t, low) for t in given[:8]]
    wide = (_wide(x), _wide(modulation), *weights, *options, "float64", keep)
    wanted = reference(*wide)
    return _norms(("result", *KEPT), result, fake(*arguments), wanted, low)


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Likewise."""
    low = arguments[KEPT.index("qkv") + 7].dtype
    weights = range(3, 7)
    wide = [_wide(a, low if i in weights else None) for i, a in enumerate(arguments)]
    wanted = reference_bwd(*wide)
    return _norms(INPUTS, result, fake_bwd(*arguments), wanted, low)


def _sample(
    batch: int,
    length: int,
    channels: int,
    heads: int,
    *,
    frames: int = 1,
    activation: str = "gelu_tanh",
    bias: bool = True,
    low: bool = False,
    keep: bool = True,
    bench: bool = False,
) -> Sample:
    """``low``: products are of bfloat16 beside float32, as under autocast."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        name = str(dtype).removeprefix("torch.")
        if low and dtype == torch.float32:
            name = "bfloat16"

        def layer(outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
            weight = drawn(generator, device, torch.float32, outputs, inputs)
            weight = (weight / math.sqrt(inputs)).to(dtype)
            return weight, drawn(generator, device, dtype, outputs) if bias else None

        x = drawn(generator, device, dtype, batch, length, channels)
        modulation = drawn(generator, device, dtype, batch, frames, 6 * channels)
        layers = (
            *layer(3 * channels, channels),
            *layer(channels, channels),
            *layer(4 * channels, channels),
            *layer(channels, 4 * channels),
        )
        scale = (channels // heads) ** -0.5
        return x, modulation, *layers, heads, scale, 1e-6, 1e-5, activation, name, keep

    name = f"{batch}x{length}x{channels}_h{heads}" + (f"_f{frames}" if frames != 1 else "")
    name += f"_{activation}" + "_no_bias" * (not bias) + "_low" * low + "_alone" * (not keep)
    sizes = {"N": batch * length, "K": 4 * channels, "D": channels}
    return Sample(name, make, sizes, bench)


def samples() -> Iterable[Sample]:
    """DiT-S (``bench``), and small ones."""
    yield _sample(4, 64, 384, 6, bench=True)
    yield _sample(2, 6, 16, 2)
    yield _sample(1, 9, 24, 3, frames=3, activation="silu", bias=False)
    yield _sample(2, 5, 32, 2, low=True)
    yield _sample(1, 4, 16, 1, activation="gelu", keep=False)


def _sample_bwd(forward: Sample, *missing: str) -> Sample:
    """``missing``: of :data:`INPUTS`, whose gradients are not wanted."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        arguments = forward.make(torch.device("cpu"), dtype, seed)
        keeping = (*arguments[:-1], True)
        kept = reference(*keeping)[1:]
        generator = torch.Generator().manual_seed(seed + 1)
        grad = drawn(generator, device, dtype, *arguments[0].shape)
        wanted = sum(
            (t is not None and name not in missing) << i
            for i, (name, t) in enumerate(zip(INPUTS, arguments[:10], strict=True))
        )
        tensors = (*arguments[:2], *arguments[2:10:2], *kept)
        return grad, *(t.to(device) for t in tensors), *arguments[10:15], wanted

    name = "_".join((forward.name, *(f"less_{m}" for m in missing)))
    return Sample(name, make, forward.shape, forward.bench)


def samples_bwd() -> Iterable[Sample]:
    """Of the forward's, and with less and less to go back to."""
    for forward in samples():
        yield _sample_bwd(forward)
    small = _sample(2, 6, 16, 2)
    yield _sample_bwd(small, "x", "qkv_weight", "fc1_weight", "proj_bias")
    yield _sample_bwd(small, "x", "modulation")
    yield _sample_bwd(small, *INPUTS[:4])
    yield _sample_bwd(small, *INPUTS[:8])


_KEPT = "".join(f", Tensor {name}" for name in KEPT)
OP = register(
    Op(
        name="dit_block",
        schema="(Tensor x, Tensor modulation, Tensor qkv_weight, Tensor? qkv_bias, "
        "Tensor proj_weight, Tensor? proj_bias, Tensor fc1_weight, Tensor? fc1_bias, "
        "Tensor fc2_weight, Tensor? fc2_bias, int heads, float scale, float eps, float mlp_eps, "
        "str activation, str dtype, bool keep) -> (" + ", ".join(["Tensor"] * 12) + ")",
        reference=reference,
        fake=fake,
        backends={"cpp": backends.cpp("dit_block")},
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients),
    )
)

BACKWARD = register(
    Op(
        name="dit_block_bwd",
        schema="(Tensor grad, Tensor x, Tensor modulation, Tensor qkv_weight, Tensor proj_weight, "
        f"Tensor fc1_weight, Tensor fc2_weight{_KEPT}, int heads, float scale, float eps, "
        "float mlp_eps, str activation, int wanted) -> (" + ", ".join(["Tensor"] * 10) + ")",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={"cpp": backends.cpp("dit_block_bwd")},
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
