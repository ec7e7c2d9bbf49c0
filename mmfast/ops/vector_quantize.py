"""Vector quantisation for training: lookup, gather, losses and counts, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import (
    FLOATING,
    check_choice,
    check_codebook,
    check_device,
    check_floating,
    check_mask,
)
from mmfast.ops import code_statistics, nearest_code
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register
from mmfast.results import exportable

GRADIENTS = ("straight_through", "rotation", "directional", "none")

_LEAST_NORM = 1e-6  # of the rotation's divisions


@exportable
class VectorQuantized(NamedTuple):
    """What :func:`vector_quantize` returns.

    Attributes:
        quantized: the nearest code of each vector, the vector itself where the mask is False;
            x's shape and dtype.
        indices: of these codes, ``x.shape[:-1]``, int64; -1 where the mask is False.
        commitment_loss: mean squared difference between vectors and codes, ``()``, or ``(H,)``
            with heads; its gradient goes to x only. 0 if there are no vectors.
        codebook_loss: the same number; its gradient goes to the codebook only.
        counts: vectors of each code, ``(K,)`` or ``(H, K)``.
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    noise_variance: float = 5e-3,
) -> VectorQuantized:
    """Replace every vector by its nearest code, differentiably.

    Args:
        x: vectors, ``(..., D)``, or ``(H, ..., D)`` when ``codebook`` has heads. Any strides;
            float16, bfloat16, float32 or float64.
        codebook: codes, ``(K, D)`` or ``(H, K, D)``; its dtype may differ from x's.
        metric: what is nearest, as in :func:`mmfast.nearest_code`. The losses are squared
            differences whatever the metric: normalise both sides for spherical codes.
        gradient: how ``quantized`` passes its gradient on. ``"straight_through"``: to x
            unchanged. ``"rotation"``: to x, rotated and scaled as x would have to be to become
            the code. ``"directional"``: to both, by a step of the right length from x in a
            direction with noise; ``quantized`` then is where the step leads. ``"none"``: to the
            codebook alone, as an embedding's.
        mask: ``x.shape[:-1]``, bool; vectors where it is False pass unchanged and count for
            nothing.
        noise: standard normal numbers of x's shape for ``"directional"``; by default drawn from
            torch's generator.
        noise_variance: of the noise added to the direction.

    Returns:
        :class:`VectorQuantized`. The indices are exact, as :func:`mmfast.nearest_code` gives
        them. Losses and counts are float64 if x or the codebook is, else float32.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices, ``metric`` or ``gradient`` do not fit.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), eq. 3;
    Fifty et al., "Restructuring Vector Quantization with the Rotation Trick" (2024), sec. 4.2;
    Vali et al., "DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick"
    (2025), fig. 1, for the directional one.
    """
    check_floating("x", x)
    check_floating("codebook", codebook)
    check_device(x=x, codebook=codebook)
    check_codebook(x, codebook)
    check_choice("metric", metric, nearest_code.METRICS)
    check_choice("gradient", gradient, GRADIENTS)
    if mask is not None:
        check_mask(x, mask)
    if noise is not None and gradient != "directional":
        raise ValueError(f"noise is for gradient 'directional', got {gradient!r}")
    inner = "none" if gradient == "directional" else gradient
    result = VectorQuantized(*backends.call(OP, x, codebook, metric, inner, mask))
    if gradient != "directional":
        return result
    noise = torch.randn_like(x) if noise is None else noise
    return result._replace(quantized=directional(x, result.quantized, noise, noise_variance))


def directional(x: Tensor, quantized: Tensor, noise: Tensor, variance: float) -> Tensor:
    """x moved by its distance to the code, in the direction of the code with noise added."""
    error = quantized - x  # [..., D]
    direction = (error + math.sqrt(variance) * noise).detach()
    unit = torch.nn.functional.normalize(direction, dim=-1, eps=_LEAST_NORM)
    return x + unit * error.norm(dim=-1, keepdim=True)


def _flat(t: Tensor, heads: bool, width: int) -> Tensor:
    """(H, N, width) of a tensor (H, ..., width), or of one without heads."""
    return t.reshape(t.shape[0] if heads else 1, -1, width)


def _codes_of(codebook: Tensor, indices: Tensor) -> Tensor:
    """Codes (H, N, D) of codebook (H, K, D) at indices (H, N), -1 giving any."""
    return codebook.gather(1, indices.clamp_min(0)[:, :, None].expand(-1, -1, codebook.shape[2]))


def reference(
    x: Tensor, codebook: Tensor, metric: str, gradient: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification; ``gradient`` changes only what :func:`_gradients` does."""
    quantized, indices, commitment, codebook_loss, counts = fake(
        x, codebook, metric, gradient, mask
    )
    heads, num_dims = codebook.dim() == 3, codebook.shape[-1]
    nearest, _ = nearest_code.reference(x, codebook, metric)  # [...]
    if mask is not None:
        nearest = torch.where(mask, nearest, -1)
    indices.copy_(nearest)
    codes = codebook if heads else codebook[None]  # [H, K, D]
    rows = _flat(x, heads, num_dims)  # [H, N, D]
    index = nearest.reshape(rows.shape[:2])  # [H, N]
    chosen = _codes_of(codes, index)  # [H, N, D]
    inside = index >= 0  # [H, N]
    result = torch.where(inside[:, :, None], chosen.to(x.dtype), rows)
    quantized.copy_(result.view(x.shape))
    square = (rows.double() - chosen.double()).square().sum(2)  # [H, N]
    total = torch.where(inside, square, 0).sum(1)  # [H]
    error = total / (inside.sum(1) * num_dims).clamp_min(1)
    commitment.copy_(error.view(commitment.shape))
    codebook_loss.copy_(commitment)
    slots = torch.where(inside, index, codes.shape[1])
    full = counts.new_zeros(codes.shape[0], codes.shape[1] + 1)
    full.scatter_add_(1, slots, torch.ones_like(slots, dtype=full.dtype))
    counts.copy_(full[:, :-1].view(counts.shape))
    return quantized, indices, commitment, codebook_loss, counts


def fake(
    x: Tensor, codebook: Tensor, metric: str, gradient: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values."""
    dtype = nearest_code.output_dtype(x, codebook)
    heads = codebook.shape[:-2]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        x.new_empty(heads, dtype=dtype),
        x.new_empty(heads, dtype=dtype),
        x.new_empty(codebook.shape[:-1], dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, _, ctx.gradient, _ = inputs
    _, indices, _, _, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(x, codebook, indices, counts)


def _gradients(
    ctx: Any,
    quantized: Tensor | None,
    indices: None,
    commitment: Tensor | None,
    codebook_loss: Tensor | None,
    counts: None,
) -> tuple[Tensor | None, ...]:
    need_x, need_codebook, *_ = ctx.needs_input_grad
    grad_x, grad_codebook = backends.call(
        BACKWARD,
        quantized,
        commitment if need_x else None,
        codebook_loss if need_codebook else None,
        *ctx.saved_tensors,
        ctx.gradient,
        need_x,
        need_codebook,
    )
    return grad_x if need_x else None, grad_codebook if need_codebook else None, None, None, None


def reference_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    codebook_loss: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    counts: Tensor,
    gradient: str,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the codebook; zeros of no elements for what is not needed.

    Args:
        quantized, commitment, codebook_loss: gradients of these outputs, None for zeros.
        x, codebook, indices, counts: the forward's.
    """
    grad_x, grad_codebook = fake_bwd(
        quantized, commitment, codebook_loss, x, codebook, indices, counts, gradient,
        need_x, need_codebook,
    )  # fmt: skip
    heads, num_dims = codebook.dim() == 3, codebook.shape[-1]
    codes = (codebook if heads else codebook[None]).double()  # [H, K, D]
    rows = _flat(x, heads, num_dims).double()  # [H, N, D]
    index = indices.reshape(rows.shape[:2])  # [H, N]
    inside = index >= 0
    chosen = _codes_of(codes, index)  # [H, N, D]
    per_head = counts.reshape(-1, codes.shape[1]).double()  # [H, K]
    # Of the mean of squares.
    factor = 2 / (per_head.sum(1) * num_dims).clamp_min(1)  # [H]
    passed = rows.new_zeros(rows.shape)
    if quantized is not None:
        passed = _flat(quantized, heads, num_dims).double()  # [H, N, D]
    if need_x:
        to_x = passed
        if gradient == "none":
            to_x = torch.zeros_like(passed)
        elif gradient == "rotation":
            to_x = _rotated(rows, chosen, passed)
        if commitment is not None:
            scale = (commitment.reshape(-1).double() * factor)[:, None, None]
            to_x = to_x + scale * (rows - chosen)
        to_x = torch.where(inside[:, :, None], to_x, passed)
        grad_x.copy_(to_x.view(x.shape))
    if need_codebook:
        to_codes = torch.zeros_like(codes)
        if gradient == "none" and quantized is not None:
            to_codes += _segment_sums(passed, index, codes.shape[1])
        if codebook_loss is not None:
            scale = (codebook_loss.reshape(-1).double() * factor)[:, None, None]
            sums = _segment_sums(rows, index, codes.shape[1])  # [H, K, D]
            to_codes += scale * (per_head[:, :, None] * codes - sums)
        grad_codebook.copy_(to_codes.view(codebook.shape))
    return grad_x, grad_codebook


def _segment_sums(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return code_statistics.reference(x, indices, num_codes, None)[1]


def _rotated(x: Tensor, codes: Tensor, grad: Tensor) -> Tensor:
    """The rotation trick's gradient: the transpose of |q| / |x| (I - 2 w w^T + 2 q e^T), with e
    and q the directions of x and of its code, w that of their sum."""
    norm_x, norm_q = x.norm(dim=-1, keepdim=True), codes.norm(dim=-1, keepdim=True)
    e = x / norm_x.clamp_min(_LEAST_NORM)  # [H, N, D]
    q = codes / norm_q.clamp_min(_LEAST_NORM)
    w = torch.nn.functional.normalize(e + q, dim=-1, eps=_LEAST_NORM)
    along_w, along_q = (w * grad).sum(-1, keepdim=True), (q * grad).sum(-1, keepdim=True)
    return norm_q / norm_x.clamp_min(_LEAST_NORM) * (grad - 2 * along_w * w + 2 * along_q * e)


def fake_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    codebook_loss: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    counts: Tensor,
    gradient: str,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    return (
        x.new_empty(x.shape if need_x else (0,)),
        codebook.new_empty(codebook.shape if need_codebook else (0,)),
    )


def cost(x: Tensor, codebook: Tensor, metric: str, gradient: str, mask: Tensor | None) -> Cost:
    """The lookup's, with one more write of x's size."""
    lookup = nearest_code.cost(x, codebook, metric)
    outputs = (
        x.nbytes + codebook.shape[:-1].numel() * nearest_code.output_dtype(x, codebook).itemsize
    )
    return Cost(bytes=lookup.bytes + outputs + x.shape[:-1].numel(), flops=lookup.flops)


def cost_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    codebook_loss: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    *_: Any,
) -> Cost:
    """Gradient, x and codebook read once, their gradients written once."""
    read = x.nbytes + codebook.nbytes + (0 if quantized is None else quantized.nbytes)
    return Cost(bytes=read + x.nbytes + codebook.nbytes, flops=4 * x.numel())


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Codes, indices and counts must equal the reference's; losses be within rounding of it."""
    expected = expected or reference(*arguments)
    names = ("quantized", "indices", "commitment_loss", "codebook_loss", "counts")
    complaints = []
    for name, got, want in zip(names, result, expected, strict=True):
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            complaints.append(
                f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
            )
        elif "loss" in name:
            if not torch.allclose(got, want, rtol=8 * torch.finfo(got.dtype).eps, equal_nan=True):
                complaints.append(f"{name} is {got.tolist()}, expected {want.tolist()}")
        elif not torch.equal(got.nan_to_num(7), want.nan_to_num(7)):
            complaints.append(f"{int((got != want).sum())} {name} differ from the reference")
    return complaints


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Gradients must be within rounding of the reference's, relative to the largest term."""
    expected = expected or reference_bwd(*arguments)
    complaints = []
    for name, got, want in zip(("x", "codebook"), result, expected, strict=True):
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            complaints.append(
                f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
            )
            continue
        size = want.abs().nan_to_num(0, 0, 0).amax() if want.numel() else 0
        tolerance = 32 * torch.finfo(got.dtype).eps * size + torch.finfo(got.dtype).tiny
        same = ((got - want).abs() <= tolerance) | (got == want) | (got.isnan() & want.isnan())
        if not bool(same.all()):
            complaints.append(f"{int((~same).sum())} gradients of {name} differ")
    return complaints


def _quantising(
    n: int, k: int, d: int, heads: int = 0, gradient: str = "straight_through", masked: bool = False
) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        lead = (heads,) if heads else ()
        x = torch.randn(*lead, n, d, generator=generator).to(device, dtype)
        codes = torch.randn(*lead, k, d, generator=generator).to(device, dtype)
        mask = (torch.rand(*lead, n, generator=generator) < 0.7).to(device) if masked else None
        return x, codes, "euclidean", gradient, mask

    name = f"{f'h{heads}_' if heads else ''}n{n}_k{k}_d{d}_{gradient}{'_masked' if masked else ''}"
    return Sample(name, make, {"N": n, "K": k, "D": d, "H": heads or 1}, bench=n >= 4096)


def samples() -> Iterable[Sample]:
    """Shapes of the field (``bench``) and odd ones."""
    yield _quantising(65536, 1024, 64)
    for gradient in ("straight_through", "rotation", "none"):
        for n, k, d in ((0, 5, 3), (1, 1, 1), (33, 65, 7)):
            yield _quantising(n, k, d, gradient=gradient)
        yield _quantising(63, 129, 33, gradient=gradient, masked=True)
        yield _quantising(65, 7, 5, heads=3, gradient=gradient, masked=True)


def samples_bwd() -> Iterable[Sample]:
    """Gradients for the forward's samples."""

    def of(sample: Sample) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            x, codebook, metric, gradient, mask = sample.make(device, dtype, seed)
            output = fake(x, codebook, metric, gradient, mask)
            generator = torch.Generator().manual_seed(seed + 1)
            grads = [
                torch.randn(t.shape, generator=generator).to(t) for t in (output[0], *output[2:4])
            ]
            # Any codes do; looking up the nearest would take longer than the gradients.
            num_codes, lead = codebook.shape[-2], codebook.shape[:-2]
            indices = torch.randint(num_codes, output[1].shape, generator=generator).to(device)
            if mask is not None:
                indices = torch.where(mask, indices, -1)
            counts = _segment_sums(torch.ones_like(x[..., :1]), indices, num_codes)
            counts = counts.view(*lead, num_codes).to(output[4])
            return *grads, x, codebook, indices, counts, gradient, True, gradient != "rotation"

        return Sample(sample.name, make, sample.shape, sample.bench)

    # Too long a lookup to be worth a second look beside nearest_code's.
    large = _quantising(16384, 16384, 256)
    return [of(sample) for sample in (*samples(), large)]


def _load_triton() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.vector_quantize import vector_quantize as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.vector_quantize import vector_quantize_bwd as launch

    return launch


OP = register(
    Op(
        name="vector_quantize",
        schema="(Tensor x, Tensor codebook, str metric, str gradient, Tensor? mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("vector_quantize"),
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
        name="vector_quantize_bwd",
        schema="(Tensor? quantized, Tensor? commitment, Tensor? codebook_loss, Tensor x, "
        "Tensor codebook, Tensor indices, Tensor counts, str gradient, bool need_x, "
        "bool need_codebook) -> (Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("vector_quantize_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
