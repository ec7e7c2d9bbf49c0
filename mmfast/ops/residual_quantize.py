"""Residual vector quantisation: each stage quantises what the stages before it have left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import (
    FLOATING,
    check_choice,
    check_device,
    check_dtype,
    check_floating,
    check_mask,
)
from mmfast.ops import code_statistics, nearest_code, vector_quantize
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register
from mmfast.results import exportable

GRADIENTS = ("straight_through", "none")

_WORKSPACE = 1 << 20  # float64 elements of the beam search's largest temporary
_SPARE = 8  # candidates that the beam search evaluates beyond those that it keeps


@exportable
class ResidualQuantized(NamedTuple):
    """What :func:`residual_quantize` returns.

    Attributes:
        quantized: the sum of each vector's codes, the vector itself where the mask is False; x's
            shape and dtype.
        indices: of these codes, ``(..., Q)``, int64; -1 where the mask is False.
        commitment_losses: of each stage, ``(Q,)``: the mean squared residual that it leaves. Their
            gradients go to x only. 0 if there are no vectors.
        codebook_losses: the same numbers; the gradient of each goes to its stage's codes only.
        counts: vectors of each code of each stage, ``(Q, K)``; with codebooks of several sizes K
            is the largest, and what a smaller one lacks is 0.
    """

    quantized: Tensor
    indices: Tensor
    commitment_losses: Tensor
    codebook_losses: Tensor
    counts: Tensor


def residual_quantize(
    x: Tensor,
    codebooks: Tensor | Sequence[Tensor],
    *,
    num_quantizers: int | None = None,
    metric: str = "euclidean",
    stages: int | None = None,
    gradient: str = "straight_through",
    mask: Tensor | None = None,
    beam: int = 1,
) -> ResidualQuantized:
    """Replace every vector by a sum of codes, one of each stage, differentiably.

    Stage q takes the code c of its codebook that is nearest to the residual r, and leaves
    r - c to the next one. The first residual is x, in float64 if x or the codebooks are, else in
    float32; each difference is rounded to that dtype once. The nearest code is the float64 argmin
    for that residual, as :func:`mmfast.nearest_code` gives it, and ``quantized`` is the sum of the
    codes in their order, each addition rounded to the residual's dtype, the whole to x's. So all
    backends agree on every bit of both.

    Args:
        x: vectors, ``(..., D)``. Any strides; float16, bfloat16, float32 or float64.
        codebooks: ``(Q, K, D)``; or Q tensors ``(K_q, D)`` of one dtype; or ``(K, D)``, which
            serves all ``num_quantizers`` stages. The dtype may differ from x's.
        num_quantizers: Q of a codebook that the stages share; not for several codebooks.
        metric: what is nearest, as in :func:`mmfast.nearest_code`.
        stages: only the first so many of the stages, as quantiser dropout wants it; the outputs
            have that Q.
        gradient: how ``quantized`` passes its gradient on. ``"straight_through"``: to x
            unchanged. ``"none"``: to the codes alone, as embeddings'.
        mask: ``x.shape[:-1]``, bool; vectors where it is False pass unchanged and count for
            nothing.
        beam: B >= 1. Above 1, the B best partial sums of each vector survive each stage, and the
            one with the smallest final residual wins: a search in plain PyTorch on every device,
            by float64 products over as many rows at a time as 8 MiB hold, with no kernels of its
            own (a forced backend other than ``"reference"`` refuses). Of more than 8 candidates
            that tie to the rounding of float64 for the last place, any may survive. Only for the
            Euclidean metric.

    Returns:
        :class:`ResidualQuantized`. Losses and counts are float64 if x or the codebooks are, else
        float32.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices, numbers, ``metric`` or ``gradient`` do not fit.

    Source: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec" (2021), alg. 1;
    Juang and Gray, "Multiple stage vector quantization for speech coding" (1982). The beam:
    Babenko and Lempitsky, "Additive Quantization for Extreme Vector Compression" (2014), sec. 3.2.
    """
    check_floating("x", x)
    codes, sizes, shared = _codebooks(codebooks, num_quantizers)
    check_device(x=x, codebooks=codes)
    if x.dim() < 1 or x.shape[-1] != codes.shape[-1] or x.shape[-1] < 1:
        raise ValueError(
            f"x must be (..., D) with the codebooks' D = {codes.shape[-1]} (at least 1), "
            f"got shape {tuple(x.shape)}"
        )
    if stages is not None:
        if not 1 <= stages <= len(sizes):
            raise ValueError(f"stages must be from 1 to {len(sizes)}, got {stages}")
        sizes = sizes[:stages]
        codes = codes if shared else codes[: sum(sizes)]
    check_choice("metric", metric, nearest_code.METRICS)
    check_choice("gradient", gradient, GRADIENTS)
    if mask is not None:
        check_mask(x, mask)
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if beam == 1:
        result = backends.call(OP, x, codes, sizes, shared, metric, gradient, mask)
    else:
        if metric != "euclidean":
            raise ValueError(f"a beam above 1 needs metric 'euclidean', got {metric!r}")
        result = backends.call(BEAM, x, codes, sizes, shared, gradient, mask, beam)
    return ResidualQuantized(*result)


def _codebooks(
    codebooks: Tensor | Sequence[Tensor], num_quantizers: int | None
) -> tuple[Tensor, list[int], bool]:
    """The codes of all stages (sum of K_q, D), the K_q, and whether all stages have the same."""
    if isinstance(codebooks, Tensor):
        check_floating("codebooks", codebooks)
        if codebooks.dim() not in (2, 3) or 0 in codebooks.shape[:-1]:
            raise ValueError(
                "codebooks must be (Q, K, D), (K, D) or a list of (K_q, D), with Q and K at least "
                f"1, got shape {tuple(codebooks.shape)}"
            )
        shared = codebooks.dim() == 2
        count = num_quantizers or 0 if shared else codebooks.shape[0]
        if count < 1:
            raise ValueError(
                f"codebooks (K, D) need num_quantizers of at least 1, got {num_quantizers}"
            )
        codes = codebooks if shared else codebooks.flatten(0, 1)
        sizes = [codebooks.shape[-2]] * count
    else:
        if not codebooks:
            raise ValueError("codebooks must hold at least one, got an empty list")
        for q, codebook in enumerate(codebooks):
            check_floating(f"codebooks[{q}]", codebook)
            first = codebooks[0]
            if codebook.dim() != 2 or len(codebook) < 1 or codebook.shape[-1] != first.shape[-1]:
                raise ValueError(
                    f"codebooks[{q}] must be (K_q, D) with K_q at least 1 and one D, "
                    f"got shape {tuple(codebook.shape)}"
                )
            check_dtype(f"codebooks[{q}]", codebook, (first.dtype,))
        check_device(**{f"codebooks[{q}]": c for q, c in enumerate(codebooks)})
        shared, codes = False, torch.cat(list(codebooks))
        sizes = [c.shape[0] for c in codebooks]
    if not shared and num_quantizers not in (None, len(sizes)):
        raise ValueError(
            f"num_quantizers is for one codebook (K, D), got {num_quantizers} and "
            f"{len(sizes)} codebooks"
        )
    return codes, sizes, shared


def _stages(codes: Tensor, sizes: Sequence[int], shared: bool) -> Iterator[Tensor]:
    """The codes (K_q, D) of each stage."""
    start = 0
    for size in sizes:
        yield codes[start : start + size]
        start += 0 if shared else size


def _first_residual(x: Tensor, codes: Tensor) -> Tensor:
    """The vectors (N, D) in the dtype of the residuals."""
    return x.reshape(-1, x.shape[-1]).to(nearest_code.output_dtype(x, codes))


def reference(
    x: Tensor,
    codes: Tensor,
    sizes: list[int],
    shared: bool,
    metric: str,
    gradient: str,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification; ``gradient`` changes only what :func:`_gradients` does.

    Args:
        codes: of all stages, ``(sum(sizes), D)``, or ``(K, D)`` if ``shared``.
        sizes: codes of each stage, Q of them.
    """
    residual = _first_residual(x, codes)  # [N, D]
    chosen = []
    for stage in _stages(codes, sizes, shared):
        index, _ = nearest_code.reference(residual, stage, metric)  # [N]
        residual = residual - stage[index].to(residual.dtype)
        chosen.append(index)
    return _outputs(x, codes, sizes, shared, torch.stack(chosen, 1), mask)


def reference_beam(
    x: Tensor,
    codes: Tensor,
    sizes: list[int],
    shared: bool,
    gradient: str,
    mask: Tensor | None,
    beam: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification of the beam search."""
    rows = _first_residual(x, codes)  # [N, D]
    step = max(1, _WORKSPACE // (beam * max(*sizes, x.shape[-1])))
    parts = [_beam(part, codes, sizes, shared, beam) for part in rows.split(step)]
    return _outputs(x, codes, sizes, shared, torch.cat(parts), mask)


def _beam(rows: Tensor, codes: Tensor, sizes: list[int], shared: bool, beam: int) -> Tensor:
    """Indices (N, Q) of the best sums for rows (N, D)."""
    residual = rows[:, None]  # [N, B, D], B growing to the beam
    chosen = rows.new_empty((rows.shape[0], 1, 0), dtype=torch.int64)  # [N, B, q]
    for stage in _stages(codes, sizes, shared):
        num_codes = stage.shape[0]
        wide, targets = residual.double(), stage.double()
        errors = targets.square().sum(1) - 2 * wide @ targets.T  # [N, B, K]
        errors = (errors + wide.square().sum(2)[:, :, None]).flatten(1)  # [N, B K]
        # NaN counts as the best, as in the lookup.
        errors = errors.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        most = min(beam + _SPARE, errors.shape[1])
        candidates = errors.topk(most, largest=False).indices.sort(1).values  # [N, C]
        parent, index = candidates // num_codes, candidates % num_codes
        taken = _take(residual, parent)  # [N, C, D]
        value = nearest_code.float64_metric(
            taken.double().flatten(0, 1), targets[index].flatten(0, 1), "euclidean"
        ).view(candidates.shape)  # [N, C]
        value = value.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        best = value.argsort(dim=1, stable=True)[:, :beam]  # [N, B]
        parent, index = parent.gather(1, best), index.gather(1, best)
        residual = _take(residual, parent) - stage[index].to(residual.dtype)  # [N, B, D]
        chosen = torch.cat([_take(chosen, parent), index[:, :, None]], 2)
    return chosen[:, 0]


def _take(t: Tensor, index: Tensor) -> Tensor:
    """(N, C, ...) of t (N, B, ...) at index (N, C)."""
    return t.gather(1, index[:, :, None].expand(-1, -1, t.shape[2]))


def _outputs(
    x: Tensor, codes: Tensor, sizes: list[int], shared: bool, chosen: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the codes ``chosen`` (N, Q) amount to."""
    quantized, indices, commitment, codebook_losses, counts = _empty(x, codes, sizes)
    residual = _first_residual(x, codes)  # [N, D]
    inside = torch.ones_like(chosen[:, 0], dtype=torch.bool)  # [N]
    if mask is not None:
        inside = mask.reshape(-1)
    number = (inside.sum() * x.shape[-1]).clamp_min(1)
    total = torch.zeros_like(residual)
    for q, stage in enumerate(_stages(codes, sizes, shared)):
        index = chosen[:, q]
        code = stage[index].to(residual.dtype)  # [N, D]
        residual = residual - code
        total = total + code
        square = residual.double().square().sum(1)  # [N]
        commitment[q] = torch.where(inside, square, 0).sum() / number
        full = counts.new_zeros(counts.shape[1] + 1)
        slot = torch.where(inside, index, counts.shape[1])
        counts[q] = full.scatter_add_(0, slot, torch.ones_like(slot, dtype=full.dtype))[:-1]
    rows = x.reshape(-1, x.shape[-1])
    quantized.copy_(torch.where(inside[:, None], total.to(x.dtype), rows).view(x.shape))
    indices.copy_(torch.where(inside[:, None], chosen, -1).view(indices.shape))
    codebook_losses.copy_(commitment)
    return quantized, indices, commitment, codebook_losses, counts


def _empty(
    x: Tensor, codes: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values."""
    dtype = nearest_code.output_dtype(x, codes)
    return (
        x.new_empty(x.shape),
        x.new_empty((*x.shape[:-1], len(sizes)), dtype=torch.int64),
        x.new_empty(len(sizes), dtype=dtype),
        x.new_empty(len(sizes), dtype=dtype),
        x.new_empty((len(sizes), max(sizes)), dtype=dtype),
    )


def fake(
    x: Tensor, codes: Tensor, sizes: list[int], *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values, of the lookup and of the beam search."""
    return _empty(x, codes, sizes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codes, ctx.sizes, ctx.shared, *rest = inputs
    ctx.gradient = next(a for a in rest if a in GRADIENTS)
    ctx.num_inputs = len(inputs)
    _, indices, _, _, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(x, codes, indices)


def _gradients(
    ctx: Any,
    quantized: Tensor | None,
    indices: None,
    commitment: Tensor | None,
    codebook_losses: Tensor | None,
    counts: None,
) -> tuple[Tensor | None, ...]:
    need_x, need_codes, *_ = ctx.needs_input_grad
    x, codes, indices = ctx.saved_tensors
    grad_x, grad_codes = backends.call(
        BACKWARD,
        quantized,
        commitment if need_x else None,
        codebook_losses if need_codes else None,
        x,
        codes,
        indices,
        ctx.sizes,
        ctx.shared,
        ctx.gradient,
        need_x,
        need_codes,
    )
    rest = (None,) * (ctx.num_inputs - 2)
    return grad_x if need_x else None, grad_codes if need_codes else None, *rest


def reference_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    codebook_losses: Tensor | None,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    sizes: list[int],
    shared: bool,
    gradient: str,
    need_x: bool,
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the codes; tensors without elements for what is not needed.

    The residuals are made again from the indices.

    Args:
        quantized, commitment, codebook_losses: gradients of these outputs, None for zeros.
        x, codes, sizes, shared, indices: the forward's.
    """
    grad_x, grad_codes = fake_bwd(
        quantized, commitment, codebook_losses, x, codes, indices, sizes, shared, gradient,
        need_x, need_codes,
    )  # fmt: skip
    residual = _first_residual(x, codes)  # [N, D]
    index = indices.reshape(residual.shape[0], len(sizes))  # [N, Q]
    inside = index[:, 0] >= 0  # [N]
    # Of the mean of squares.
    factor = 2 / (inside.sum() * x.shape[-1]).clamp_min(1).double()
    passed = torch.zeros_like(residual, dtype=torch.float64)
    if quantized is not None:
        passed = quantized.reshape(residual.shape).double()
    to_x = passed if gradient == "straight_through" else torch.zeros_like(passed)
    to_codes = torch.zeros_like(codes, dtype=torch.float64)
    by_stage = list(_stages(to_codes, sizes, shared))
    for q, stage in enumerate(_stages(codes, sizes, shared)):
        residual = residual - stage[index[:, q].clamp_min(0)].to(residual.dtype)
        if need_x and commitment is not None:
            to_x = to_x + commitment[q].double() * factor * residual.double()
        to_stage = passed if gradient == "none" else torch.zeros_like(passed)
        if need_codes and codebook_losses is not None:
            to_stage = to_stage - codebook_losses[q].double() * factor * residual.double()
        if need_codes:
            by_stage[q] += code_statistics.reference(to_stage, index[:, q], len(stage), None)[1]
    if need_x:
        grad_x.copy_(torch.where(inside[:, None], to_x, passed).view(x.shape))
    if need_codes:
        grad_codes.copy_(to_codes)
    return grad_x, grad_codes


def fake_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    codebook_losses: Tensor | None,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    sizes: list[int],
    shared: bool,
    gradient: str,
    need_x: bool,
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    return (
        x.new_empty(x.shape if need_x else (0,)),
        codes.new_empty(codes.shape if need_codes else (0,)),
    )


def cost(x: Tensor, codes: Tensor, sizes: list[int], *_: Any) -> Cost:
    """Vectors and codes read once, outputs written once; the products of every stage."""
    rows, scalar = x.shape[:-1].numel(), nearest_code.output_dtype(x, codes).itemsize
    outputs = x.nbytes + 8 * rows * len(sizes) + scalar * len(sizes) * (2 + max(sizes))
    return Cost(bytes=x.nbytes + codes.nbytes + outputs, flops=2 * x.numel() * sum(sizes))


def cost_beam(x: Tensor, codes: Tensor, sizes: list[int], *rest: Any) -> Cost:
    """The lookup's, with the products of every member of the beam."""
    lookup = cost(x, codes, sizes)
    return Cost(bytes=lookup.bytes, flops=lookup.flops * rest[-1])


def cost_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    codebook_losses: Tensor | None,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    *_: Any,
) -> Cost:
    """Gradient, x, indices and codes read once, gradients written once."""
    read = x.nbytes + codes.nbytes + indices.nbytes
    read += 0 if quantized is None else quantized.nbytes
    return Cost(bytes=read + x.nbytes + codes.nbytes, flops=3 * indices.shape[-1] * x.numel())


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Codes, indices and counts must equal the reference's; losses be within rounding of it."""
    return vector_quantize.compare(result, arguments, expected or reference(*arguments))


def compare_beam(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """As :func:`compare`."""
    return vector_quantize.compare(result, arguments, expected or reference_beam(*arguments))


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Gradients must be within rounding of the reference's, relative to the largest term."""
    return vector_quantize.compare_bwd(result, arguments, expected or reference_bwd(*arguments))


def _quantising(
    n: int,
    d: int,
    sizes: list[int],
    shared: bool = False,
    gradient: str = "straight_through",
    masked: bool = False,
) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, d, generator=generator)
        # Later stages have smaller residuals and, trained, smaller codes.
        scales = [0.9**q for q in range(1 if shared else len(sizes))]
        pairs = zip(sizes, scales, strict=False)
        codes = torch.cat([torch.randn(k, d, generator=generator) * s for k, s in pairs])
        mask = (torch.rand(n, generator=generator) < 0.7).to(device) if masked else None
        arguments = x.to(device, dtype), codes.to(device, dtype), sizes, shared
        return *arguments, "euclidean", gradient, mask

    k = sizes[0] if len(set(sizes)) == 1 else f"{min(sizes)}to{max(sizes)}"
    suffix = f"{'_shared' * shared}{'_masked' * masked}{'_none' * (gradient == 'none')}"
    return Sample(
        f"n{n}_q{len(sizes)}_k{k}_d{d}{suffix}",
        make,
        {"N": n, "K": max(sizes), "D": d, "H": 1, "Q": len(sizes)},
        bench=n >= 750,
    )


def samples() -> Iterable[Sample]:
    """Codecs' shapes (``bench``; 750 vectors are ten seconds of EnCodec) and odd ones."""
    yield _quantising(16384, 128, [1024] * 8)
    yield _quantising(750, 128, [1024] * 8)
    yield _quantising(0, 3, [5, 5])
    yield _quantising(1, 1, [1])
    yield _quantising(33, 7, [65, 65])
    yield _quantising(40, 33, [65, 17, 1], masked=True)
    yield _quantising(20, 16, [31] * 3, shared=True)
    yield _quantising(65, 5, [7, 9], gradient="none", masked=True)


def samples_beam() -> Iterable[Sample]:
    """The forward's, with beams."""
    for beam, sample in zip((4, 2, 3, 2, 3, 4, 2), list(samples())[1:], strict=True):

        def make(
            device: torch.device,
            dtype: torch.dtype,
            seed: int,
            sample: Sample = sample,
            beam: int = beam,
        ) -> Arguments:
            x, codes, sizes, shared, _, gradient, mask = sample.make(device, dtype, seed)
            return x, codes, sizes, shared, gradient, mask, beam

        yield Sample(f"{sample.name}_beam{beam}", make, sample.shape, sample.bench)


def samples_bwd() -> Iterable[Sample]:
    """Gradients of the forward's samples."""

    def of(sample: Sample) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            arguments = sample.make(device, dtype, seed)
            x, codes, sizes, shared, _, gradient, _ = arguments
            output = backends.call(OP, *arguments)
            generator = torch.Generator().manual_seed(seed + 1)
            grads = [
                torch.randn(t.shape, generator=generator).to(t) for t in (output[0], *output[2:4])
            ]
            return *grads, x, codes, output[1], sizes, shared, gradient, True, True

        return Sample(sample.name, make, sample.shape, sample.bench)

    return [of(sample) for sample in samples()]


def _load_triton() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.residual_quantize import residual_quantize as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.residual_quantize import residual_quantize_bwd as launch

    return launch


_OUTPUTS = "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"

OP = register(
    Op(
        name="residual_quantize",
        schema="(Tensor x, Tensor codes, SymInt[] sizes, bool shared, str metric, str gradient, "
        f"Tensor? mask) {_OUTPUTS}",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("residual_quantize"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients),
    )
)

BEAM = register(
    Op(
        name="residual_quantize_beam",
        schema="(Tensor x, Tensor codes, SymInt[] sizes, bool shared, str gradient, Tensor? mask, "
        f"SymInt beam) {_OUTPUTS}",
        reference=reference_beam,
        fake=fake,
        backends={},
        samples=samples_beam,
        cost=cost_beam,
        compare=compare_beam,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients),
    )
)

BACKWARD = register(
    Op(
        name="residual_quantize_bwd",
        schema="(Tensor? quantized, Tensor? commitment, Tensor? codebook_losses, Tensor x, "
        "Tensor codes, Tensor indices, SymInt[] sizes, bool shared, str gradient, bool need_x, "
        "bool need_codes) -> (Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("residual_quantize_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
