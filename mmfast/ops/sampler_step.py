"""One step of any sampler: guidance, prediction, clamp, update with history, noise and cast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends, library, memory, philox
from mmfast.checks import FLOATING, check_beside, check_dtype, check_floating, check_integer
from mmfast.ops.per_sample import differences, drawn, rounding, rows_of
from mmfast.registry import Arguments, Cost, Op, Sample, register
from mmfast.schedule.layout import HISTORY, Layout, M, N, P, X, slots_of
from mmfast.schedule.table import SamplerTable, TableBuilder, denoised, model_output, noise
from mmfast.schedule.table import x as sample

MOST_SLOTS = 16

_FLOATS = frozenset(FLOATING)
_SLOTS = {Layout(slots).columns: slots for slots in range(MOST_SLOTS + 1)}


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: SamplerTable | Tensor,
    step: int | Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    variance: Tensor | None = None,
    threshold: Tensor | None = None,
    out: Tensor | None = None,
    denoised: Tensor | None = None,
    model_input: Tensor | None = None,
) -> Tensor:
    """Go one step of a sampler: read everything once, write everything once.

    With the coefficients of the row that ``step`` names (see :mod:`mmfast.schedule.layout`)::

        m    = guided model output
        p    = clamp(weights . (x, m, noise))              the denoised prediction
        next = weights . (x, m, noise, p, *history)
        each slot of the history likewise, from what the slots held before

    It is computed in float32, in float64 if x is float64, and rounded once. What has the weight 0
    is not read: an uninitialised history does not matter before its time.

    Args:
        x: ``(B, ...)``, float16, bfloat16, float32 or float64. The tensors below may each have
            another of these dtypes, and have x's shape where nothing else is said.
        model_output: what the model said of x, the conditional half of it where there are two.
        table: of a sampler, on x's device, or its ``coefficients`` (S, columns) float64.
        step: the row, from 0; an int, or an int64 tensor on the device, ``()`` or ``(B,)``: samples
            may be at different steps.
        unconditional: the other half, guided with ``c m + u unconditional``.
        guidance_scale: c, and u = 1 - c.
        guidance: ``(1, 2)`` or ``(B, 2)``: c and u of each sample, in its place.
        history: ``(slots, B, ...)``. Changed. float32 keeps what x's dtype would lose.
        noise: standard normal numbers, for the rows that take noise.
        seed: in their place, the noise is drawn: that of :func:`mmfast.randn` in float32 with this
            seed and the row's number as offset. An int or an int64 tensor on the device, ``()`` or
            ``(B,)``; with one per sample the noise does not depend on the rest of the batch.
        variance: the model's other channels, for tables of models that predict variances.
        threshold: ``(B,)``, at least 1: p is clamped to it and divided by it.
        out: gets the result. May be x.
        denoised: gets p.
        model_input: ``(B, ...)`` or ``(2 B, ...)``, gets the result times the next row's input
            scale, once or twice after one another.

    Returns:
        ``out``, or a new tensor like x.

    Gradients pass to all tensors of numbers that want them: then the step is plain operations of
    torch in float64, the same numbers and slower, and what is written is part of the graph.

    Samples whose numbers lie together (halves of a batch, of the channels) are read in place;
    tensors with other strides are copied. Apart from ``out`` and x no tensor that is written may
    share memory with another.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes or devices do not fit, or arguments exclude each other.
        IndexError: ``step`` is an int out of range.
        RuntimeError: on the CPU, a tensor ``step`` is out of range, or its row takes noise or a
            variance that was not given. Elsewhere nothing is read back: results are NaN.
    """
    coefficients = table.coefficients if isinstance(table, SamplerTable) else table
    check_floating("x", x)
    shape, device = x.shape, x.device
    if not shape:
        raise ValueError("x must be (B, ...), got a number")
    rows, slots = check_table(coefficients)
    batch = shape[0]

    if isinstance(step, Tensor):
        check_dtype("step", step, (torch.int64,))
        if step.dim() and step.shape != (batch,):
            raise ValueError(f"step must be () or (B,) = ({batch},), got {tuple(step.shape)}")
        check_beside("x", device, "step", step)
    else:
        check_integer("step", step)
        if not 0 <= step < rows:
            raise IndexError(f"step must be from 0 to {rows - 1} for a table of {rows}, got {step}")
        step = torch.full((), step, dtype=torch.int64, device=device)
    check_beside("x", device, "table", coefficients)
    if seed is not None:
        if noise is not None:
            raise ValueError("not possible: noise and seed")
        seed = philox.as_stream(seed, device, "seed")
        if seed.dim() and seed.shape != (batch,):
            raise ValueError(f"seed must be () or (B,) = ({batch},), got {tuple(seed.shape)}")
    check_numbers("model_output", model_output, shape, device)
    if unconditional is not None:
        check_numbers("unconditional", unconditional, shape, device)
    if guidance is not None:
        if unconditional is None:
            raise ValueError("not possible: guidance without unconditional")
        if guidance.dim() != 2 or guidance.shape[0] not in (1, batch):
            raise ValueError(
                f"guidance must be (1, 2) or (B, 2) = ({batch}, 2), got {tuple(guidance.shape)}"
            )
        check_numbers("guidance", guidance, (guidance.shape[0], 2), device)
    if history is not None:
        check_numbers("history", history, (slots, *shape), device)
        _check_apart("history", history)
    elif slots:
        raise ValueError(f"history must be {(slots, *shape)} for this table, got None")
    if noise is not None:
        check_numbers("noise", noise, shape, device)
    if variance is not None:
        check_numbers("variance", variance, shape, device)
    if threshold is not None:
        check_numbers("threshold", threshold, (batch,), device)
    if out is not None and out is not x:
        check_numbers("out", out, shape, device)
        _check_apart("out", out)
    if denoised is not None:
        check_numbers("denoised", denoised, shape, device)
        _check_apart("denoised", denoised)
    if model_input is not None:
        if model_input.dim() and model_input.shape[0] == 2 * batch:
            check_numbers("model_input", model_input, (2 * batch, *shape[1:]), device)
        else:
            check_numbers("model_input", model_input, shape, device)
        _check_apart("model_input", model_input)
    call: Callable[..., None] = backends.call
    if library.tracked(
        x, model_output, unconditional, guidance, history, noise, variance, threshold
    ):
        call = _tracked
    if out is None:
        out = memory.empty_like(x)
        if call is not _tracked and history is None and denoised is None and model_input is None:
            call = backends.call_on_new
    call(
        OP, x, model_output, unconditional, float(guidance_scale), guidance, coefficients, step,
        noise, seed, variance, threshold, out, history, denoised, model_input,
    )  # fmt: skip
    return out


def _tracked(_: Op, *args: Any) -> None:
    reference(*args)


def _check_apart(name: str, written: Tensor) -> None:
    """No two elements lie in one place, as those of an expanded tensor do."""
    if written.is_contiguous():
        return
    if any(
        size > 1 and not stride
        for size, stride in zip(written.shape, written.stride(), strict=True)
    ):
        raise ValueError(f"{name} is written and must not be an expanded tensor: clone it")


def check_table(coefficients: Tensor) -> tuple[int, int]:
    """The rows and slots of a table that there can be, else TypeError or ValueError."""
    check_dtype("table", coefficients, (torch.float64,))
    shape = coefficients.shape
    if len(shape) != 2 or shape[0] < 1:
        raise ValueError(f"table must be (S, columns) with at least one row, got {tuple(shape)}")
    rows, columns = shape
    if columns not in _SLOTS:
        raise ValueError(f"table has {slots_of(columns)} slots, at most {MOST_SLOTS} are possible")
    return rows, _SLOTS[columns]


def check_numbers(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """``tensor`` has numbers of this shape, beside x, else TypeError or ValueError."""
    # All at once: each step of a loop comes by here.
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype in _FLOATS
        and tensor.shape == shape
        and tensor.device == device
        and tensor.layout is torch.strided
    ):
        return
    check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    check_beside("x", device, name, tensor)


class _Values(NamedTuple):
    """What a step makes, in float64; slots that stay as they are None where every sample's does."""

    out: Tensor
    slots: list[Tensor]
    stays: list[Tensor]  # [B, 1, ...] bool
    denoised: Tensor
    model_input: Tensor


def _lacking(rows: Tensor, noise: bool, variance: bool) -> tuple[Tensor, Tensor]:
    """Which rows [B] take noise, or a variance, that is not there."""
    layout = Layout(slots_of(rows.shape[1]))
    taken = [
        Layout.DENOISED + N,
        Layout.NEXT + N,
        *(layout.slot(s) + N for s in range(layout.slots)),
    ]
    noisy = (rows[:, taken] != 0).any(1)
    scaled = noisy & (rows[:, Layout.LOG_SCALE + 1] != 0)
    return noisy & (not noise), scaled & (not variance)


def _values(
    x: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    guidance_scale: float,
    guidance: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    out: Tensor,
    history: Tensor | None,
    *_: Tensor | None,
    absolute: bool = False,
) -> _Values:
    """The step. ``absolute``: of the absolute values of all terms, by which rounding is judged."""
    batch = x.shape[0]
    layout = Layout(slots_of(table.shape[1]))
    rows = rows_of("step", table, step, batch)
    no_noise, no_variance = _lacking(
        rows, (noise if noise is not None else seed) is not None, variance is not None
    )
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool(no_noise.any()):
            raise RuntimeError("a row of the table takes noise: give noise or seed")
        if bool(no_variance.any()):
            raise RuntimeError(
                "a row of the table scales its noise by the model's variance: give variance"
            )
    rows = torch.where((no_noise | no_variance)[:, None], torch.nan, rows)
    lead = (batch, *[1] * (x.dim() - 1))

    def value(source: Tensor) -> Tensor:
        return source.double().abs() if absolute else source.double()

    def column(c: int) -> Tensor:
        return rows[:, c].view(lead)

    def times(weight: Tensor, source: Tensor) -> Tensor:
        """Not read where the weight is 0."""
        return torch.where(weight == 0, 0, (weight.abs() if absolute else weight) * source)

    on = rows[:, Layout.GUIDANCE]
    m = value(model_output)
    if unconditional is not None:
        if guidance is None:
            guidance = x.new_tensor([[guidance_scale, 1 - guidance_scale]], dtype=torch.float64)
        pair = guidance.double().expand(batch, 2)  # [B, 2]
        m = times((1 + on * (pair[:, 0] - 1)).view(lead), m)
        m = m + times((on * pair[:, 1]).view(lead), value(unconditional))
    if noise is not None:
        n = value(noise)
    elif seed is not None:
        n = value(drawn(seed, step, x.shape))
        n = n + 1 if absolute else n  # small ones have the rounding errors of a radius
    else:
        n = torch.zeros_like(m)
    if variance is not None:
        logarithm = column(Layout.LOG_SCALE) + torch.where(
            column(Layout.LOG_SCALE + 1) == 0, 0, column(Layout.LOG_SCALE + 1) * variance.double()
        )
        n = n * logarithm.exp() * (1 + logarithm.abs() if absolute else 1)
    sources = [value(x), m, n] + ([] if history is None else [value(h) for h in history])
    places = [X, M, N, *range(HISTORY, layout.sources)]

    def weighted(start: int, p: Tensor | None = None) -> Tensor:
        total = torch.zeros_like(m)
        for place, source in list(zip(places, sources, strict=True))[: 3 if p is None else None]:
            total = total + times(column(start + place), source)
        return total if p is None else total + times(column(start + P), p)

    p = weighted(Layout.DENOISED)
    if threshold is not None:
        t = threshold.double().view(lead)
        p = (p if absolute else torch.maximum(torch.minimum(p, t), -t)) / t
    low, high = column(Layout.LOW), column(Layout.HIGH)
    if absolute:
        p = p + low.clamp(min=0) - high.clamp(max=0)  # what p may be though its terms are not
    else:
        p = torch.maximum(torch.minimum(p, high), low)
    result = weighted(Layout.NEXT, p)
    slots = [weighted(layout.slot(s), p) for s in range(layout.slots)]
    stays = []
    for s in range(layout.slots):
        unit = rows.new_tensor([float(i == HISTORY + s) for i in range(layout.sources)])
        same = rows[:, layout.slot(s) : layout.slot(s) + layout.sources] == unit
        stays.append(same.all(1).view(lead))
    scale = column(Layout.INPUT_SCALE)
    return _Values(result, slots, stays, p, result * (scale.abs() if absolute else scale))


def reference(
    x: Tensor,  # [B, ...]
    model_output: Tensor,  # [B, ...]
    unconditional: Tensor | None,  # [B, ...]
    guidance_scale: float,
    guidance: Tensor | None,  # [1 or B, 2]
    table: Tensor,  # [S, columns] float64
    step: Tensor,  # [] or [B] int64
    noise: Tensor | None,  # [B, ...]
    seed: Tensor | None,  # [] or [B] int64
    variance: Tensor | None,  # [B, ...]
    threshold: Tensor | None,  # [B]
    out: Tensor,  # [B, ...], may be x
    history: Tensor | None,  # [slots, B, ...]
    denoised: Tensor | None,  # [B, ...]
    model_input: Tensor | None,  # [B or 2 B, ...]
) -> None:
    """The specification, in float64."""
    made = _values(
        x, model_output, unconditional, guidance_scale, guidance, table, step, noise, seed,
        variance, threshold, out, history,
    )  # fmt: skip
    if history is not None:
        for s, (new, stays) in enumerate(zip(made.slots, made.stays, strict=True)):
            slot = history[s]
            slot.copy_(torch.where(stays, slot, new.to(slot.dtype)))
    # Converted first: a tangent that is copied would stay in float64.
    out.copy_(made.out.to(out.dtype))
    if denoised is not None:
        denoised.copy_(made.denoised.to(denoised.dtype))
    if model_input is not None:
        copies = model_input.shape[0] // max(x.shape[0], 1)
        repeated = made.model_input.repeat(copies, *[1] * (x.dim() - 1))
        model_input.copy_(repeated.to(model_input.dtype))


def fake(*_: object) -> None:
    """There is no output: arguments change."""


def cost(
    x: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    guidance_scale: float,
    guidance: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    out: Tensor,
    history: Tensor | None,
    denoised: Tensor | None,
    model_input: Tensor | None,
) -> Cost:
    """What the rows have a weight for read once, what changes written once."""
    batch, numbers = x.shape[0], x.shape[1:].numel()
    layout = Layout(slots_of(table.shape[1]))
    rows = table[step.reshape(-1)].expand(batch, -1)
    combined = [rows[:, layout.NEXT :].view(batch, 1 + layout.slots, layout.sources)]
    unit = torch.eye(layout.sources, dtype=rows.dtype, device=rows.device)[HISTORY:]
    changes = (combined[0][:, 1:] != unit).any(2)  # [B, slots]
    used = combined[0][:, 0] != 0  # [B, sources]
    used = used | ((combined[0][:, 1:] != 0) & changes[:, :, None]).any(1)
    used[:, :3] |= (rows[:, Layout.DENOISED : Layout.DENOISED + 3] != 0) & (
        used[:, P:HISTORY] | (denoised is not None)
    )
    reads = used.sum(0).tolist()  # samples that read each source
    moved = reads[X] * x.element_size() + reads[M] * model_output.element_size()
    moved += 0 if unconditional is None else reads[M] * unconditional.element_size()
    moved += 0 if noise is None else reads[N] * noise.element_size()
    moved += 0 if variance is None else reads[N] * variance.element_size()
    moved += (
        0
        if history is None
        else history.element_size() * (sum(reads[HISTORY:]) + int(changes.sum()))
    )
    written = batch * (out.element_size() + (0 if denoised is None else denoised.element_size()))
    more = 0 if model_input is None else model_input.nbytes
    terms = int((combined[0] != 0).sum()) + 3 * batch
    return Cost(bytes=(moved + written) * numbers + more, flops=2 * terms * numbers)


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Within the rounding of the sums' terms and of the result itself; slots that stay, exactly."""
    out, history, denoised, model_input = arguments[11:]
    made, terms = _values(*arguments), _values(*arguments, absolute=True)
    eps = 8 * rounding(arguments[0].dtype, is_drawn=arguments[8] is not None)
    complaints = []

    def check(name: str, got: Tensor, given: Tensor, want: Tensor, size: Tensor) -> None:
        complaints.extend(differences(name, got, given, want, size, eps))

    results = iter(result)
    check("out", next(results), out, made.out, terms.out)
    if history is not None:
        got = next(results)
        for s, (new, size, stays) in enumerate(
            zip(made.slots, terms.slots, made.stays, strict=True)
        ):
            kept = stays.expand(new.shape)
            if not torch.equal(got[s][kept].nan_to_num(), history[s][kept].nan_to_num()):
                complaints.append(f"slot {s} changed where it stays")
            new = torch.where(kept, got[s].double(), new)
            check(f"slot {s}", got[s], history[s], new, size)
    if denoised is not None:
        check("denoised", next(results), denoised, made.denoised, terms.denoised)
    if model_input is not None:
        copies = [model_input.shape[0] // max(out.shape[0], 1), *[1] * (out.dim() - 1)]
        want, size = made.model_input.repeat(copies), terms.model_input.repeat(copies)
        check("model_input", next(results), model_input, want, size)
    return complaints


def _tables() -> dict[str, SamplerTable]:
    """Rows like those of samplers: as many terms and tensors, not their coefficients."""
    prediction = 1.1 * sample - 0.4 * model_output

    def of(fill: Callable[[TableBuilder, int], None], **options: Any) -> SamplerTable:
        builder = TableBuilder(**options)
        for i in range(4):
            fill(builder, i)
        return builder.build()

    def euler(b: TableBuilder, i: int) -> None:
        b.row(9 - i, next=0.98 * sample + (0.1 + i / 50) * model_output, input_scale=0.7 + i / 9)

    def clipped(b: TableBuilder, i: int) -> None:
        b.row(
            9 - i, denoised=prediction, clip=(-0.8, 1.1), next=0.9 * denoised + 0.2 * model_output
        )

    def sde(b: TableBuilder, i: int) -> None:
        b.row(9 - i, denoised=prediction, next=0.4 * sample + 0.5 * denoised + 0.3 * noise)

    def learned(b: TableBuilder, i: int) -> None:
        b.row(
            9 - i, denoised=prediction, clip=1.0, log_scale=(-2.0, 0.5),
            next=0.4 * sample + 0.5 * denoised + (i != 3) * noise,
        )  # fmt: skip

    def multistep(b: TableBuilder, i: int) -> None:
        next = 0.7 * sample + 0.4 * denoised
        if b.pushed:
            next = next - 0.1 * b.last(1)
        b.row(9 - i, denoised=prediction, next=next, push=denoised, guidance=float(i != 2))

    def corrected(b: TableBuilder, i: int) -> None:
        start = 0.8 * sample
        if b.pushed == 2:
            start = 0.5 * b.kept("start") + 0.2 * denoised + 0.3 * b.last(1) - 0.1 * b.last(2)
        next = 0.9 * start + 0.2 * denoised
        b.row(9 - i, denoised=prediction, next=next, push=denoised, keep={"start": start})

    return {
        "euler": of(euler),
        "clipped": of(clipped),
        "sde": of(sde),
        "learned": of(learned),
        "multistep": of(multistep, ring=2),
        "corrected": of(corrected, ring=2, keep=["start"]),
    }


def _sample(kind: str, shape: tuple[int, ...], *more: str, step: int | None = 3) -> Sample:
    """``step``: None for one per sample."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        table = _tables()[kind]
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        def if_asked(name: str, *size: int) -> Tensor | None:
            return normal(*size) if name in more else None

        batch = shape[0]
        x, m = normal(*shape), normal(*shape)
        steps = torch.arange(batch) % len(table) if step is None else torch.tensor(step)
        given_noise = table.stochastic and not {"seed", "seeds"} & {*more}
        seeds = None
        if "seed" in more:
            seeds = torch.tensor(seed + 5)
        if "seeds" in more:
            seeds = torch.randint(-(2**62), 2**62, (batch,), generator=generator)
        history = normal(table.slots, *shape) if table.slots else None
        if history is not None and "float32_history" in more and dtype != torch.float64:
            history = history.float()
        threshold = if_asked("threshold", batch)
        return (
            x,
            m,
            normal(*shape) if {"unconditional", "guidance"} & {*more} else None,
            7.5,
            if_asked("guidance", batch, 2),
            table.coefficients.to(device),
            steps.to(device),
            normal(*shape) if given_noise else None,
            None if seeds is None else seeds.to(device),
            normal(*shape) if kind == "learned" else None,
            None if threshold is None else 1 + threshold.abs(),
            torch.zeros_like(x),
            history,
            if_asked("denoised", *shape),
            if_asked("model_input", (1 + ("unconditional" in more)) * batch, *shape[1:]),
        )

    numbers = math.prod(shape)
    name = "_".join((kind, *more, "x".join(map(str, shape)), *(["mixed"] if step is None else [])))
    sizes = {
        "N": numbers,
        "K": Layout(_tables()[kind].slots).columns,
        "D": numbers // max(shape[0], 1),
        "H": 1,
    }
    return Sample(name, make, sizes, bench=numbers >= 1 << 20)


def samples() -> Iterable[Sample]:
    """Latents of a video (``bench``) and odd shapes."""
    video = (1, 16, 21, 60, 104)
    yield _sample("euler", video)
    yield _sample("euler", video, "unconditional")
    yield _sample("multistep", video)
    yield _sample("corrected", video)
    yield _sample("sde", video, "seed")
    yield _sample("multistep", (2, 105), "unconditional", step=None)
    yield _sample("euler", (1,))
    yield _sample("euler", (0, 3))
    yield _sample("euler", (3, 0))
    yield _sample("euler", (3, 5, 7), "model_input")
    yield _sample("clipped", (2, 3, 43), "denoised")
    yield _sample("clipped", (3, 67), "guidance", "threshold", "denoised", step=None)
    yield _sample("learned", (5, 131), step=None)
    yield _sample("learned", (2, 4, 9, 9), "seeds", step=None)
    yield _sample("sde", (3, 7, 11), "seed", step=None)
    yield _sample("multistep", (5, 2, 33), "float32_history", "unconditional", "model_input")
    yield _sample("corrected", (5, 1, 65), "float32_history", "denoised", step=None)


def _load_triton() -> Callable[..., None]:
    from mmfast.kernels.sampler_step import sampler_step as launch

    return launch


OP = register(
    Op(
        name="sampler_step",
        schema="(Tensor x, Tensor model_output, Tensor? unconditional, float guidance_scale, "
        "Tensor? guidance, Tensor table, Tensor step, Tensor? noise, Tensor? seed, "
        "Tensor? variance, Tensor? threshold, Tensor(a!) out, Tensor(b!)? history, "
        "Tensor(c!)? denoised, Tensor(d!)? model_input) -> ()",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("sampler_step"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        mutates=(11, 12, 13, 14),
    )
)

# What the overload calls, for callers that have no time.
DIRECT: Callable[..., None] = library.overload(OP.name)._op  # type: ignore[attr-defined]
