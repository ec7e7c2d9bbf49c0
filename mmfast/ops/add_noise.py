"""Noisy samples, targets and loss weights of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmfast import backends, philox
from mmfast.checks import FLOATING, check_beside, check_choice, check_dtype, check_floating
from mmfast.ops.per_sample import differences, drawn, rounding, rows_of
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register
from mmfast.results import exportable

TARGETS = ("epsilon", "sample", "v_prediction", "flow_prediction")

_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of tables, by device

ALPHA, SIGMA, TARGET_X0, TARGET_NOISE, WEIGHT = range(5)


class Schedule(Protocol):
    """What :func:`add_noise` asks of a noise schedule."""

    def noising_table(self, target: str, weighting: str | None = None) -> Tensor:
        """(T, 5) float64: see :func:`add_noise`."""


@exportable
class AddedNoise(NamedTuple):
    """What :func:`add_noise` returns.

    Attributes:
        noisy: x0's shape and dtype.
        target: what the model is to predict, likewise; None where none was asked for.
        weight: of each sample's loss, ``(B,)``, float32 (float64 if x0 is).
    """

    noisy: Tensor
    target: Tensor | None
    weight: Tensor


def add_noise(
    x0: Tensor,
    timesteps: Tensor,
    schedule: Schedule | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    target: str | None = "epsilon",
    weighting: str | None = None,
) -> AddedNoise:
    """Noise each sample as its timestep says, and make its target, in one pass over x0.

    With the row ``(alpha, sigma, target_x0, target_noise, weight)`` of each sample's timestep::

        noisy  = alpha x0 + sigma noise
        target = target_x0 x0 + target_noise noise

    in float32, in float64 if x0 is float64, rounded once. Gradients pass to x0, through both.

    Args:
        x0: ``(B, ...)``, float16, bfloat16, float32 or float64.
        timesteps: int64 on x0's device, ``()`` or ``(B,)``: rows of the table.
        schedule: has a method ``noising_table(target, weighting)``, or is such a table, ``(T, 5)``
            float64 on x0's device. A table is of one target: ``target`` then only says whether
            it is wanted. A compiled function is best given a table: making one cannot be traced.
        noise: standard normal numbers, x0's shape, any of the dtypes.
        seed: in their place, the noise is drawn: that of :func:`mmfast.randn` in float32. An int
            or an int64 tensor on the device, ``()`` or ``(B,)``; with one per sample the noise
            does not depend on the rest of the batch.
        offset: of the noise's stream, like ``seed``: the step of the training, say.
        target: ``"epsilon"`` (the noise), ``"sample"`` (x0), ``"v_prediction"``
            (alpha noise - sigma x0), ``"flow_prediction"`` or ``"flow"`` (noise - x0), or None for
            none.
        weighting: of the loss, as the schedule calls it.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes or devices do not fit, or not one of ``noise`` and ``seed`` was given.
        IndexError, RuntimeError: on the CPU, a timestep is out of range. Elsewhere nothing is read
            back: the sample is NaN.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), eq. 4; Salimans and Ho,
    "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), appendix D, for v;
    Lipman et al., "Flow Matching for Generative Modeling" (2023), for the flow.
    """
    check_floating("x0", x0)
    if x0.dim() < 1:
        raise ValueError("x0 must be (B, ...), got a number")
    batch = x0.shape[0]
    if target == "flow":
        target = "flow_prediction"
    if target is not None:
        check_choice("target", target, TARGETS)
    if isinstance(schedule, Tensor):
        table = schedule
    else:
        table = _on(x0.device, schedule.noising_table(target or TARGETS[0], weighting))
    check_dtype("table", table, (torch.float64,))
    if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] != 5:
        raise ValueError(f"the table must be (T, 5), T at least 1, got {tuple(table.shape)}")
    check_dtype("timesteps", timesteps, (torch.int64,))
    if (noise is None) == (seed is None):
        raise ValueError("one of noise and seed must be given")
    device = x0.device
    _check("timesteps", timesteps, batch, device)
    check_beside("x0", device, "table", table)
    streams: tuple[Tensor, Tensor] | tuple[None, None] = None, None
    if noise is not None:
        check_floating("noise", noise)
        if noise.shape != x0.shape:
            raise ValueError(f"noise must have shape {tuple(x0.shape)}, got {tuple(noise.shape)}")
        check_beside("x0", device, "noise", noise)
    else:
        assert seed is not None
        streams = philox.streams(seed, offset, device)
        for name, stream in zip(("seed", "offset"), streams, strict=True):
            _check(name, stream, batch, device)
    wanted = target is not None
    noisy, made, weight = backends.call(OP, x0, timesteps, table, noise, *streams, wanted)
    return AddedNoise(noisy, made if wanted else None, weight)


def _check(name: str, tensor: Tensor, batch: int, device: torch.device) -> None:
    if tensor.dim() and tensor.shape != (batch,):
        raise ValueError(f"{name} must be () or (B,) = ({batch},), got {tuple(tensor.shape)}")
    check_beside("x0", device, name, tensor)


def _on(device: torch.device, table: Tensor) -> Tensor:
    """The table on ``device``. A copy from the host waits for the device: once is enough."""
    if table.device == device:
        return table
    copies = _copies.setdefault(table, {})
    if device not in copies:
        copies[device] = table.to(device)
    return copies[device]


def _values(
    x0: Tensor,
    timesteps: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    *,
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy samples, targets, weights. ``absolute``: of the absolute values of all terms."""
    rows = rows_of("timesteps", table, timesteps, x0.shape[0])
    n = noise
    if n is None:
        assert seed is not None
        assert offset is not None
        n = drawn(seed, offset, x0.shape)
    x, n = x0.double(), n.double()
    if absolute:
        # Small drawn ones have the rounding errors of a radius.
        rows, x, n = rows.abs(), x.abs(), n.abs() + (noise is None)

    def weighted(of_x: int, of_n: int) -> Tensor:
        """What has the weight 0 is not read."""
        lead = (x.shape[0], *[1] * (x.dim() - 1))
        a, b = rows[:, of_x].view(lead), rows[:, of_n].view(lead)
        return torch.where(a == 0, 0, a * x) + torch.where(b == 0, 0, b * n)

    return weighted(ALPHA, SIGMA), weighted(TARGET_X0, TARGET_NOISE), rows[:, WEIGHT]


def reference(
    x0: Tensor,  # [B, ...]
    timesteps: Tensor,  # [] or [B]
    table: Tensor,  # [T, 5]
    noise: Tensor | None,  # [B, ...]
    seed: Tensor | None,  # [] or [B]
    offset: Tensor | None,  # [] or [B]
    want_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in float64."""
    outputs = fake(x0, timesteps, table, noise, seed, offset, want_target)
    values = _values(x0, timesteps, table, noise, seed, offset)
    for i, (output, value) in enumerate(zip(outputs, values, strict=True)):
        if i != 1 or want_target:
            output.copy_(value)
    return outputs


def fake(
    x0: Tensor,
    timesteps: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    want_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs without values."""
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    return (
        x0.new_empty(x0.shape),
        x0.new_empty(x0.shape if want_target else (0,)),
        x0.new_empty(x0.shape[0], dtype=wide),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, timesteps, table, *_, ctx.want_target = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(timesteps, table)


def _gradients(ctx: Any, noisy: Tensor | None, target: Tensor | None, *_: None) -> tuple[Any, ...]:
    timesteps, table = ctx.saved_tensors
    target = target if ctx.want_target else None
    grad = None
    if ctx.needs_input_grad[0] and (noisy is not None or target is not None):
        grad = backends.call(BACKWARD, noisy, target, timesteps, table)
    return grad, None, None, None, None, None, None


def _values_bwd(
    grad_noisy: Tensor | None,
    grad_target: Tensor | None,
    timesteps: Tensor,
    table: Tensor,
    *,
    absolute: bool = False,
) -> Tensor:
    parts = []
    for grad, column in ((grad_noisy, ALPHA), (grad_target, TARGET_X0)):
        if grad is None:
            continue
        weight = rows_of("timesteps", table, timesteps, grad.shape[0])[:, column]
        weight = weight.view(-1, *[1] * (grad.dim() - 1))
        part = torch.where(weight == 0, 0, weight * grad.double())
        parts.append(part.abs() if absolute else part)
    return sum(parts)  # type: ignore[return-value]


def reference_bwd(
    grad_noisy: Tensor | None,  # [B, ...], one of them at least
    grad_target: Tensor | None,
    timesteps: Tensor,  # [] or [B]
    table: Tensor,  # [T, 5]
) -> Tensor:
    """The gradient of x0."""
    result = fake_bwd(grad_noisy, grad_target, timesteps, table)
    return result.copy_(_values_bwd(grad_noisy, grad_target, timesteps, table))


def fake_bwd(
    grad_noisy: Tensor | None, grad_target: Tensor | None, timesteps: Tensor, table: Tensor
) -> Tensor:
    """The output without values."""
    like = grad_noisy if grad_noisy is not None else grad_target
    assert like is not None
    return like.new_empty(like.shape)


def cost(
    x0: Tensor,
    timesteps: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    want_target: bool,
) -> Cost:
    """x0 (and the noise) read once, noisy samples (and targets) written once."""
    moved = (2 + want_target) * x0.nbytes + (0 if noise is None else noise.nbytes)
    return Cost(bytes=moved + 8 * x0.shape[0], flops=(3 + 3 * want_target) * x0.numel())


def cost_bwd(
    grad_noisy: Tensor | None, grad_target: Tensor | None, timesteps: Tensor, table: Tensor
) -> Cost:
    """Gradients read once, one written once."""
    tensors = [t for t in (grad_noisy, grad_target) if t is not None]
    moved = sum(t.nbytes for t in tensors) + tensors[0].nbytes
    return Cost(bytes=moved, flops=2 * len(tensors) * tensors[0].numel())


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Within the rounding of the terms and of the result itself."""
    inputs, want_target = arguments[:-1], arguments[-1]
    values, sizes = _values(*inputs), _values(*inputs, absolute=True)
    likes = fake(*arguments)
    eps = 4 * rounding(inputs[0].dtype, is_drawn=inputs[3] is None)
    complaints = []
    for i, name in enumerate(("noisy", "target", "weight")):
        if i == 1 and not want_target:
            complaints += [] if result[1].shape == (0,) else ["a target that nobody wanted"]
        else:
            complaints += differences(name, result[i], likes[i], values[i], sizes[i], eps)
    return complaints


def compare_bwd(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Likewise."""
    want, size = _values_bwd(*arguments), _values_bwd(*arguments, absolute=True)
    eps = 4 * rounding(result.dtype, is_drawn=False)
    return differences("gradients", result, fake_bwd(*arguments), want, size, eps)


def _sample(shape: tuple[int, ...], *more: str) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        x0, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        table = torch.randn(20, 5, generator=generator, dtype=torch.float64)
        batch = () if "shared" in more else shape[:1]
        timesteps = torch.randint(20, batch, generator=generator)
        given: tuple[Tensor | None, ...] = (noise, None, None)
        if "seed" in more:
            given = (None, torch.tensor(seed, device=device), torch.tensor(3, device=device))
        if "seeds" in more:
            seeds = torch.randint(-(2**62), 2**62, shape[:1], generator=generator)
            given = (None, seeds.to(device), torch.tensor(3, device=device))
        return x0, timesteps.to(device), table.to(device), *given, "untargeted" not in more

    numbers = math.prod(shape)
    sizes = {"N": numbers, "K": 5, "D": numbers // max(shape[0], 1), "H": 1}
    return Sample("_".join((*more, "x".join(map(str, shape)))), make, sizes, numbers >= 1 << 20)


def samples() -> Iterable[Sample]:
    """Batches of latents (``bench``) and odd shapes."""
    yield _sample((32, 16, 64, 64))
    yield _sample((32, 16, 64, 64), "untargeted")
    yield _sample((32, 16, 64, 64), "seeds")
    yield _sample((2, 83))
    yield _sample((1,), "shared")
    yield _sample((0, 3))
    yield _sample((3, 0), "seeds")
    yield _sample((3, 5, 7, 9), "untargeted")
    yield _sample((3, 77), "seed")
    yield _sample((2, 4, 64), "seeds", "untargeted")


def _sample_bwd(shape: tuple[int, ...], *missing: str) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        x0, timesteps, table, noise, *_ = _sample(shape).make(device, dtype, seed)
        grads = [
            None if name in missing else grad for name, grad in (("noisy", x0), ("target", noise))
        ]
        return *grads, timesteps, table

    numbers = math.prod(shape)
    sizes = {"N": numbers, "K": 5, "D": numbers // max(shape[0], 1), "H": 1}
    name = "_".join((*(f"no_{m}" for m in missing), "x".join(map(str, shape))))
    return Sample(name, make, sizes, numbers >= 1 << 20)


def samples_bwd() -> Iterable[Sample]:
    """As above."""
    yield _sample_bwd((32, 16, 64, 64))
    yield _sample_bwd((2, 83))
    yield _sample_bwd((0, 3))
    yield _sample_bwd((3, 5, 9), "noisy")
    yield _sample_bwd((3, 65), "target")


def _load_triton() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from mmfast.kernels.add_noise import add_noise as launch

    return launch


def _load_triton_bwd() -> Callable[..., Tensor]:
    from mmfast.kernels.add_noise import add_noise_bwd as launch

    return launch


OP = register(
    Op(
        name="add_noise",
        schema="(Tensor x0, Tensor timesteps, Tensor table, Tensor? noise, Tensor? seed, "
        "Tensor? offset, bool want_target) -> (Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("add_noise"),
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
        name="add_noise_bwd",
        schema="(Tensor? grad_noisy, Tensor? grad_target, Tensor timesteps, Tensor table)"
        " -> Tensor",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("add_noise_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
