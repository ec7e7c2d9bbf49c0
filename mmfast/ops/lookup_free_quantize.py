"""Lookup-free quantisation: a bit per dimension, and entropies that need no table of codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_device, check_dtype, check_floating
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register
from mmfast.results import exportable

MOST_BITS = 63  # of an index
MOST_GROUP_BITS = 24  # of a group whose distribution is wanted, 2^24 numbers

_LEAST_NORM = 1e-12  # of the spherical variant's division
_WORKSPACE = 1 << 20  # float64 elements of the reference's largest temporary


@exportable
class LookupFreeQuantized(NamedTuple):
    """What :func:`lookup_free_quantize` returns; C codebooks of B bits, groups of g bits.

    Attributes:
        quantized: the code of each vector, ``(..., C B)``, z's dtype.
        indices: ``(..., C)``, int64; the first dimension of a codebook is the highest bit.
        commitment_loss: mean squared difference between (normalised) vectors and codes, ``()``;
            its gradient goes to z. 0 without vectors.
        sample_entropy: mean entropy of the distribution of a vector's code, ``()``, in nats.
        mean_probabilities: mean over the vectors of the distribution of each group's bits,
            ``(C, B / g, 2^g)``.
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    sample_entropy: Tensor
    mean_probabilities: Tensor

    @property
    def batch_entropy(self) -> Tensor:
        """:func:`batch_entropy` of this batch."""
        return batch_entropy(self.mean_probabilities)


def lookup_free_quantize(
    z: Tensor,
    *,
    num_codebooks: int = 1,
    scale: float = 1.0,
    spherical: bool = False,
    inv_temperature: float = 100.0,
    group_bits: int | None = None,
    mask: Tensor | None = None,
) -> LookupFreeQuantized:
    """Replace every number by its sign, with the entropies of the implied distributions.

    A codebook holds the 2^B vectors of entries +s and -s, s = ``scale``, or with ``spherical``
    s = ``scale`` / sqrt(B) and z is normalised to the norm ``scale`` first. A vector x has the
    distribution softmax(2 ``inv_temperature`` x . c) over the codes c. As x . c is a sum over the
    dimensions, it is the product of independent bits: bit i is one with probability
    sigmoid(4 ``inv_temperature`` s x_i). So the entropy of a vector's code is the sum of the
    entropies of its bits, exactly and for any B. The mean of the distributions over N vectors is
    not a product; but each is the outer product of the distributions of its upper and its lower
    bits, so that their sum is a matrix product of shapes (2^(g/2), N) and (N, 2^(g/2)), summed
    over blocks of vectors: N 2^g multiplications, and no more memory than the 2^g means.

    Args:
        z: ``(..., C B)``, the codebooks side by side. Any strides; float16, bfloat16, float32 or
            float64. A code's bit is 1 where z is above 0.
        num_codebooks: C.
        scale: of the codes.
        spherical: binary spherical quantisation.
        inv_temperature: of the distribution; it must be finite.
        group_bits: g, how many neighbouring bits' joint distribution is averaged; divides B, at
            most 24. None: all B, the batch's entropy is exact. Less: groups count as independent
            in it, which bounds it from above, at N B / g 2^g multiplications. 0: no losses at all.
        mask: ``z.shape[:-1]``, bool; vectors where it is False count for no loss.

    Returns:
        :class:`LookupFreeQuantized`. The gradient of ``quantized`` goes straight through the sign
        (and through the normalisation as it is). The losses are float64 if z is, else float32;
        without vectors they are 0. With ``group_bits=0`` they are 0, and ``mean_probabilities``
        has no elements.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or numbers do not fit.

    Source: Yu et al., "Language Model Beats Diffusion -- Tokenizer is Key to Visual Generation"
    (2023), eq. 3-4; Zhao et al., "Image and Video Tokenization with Binary Spherical
    Quantization" (2024), sec. 4, for the spherical variant and the groups.
    """
    check_floating("z", z)
    if num_codebooks < 1:
        raise ValueError(f"num_codebooks must be at least 1, got {num_codebooks}")
    if z.dim() < 1 or z.shape[-1] < 1 or z.shape[-1] % num_codebooks:
        raise ValueError(
            f"z must be (..., C B) with C = {num_codebooks} codebooks, got shape {tuple(z.shape)}"
        )
    bits = z.shape[-1] // num_codebooks
    if bits > MOST_BITS:
        raise ValueError(f"a codebook can have at most {MOST_BITS} bits, got {bits}")
    group = bits if group_bits is None else group_bits
    if group < 0 or (group and bits % group) or group > MOST_GROUP_BITS:
        raise ValueError(
            f"group_bits must divide the {bits} bits of a codebook and be at most "
            f"{MOST_GROUP_BITS}, or be 0, got {group_bits}"
        )
    for name, value in (("scale", scale), ("inv_temperature", inv_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {value}")
    if mask is not None:
        check_dtype("mask", mask, (torch.bool,))
        check_device(z=z, mask=mask)
        if mask.shape != z.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(z.shape[:-1])}, got {tuple(mask.shape)}")
    return LookupFreeQuantized(
        *backends.call(
            OP, z, num_codebooks, float(scale), spherical, float(inv_temperature), group, mask
        )
    )


def batch_entropy(mean_probabilities: Tensor) -> Tensor:
    """Entropy of the mean distribution, in nats: summed over groups, the mean of the codebooks.

    Args:
        mean_probabilities: ``(C, G, 2^g)``, as :func:`lookup_free_quantize` gives it; ranks may
            have averaged theirs first.
    """
    tiny = torch.finfo(mean_probabilities.dtype).tiny
    terms = mean_probabilities * mean_probabilities.clamp_min(tiny).log()
    return -terms.sum((1, 2)).mean()


def output_dtype(z: Tensor) -> torch.dtype:
    """dtype of the losses."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _magnitude(bits: int, scale: float, spherical: bool) -> float:
    """s, the entries of the codes."""
    return scale / math.sqrt(bits) if spherical else scale


def _codes(sign: Tensor, s: float) -> Tensor:
    """s where ``sign``, else -s, float64."""
    return sign.double() * (2 * s) - s


def _normalised(rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Vectors (N, C, B) of the norm ``scale``, and what they were divided by, (N, C, 1)."""
    norm = rows.norm(dim=-1, keepdim=True).clamp_min(_LEAST_NORM)
    return rows * (scale / norm), norm


def _bit_entropy(logit: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of bits that are one with probability sigmoid(logit), and its derivative."""
    size = logit.abs().clamp_max(700)  # exp of it is finite, of its opposite 0 beside 1
    e = (-size).exp()
    value = e.log1p() + size * e / (1 + e)
    return value, -logit.clamp(-700, 700) * e / (1 + e).square()


def _outcomes(probability: Tensor) -> Tensor:
    """Distribution (N, 2^b) of independent bits (N, b) that are one with ``probability``."""
    result = probability.new_ones(probability.shape[0], 1)
    for p in probability.unbind(1):
        pair = torch.stack((1 - p, p), 1)  # [N, 2]
        result = (result[:, :, None] * pair[:, None, :]).flatten(1)
    return result


def _halves(group: int) -> tuple[int, int]:
    """How many of a group's bits are the upper ones, and how many the lower."""
    return group // 2, group - group // 2


def _groups(logit: Tensor, group: int) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """Blocks of vectors by groups: the group, the block, and there the probabilities (n, g) of
    bits, and the distributions of the upper and the lower ones."""
    upper, lower = _halves(group)
    step = max(1, _WORKSPACE >> lower)
    for start in range(0, logit.shape[0], step):
        rows = slice(start, min(start + step, logit.shape[0]))
        probability = logit[rows].sigmoid().unflatten(1, (-1, group))  # [n, C G, g]
        for g in range(probability.shape[1]):
            p = probability[:, g]  # [n, g]
            yield g, rows, p, _outcomes(p[:, :upper]), _outcomes(p[:, upper:])


def _inside(z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mask as weights (N, 1) that sum to one, and the mask (N, 1)."""
    rows = z.shape[:-1].numel()
    if mask is None:
        inside = torch.ones(rows, 1, dtype=torch.bool, device=z.device)
    else:
        inside = mask.reshape(rows, 1)
    return inside.double() / inside.sum().clamp_min(1), inside


def reference(
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification, ``group_bits`` being 0 for no losses."""
    outputs = fake(z, num_codebooks, scale, spherical, inv_temperature, group_bits, mask)
    quantized, indices, commitment, entropy, means = outputs
    bits = z.shape[-1] // num_codebooks
    s = _magnitude(bits, scale, spherical)
    rows = z.reshape(-1, num_codebooks, bits).double()  # [N, C, B]
    sign = rows > 0  # [N, C, B]
    place = torch.arange(bits - 1, -1, -1, device=z.device)
    indices.copy_((sign.long() << place).sum(2).view(indices.shape))
    code = _codes(sign, s)
    quantized.copy_(code.view(z.shape))
    for loss in (commitment, entropy, means):
        loss.zero_()
    if not group_bits:
        return outputs
    x = _normalised(rows, scale)[0] if spherical else rows
    weight, inside = _inside(z, mask)  # [N, 1]
    square = (x - code).square().flatten(1)  # [N, C B]
    commitment.copy_((weight * torch.where(inside, square, 0)).sum() / z.shape[-1])
    logit = (4 * inv_temperature * s * x).flatten(1).contiguous()  # [N, C B]
    value, _ = _bit_entropy(logit)
    entropy.copy_((weight * torch.where(inside, value, 0)).sum() / num_codebooks)
    logit = torch.where(inside, logit, 0)
    total = means.new_zeros(means.flatten(0, 1).shape, dtype=torch.float64)  # [C G, 2^g]
    for g, block, _, upper, lower in _groups(logit, group_bits):
        total[g] += ((weight[block] * upper).T @ lower).flatten()
    means.copy_(total.view(means.shape))
    return outputs


def fake(
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values."""
    dtype = output_dtype(z)
    num_groups = z.shape[-1] // num_codebooks // group_bits if group_bits else 0
    return (
        z.new_empty(z.shape),
        z.new_empty((*z.shape[:-1], num_codebooks), dtype=torch.int64),
        z.new_empty((), dtype=dtype),
        z.new_empty((), dtype=dtype),
        z.new_empty((num_codebooks, num_groups, 1 << group_bits), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, *ctx.options, mask = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, mask)


def _gradients(
    ctx: Any,
    quantized: Tensor | None,
    indices: None,
    commitment: Tensor | None,
    entropy: Tensor | None,
    means: Tensor | None,
) -> tuple[Tensor | None, ...]:
    z, mask = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return (None,) * 7
    _, _, spherical, _, group_bits = ctx.options
    if quantized is not None and not group_bits and not spherical:
        return quantized, *(None,) * 6  # straight through
    grads = (quantized, commitment, entropy, means)
    return backends.call(BACKWARD, *grads, z, *ctx.options, mask), *(None,) * 6


def reference_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    entropy: Tensor | None,
    means: Tensor | None,
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> Tensor:
    """The gradient of z.

    Args:
        quantized, commitment, entropy, means: gradients of these outputs, None for zeros.
    """
    bits = z.shape[-1] // num_codebooks
    s = _magnitude(bits, scale, spherical)
    rows = z.reshape(-1, num_codebooks, bits).double()  # [N, C, B]
    x, norm = _normalised(rows, scale) if spherical else (rows, None)
    flat = x.flatten(1).contiguous()  # [N, C B]
    passed = torch.zeros_like(flat) if quantized is None else quantized.reshape(flat.shape).double()
    if group_bits:
        weight, inside = _inside(z, mask)  # [N, 1]
        to_losses = torch.zeros_like(flat)
        if commitment is not None:
            code = _codes(rows > 0, s).flatten(1)
            to_losses += commitment.double() * 2 / z.shape[-1] * (flat - code)
        slope = 4 * inv_temperature * s  # of the logits
        if entropy is not None:
            to_losses += entropy.double() / num_codebooks * slope * _bit_entropy(slope * flat)[1]
        if means is not None:
            logit = torch.where(inside, slope * flat, 0)
            to_losses += slope * _through_means(means.double(), logit, group_bits)
        passed = passed + torch.where(inside, weight * to_losses, 0)
    if norm is not None:
        to_x = passed.view(rows.shape)
        unit = rows / norm  # shorter than 1 where the norm counts as _LEAST_NORM
        along = (unit * to_x).sum(2, keepdim=True)
        moving = norm > _LEAST_NORM  # else the norm is a constant
        passed = (to_x - torch.where(moving, along * unit, 0)) * (scale / norm)
    result = fake_bwd(
        quantized, commitment, entropy, means, z, num_codebooks, scale, spherical,
        inv_temperature, group_bits, mask,
    )  # fmt: skip
    return result.copy_(passed.view(z.shape))


def _through_means(means: Tensor, logit: Tensor, group: int) -> Tensor:
    """Gradients (N, C B) of logits from those of the means' sums, (C, G, 2^g).

    A code's probability is u v, of its upper and its lower bits; by the logit of bit i its
    derivative is u v (bit i - p_i).
    """
    result = torch.zeros_like(logit)
    upper, lower = _halves(group)
    tables = means.flatten(0, 1).unflatten(1, (1 << upper, 1 << lower))  # [C G, 2^gu, 2^gl]
    for g, block, p, u, v in _groups(logit, group):
        wu, wv = u * (v @ tables[g].T), v * (u @ tables[g])  # [n, 2^gu], [n, 2^gl]
        ones = torch.cat((wu @ _bits_of(upper, wu), wv @ _bits_of(lower, wv)), 1)  # [n, g]
        result[block, g * group : (g + 1) * group] = ones - p * wv.sum(1, keepdim=True)
    return result


def _bits_of(count: int, like: Tensor) -> Tensor:
    """The bits of the numbers below 2^count, highest first: (2^count, count)."""
    place = torch.arange(count - 1, -1, -1, device=like.device)
    numbers = torch.arange(1 << count, device=like.device)
    return (numbers[:, None] >> place & 1).to(like.dtype)


def fake_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    entropy: Tensor | None,
    means: Tensor | None,
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> Tensor:
    """The output without values."""
    return z.new_empty(z.shape)


def cost(
    z: Tensor,
    num_codebooks: int,
    scale: float,
    spherical: bool,
    inv_temperature: float,
    group_bits: int,
    mask: Tensor | None,
) -> Cost:
    """z read once, codes, indices and means written once; a product per vector and mean."""
    rows = z.shape[:-1].numel()
    moved = 2 * z.nbytes + 8 * rows * num_codebooks + 2 * output_dtype(z).itemsize
    products = z.shape[-1] // group_bits << group_bits if group_bits else 0
    moved += products * output_dtype(z).itemsize + (0 if mask is None else mask.nbytes)
    return Cost(bytes=moved, flops=2 * rows * products + 20 * z.numel())


def cost_bwd(
    quantized: Tensor | None,
    commitment: Tensor | None,
    entropy: Tensor | None,
    means: Tensor | None,
    z: Tensor,
    *others: Any,
) -> Cost:
    """z and the gradients read once, its gradient written once; two products per vector and
    mean."""
    forward = cost(z, *others)
    moved = 2 * z.nbytes + sum(
        t.nbytes for t in (quantized, commitment, entropy, means) if t is not None
    )
    return Cost(bytes=moved, flops=2 * forward.flops if means is not None else 20 * z.numel())


_NAMES = ("quantized", "indices", "commitment_loss", "sample_entropy", "mean_probabilities")


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Codes and indices must equal the reference's; losses be within rounding of it."""
    expected = expected or reference(*arguments)
    complaints = []
    for name, got, want in zip(_NAMES, result, expected, strict=True):
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            complaints.append(
                f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
            )
            continue
        same = (got == want) | (got.isnan() & want.isnan())
        if name not in ("quantized", "indices"):
            # A probability's error is relative to its logit, and to those of its group.
            tolerance = 64 * torch.finfo(got.dtype).eps
            same |= (got - want).abs() <= tolerance * want.abs() + 1e-6 * tolerance
        if not bool(same.all()):
            complaints.append(f"{int((~same).sum())} of {same.numel()} {name} differ")
    return complaints


def compare_bwd(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Within rounding of the reference, relative to the largest gradient."""
    expected = reference_bwd(*arguments) if expected is None else expected
    if (result.dtype, result.shape) != (expected.dtype, expected.shape):
        return [f"{result.dtype} {tuple(result.shape)}, expected {expected.dtype}"]
    size = expected.abs().nan_to_num(0, 0, 0).amax() if expected.numel() else 0
    info = torch.finfo(result.dtype)
    same = (result - expected).abs() <= 64 * info.eps * size + info.smallest_normal
    same |= (result == expected) | (result.isnan() & expected.isnan())
    return [] if bool(same.all()) else [f"{int((~same).sum())} gradients differ"]


def _sample(
    n: int,
    bits: int,
    codebooks: int = 1,
    spherical: bool = False,
    group: int | None = None,
    masked: bool = False,
) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, codebooks * bits, generator=generator).to(device, dtype)
        mask = (torch.rand(n, generator=generator) < 0.7).to(device) if masked else None
        inv_temperature = 10.0 if spherical else 1.0
        return z, codebooks, 0.5, spherical, inv_temperature, bits if group is None else group, mask

    name = f"n{n}_b{bits}{f'_c{codebooks}' if codebooks > 1 else ''}"
    name += f"{'_spherical' * spherical}{'' if group is None else f'_g{group}'}{'_masked' * masked}"
    shape = {"N": n, "K": 1 << bits, "D": codebooks * bits}
    return Sample(name, make, shape, bench=n >= 4096)


def samples() -> Iterable[Sample]:
    """Shapes of the field (``bench``) and odd ones."""
    yield _sample(16384, 10)
    yield _sample(16384, 14)
    yield _sample(65536, 18, spherical=True, group=9)
    for n, bits in ((0, 3), (1, 1), (33, 7), (65, 2)):
        yield _sample(n, bits)
    yield _sample(33, 5, codebooks=3, masked=True)
    yield _sample(63, 6, spherical=True, group=3, masked=True)
    yield _sample(33, 4, codebooks=2, spherical=True)
    yield _sample(17, 5, group=0)


def samples_bwd() -> Iterable[Sample]:
    """Gradients of the forward's samples."""

    def of(sample: Sample) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            arguments = sample.make(device, dtype, seed)
            generator = torch.Generator().manual_seed(seed + 1)
            quantized, _, *losses = fake(*arguments)
            grads = [torch.randn(t.shape, generator=generator).to(t) for t in (quantized, *losses)]
            return *grads, *arguments

        return Sample(sample.name, make, sample.shape, sample.bench)

    return [of(sample) for sample in samples()]


def _load_triton() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.lookup_free_quantize import lookup_free_quantize as launch

    return launch


def _load_triton_bwd() -> Callable[..., Tensor]:
    from mmfast.kernels.lookup_free_quantize import lookup_free_quantize_bwd as launch

    return launch


OP = register(
    Op(
        name="lookup_free_quantize",
        schema="(Tensor z, int num_codebooks, float scale, bool spherical, "
        "float inv_temperature, int group_bits, Tensor? mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("lookup_free_quantize"),
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
        name="lookup_free_quantize_bwd",
        schema="(Tensor? quantized, Tensor? commitment, Tensor? entropy, Tensor? means, Tensor z, "
        "int num_codebooks, float scale, bool spherical, float inv_temperature, int group_bits, "
        "Tensor? mask) -> Tensor",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("lookup_free_quantize_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
