"""The threshold of a sample's prediction: a quantile of its absolute values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_device, check_dtype, check_floating
from mmfast.ops.per_sample import rounding, rows_of
from mmfast.registry import Arguments, Cost, Op, Sample, register
from mmfast.schedule.layout import Layout, M, N, X, slots_of
from mmfast.schedule.table import SamplerTable


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    table: SamplerTable | Tensor,
    step: int | Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance: Tensor | None = None,
    ratio: float = 0.995,
    maximum: float = 1.0,
) -> Tensor:
    """Thresholds for ``sampler_step(threshold=...)``: dynamic thresholding.

    Of each sample's denoised prediction p, before any clamp, the quantile ``ratio`` of the |p|, at
    least 1 and then at most ``maximum``. ``sampler_step`` then clamps p to it and divides by it.
    The quantile is exact: of the numbers in ascending order, that at ``ratio (E - 1)``, linear
    between two.

    Args:
        x, model_output, table, step, unconditional, guidance_scale, guidance: as
            :func:`sampler_step` gets them.
        ratio: from 0 to 1.
        maximum: above 0; below 1 it is the threshold.

    Returns:
        ``(B,)``, float32 (float64 if x is). NaN where p has one. Needs 4 bytes per number of x for
        the predictions (8 if x is float64).

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or numbers do not fit.
        IndexError, RuntimeError: on the CPU, ``step`` is out of range, or the row predicts with
            noise. Elsewhere nothing is read back: the threshold is NaN.

    Source: Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language
    Understanding" (2022), section 2.3.
    """
    coefficients = table.coefficients if isinstance(table, SamplerTable) else table
    check_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x must be (B, ...), got a number")
    check_dtype("table", coefficients, (torch.float64,))
    if coefficients.dim() != 2 or coefficients.shape[0] < 1:
        raise ValueError(
            f"table must be (S, columns) with at least one row, got {tuple(coefficients.shape)}"
        )
    slots_of(coefficients.shape[1])
    batch, rows = x.shape[0], coefficients.shape[0]
    if not isinstance(step, Tensor):
        if not 0 <= step < rows:
            raise IndexError(f"step must be from 0 to {rows - 1} for a table of {rows}, got {step}")
        step = torch.full((), step, dtype=torch.int64, device=x.device)
    check_dtype("step", step, (torch.int64,))
    if step.shape not in ((), (batch,)):
        raise ValueError(f"step must be () or (B,) = ({batch},), got {tuple(step.shape)}")
    tensors = {"model_output": model_output, "table": coefficients, "step": step}
    expected = {"model_output": x.shape}
    if unconditional is not None:
        tensors["unconditional"], expected["unconditional"] = unconditional, x.shape
    if guidance is not None:
        if unconditional is None:
            raise ValueError("not possible: guidance without unconditional")
        tensors["guidance"] = guidance
        first = 1 if guidance.dim() and guidance.shape[0] == 1 else batch
        expected["guidance"] = torch.Size((first, 2))
    check_device(x=x, **tensors)
    for name, shape in expected.items():
        check_floating(name, tensors[name])
        if tensors[name].shape != shape:
            got = tuple(tensors[name].shape)
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {got}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be from 0 to 1, got {ratio}")
    if not maximum > 0:
        raise ValueError(f"maximum must be above 0, got {maximum}")
    return backends.call(
        OP, x, model_output, unconditional, float(guidance_scale), guidance, coefficients, step,
        float(ratio), float(maximum),
    )  # fmt: skip


def _predictions(
    x: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    guidance_scale: float,
    guidance: Tensor | None,
    table: Tensor,
    step: Tensor,
    *,
    absolute: bool = False,
) -> Tensor:
    """[B, E], float64. ``absolute``: of the absolute values of all terms."""
    batch = x.shape[0]
    rows = rows_of("step", table, step, batch)
    noisy = rows[:, Layout.DENOISED + N] != 0
    if x.device.type == "cpu" and bool(noisy.any()):
        raise RuntimeError("a row of the table predicts with noise: no threshold for it")
    rows = torch.where(noisy[:, None], torch.nan, rows)
    pair = rows.new_tensor([[guidance_scale, 1 - guidance_scale]])
    pair = (pair if guidance is None else guidance.double()).expand(batch, 2)
    on, of_m = rows[:, Layout.GUIDANCE], rows[:, Layout.DENOISED + M]
    terms = [(rows[:, Layout.DENOISED + X], x)]
    if unconditional is None:
        terms.append((of_m, model_output))
    else:
        terms.append((of_m * (1 + on * (pair[:, 0] - 1)), model_output))
        terms.append((of_m * on * pair[:, 1], unconditional))
    total = x.new_zeros((batch, x.shape[1:].numel()), dtype=torch.float64)
    for weight, source in terms:
        term = weight[:, None] * source.double().reshape(total.shape)
        term = torch.where(weight[:, None] == 0, 0, term)
        total = total + (term.abs() if absolute else term)
    return total


def reference(
    x: Tensor,  # [B, ...]
    model_output: Tensor,  # [B, ...]
    unconditional: Tensor | None,  # [B, ...]
    guidance_scale: float,
    guidance: Tensor | None,  # [1 or B, 2]
    table: Tensor,  # [S, columns]
    step: Tensor,  # [] or [B]
    ratio: float,
    maximum: float,
) -> Tensor:
    """The specification, in float64."""
    result = fake(x)
    p = _predictions(x, model_output, unconditional, guidance_scale, guidance, table, step).abs()
    if p.shape[1] == 0:
        return result.fill_(min(1, maximum))
    rank = ratio * (p.shape[1] - 1)
    order = p.sort(1).values  # NaN last
    low, high = order[:, int(rank)], order[:, min(int(rank) + 1, p.shape[1] - 1)]
    quantile = torch.where(high == low, low, low + (high - low) * (rank - int(rank)))
    quantile = torch.where(order[:, -1].isnan(), torch.nan, quantile)
    return result.copy_(quantile.clamp(1, maximum))


def fake(x: Tensor, *_: object) -> Tensor:
    """The output without values."""
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def cost(x: Tensor, model_output: Tensor, unconditional: Tensor | None, *_: object) -> Cost:
    """Everything read once."""
    moved = x.nbytes + model_output.nbytes + 8 * x.shape[0]
    moved += 0 if unconditional is None else unconditional.nbytes
    return Cost(bytes=moved, flops=6 * x.numel())


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Within the rounding of the prediction's terms."""
    expected = reference(*arguments) if expected is None else expected
    if (result.dtype, result.shape) != (expected.dtype, expected.shape):
        return [f"{result.dtype} {tuple(result.shape)}, expected {expected.dtype}"]
    if result.numel() == 0:
        return []
    size = _predictions(*arguments[:-2], absolute=True)
    size = size.amax(1).nan_to_num() if size.shape[1] else torch.zeros_like(result)
    tolerance = 8 * rounding(arguments[0].dtype, is_drawn=False) * (size + 1)
    same = (result == expected) | (result.isnan() & expected.isnan())
    same |= (result.double() - expected.double()).abs() <= tolerance
    return [] if bool(same.all()) else [f"{int((~same).sum())} thresholds differ"]


def _sample(shape: tuple[int, ...], guided: bool, ratio: float, maximum: float) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        x, m, u = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
        table = torch.randn(4, Layout(0).columns, generator=generator, dtype=torch.float64)
        table[:, Layout.DENOISED + X] = 1.5
        table[:, Layout.DENOISED + N] = 0
        step = torch.arange(shape[0]) % 4 if guided else torch.tensor(2)
        given = (u if guided else None, 3.0, None, table.to(device), step.to(device))
        return x, m, *given, ratio, maximum

    numbers = math.prod(shape)
    name = f"{'guided_' * guided}q{ratio}_{'x'.join(map(str, shape))}"
    sizes = {"N": numbers, "K": 13, "D": numbers // max(shape[0], 1), "H": 1}
    return Sample(name, make, sizes, numbers >= 1 << 18)


def samples() -> Iterable[Sample]:
    """Images (``bench``) and odd shapes."""
    yield _sample((4, 3, 256, 256), True, 0.995, 10.0)
    yield _sample((3, 67), True, 0.75, 10.0)
    yield _sample((2, 3, 5), False, 1.0, 10.0)
    yield _sample((2, 3, 43), False, 0.995, 1.5)
    yield _sample((2, 3, 43), False, 0.995, 0.5)
    yield _sample((2, 1), False, 0.5, 100.0)
    yield _sample((0, 3), False, 0.5, 2.0)
    yield _sample((3, 0), False, 0.5, 2.0)


def _load_triton() -> Callable[..., Tensor]:
    from mmfast.kernels.dynamic_threshold import dynamic_threshold as launch

    return launch


def _triton_supported(x: Tensor, *_: object) -> list[str]:
    numbers = x.shape[1:].numel()
    return [f"{numbers} numbers a sample: counts are of 32 bits"] if numbers >= 1 << 31 else []


OP = register(
    Op(
        name="dynamic_threshold",
        schema="(Tensor x, Tensor model_output, Tensor? unconditional, float guidance_scale, "
        "Tensor? guidance, Tensor table, Tensor step, float ratio, float maximum) -> Tensor",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("dynamic_threshold"),
            "triton": backends.triton(_load_triton, _triton_supported),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
    )
)
