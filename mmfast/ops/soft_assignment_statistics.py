"""Mean probabilities and entropy of soft assignments to a codebook, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import (
    FLOATING,
    check_choice,
    check_codebook,
    check_device,
    check_dtype,
    check_floating,
)
from mmfast.ops.nearest_code import output_dtype
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register
from mmfast.results import exportable

METRICS = ("euclidean", "distance", "cosine", "dot")
LEAST_SQUARE = 1e-8  # of a distance: its root's gradient at 0 is infinite

_LEAST_TEMPERATURE = 1e-30  # its inverse must be a float32
_WORKSPACE = 1 << 20  # float64 elements of the reference's largest temporary


@exportable
class SoftAssignmentStatistics(NamedTuple):
    """What :func:`soft_assignment_statistics` returns.

    Attributes:
        mean_probabilities: of each code, the mean over the vectors, ``(K,)``, with heads
            ``(H, K)``, with batch dimensions ``(H, *batch, K)``.
        entropy: mean over the vectors of the entropy of a vector's probabilities, in nats,
            ``()``, ``(H,)`` or ``(H, *batch)``.
    """

    mean_probabilities: Tensor
    entropy: Tensor


def soft_assignment_statistics(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 1.0,
    metric: str = "euclidean",
    weights: Tensor | None = None,
    batch_dims: int = 0,
) -> SoftAssignmentStatistics:
    """What entropy and diversity losses need of the probabilities of all codes for all vectors.

    Vector n has code k with probability p_nk = softmax_k(l_nk / ``temperature``). Over N vectors
    with weights w_n of sum W,

        mean_probabilities_k = sum_n w_n p_nk / W
        entropy = sum_n w_n H_n / W,  H_n = -sum_k p_nk log p_nk.

    The entropy of the mean probabilities, which a loss wants high, is a function of K numbers; the
    mean entropy, which it wants low, is the other output. The probabilities are computed in
    pieces; the gradient computes them again from two numbers saved per vector. With g and e the
    gradients of the two outputs,

        dL/dl_nk = w_n / (W temperature) p_nk [(g_k - sum_j p_nj g_j) - e (log p_nk + H_n)],

    and it continues to x and the codebook by the metric.

    Args:
        x: vectors, ``(..., D)``, or ``(H, ..., D)`` when ``codebook`` has heads. Any strides;
            float16, bfloat16, float32 or float64.
        codebook: codes, ``(K, D)`` or ``(H, K, D)``; its dtype may differ from x's.
        temperature: from 1e-30 to infinity, both ends excluded.
        metric: the logits l. ``"euclidean"``: minus the squared distance. ``"distance"``: minus
            the distance, or minus 1e-4 where that is less, without a gradient there.
            ``"cosine"``: the cosine similarity, 0 (without a gradient) where a vector is zero.
            ``"dot"``: the inner product.
        weights: ``x.shape[:-1]``, of the vectors, not negative; bool for a mask, or floating. A
            vector of weight 0 counts for nothing, whatever is in it. No gradient.
        batch_dims: so many of x's leading dimensions (behind H) keep statistics of their own:
            ``(*batch, ..., D)`` gives means over ``...`` only.

    Returns:
        :class:`SoftAssignmentStatistics`, float64 if x or the codebook is, else float32. Zeros
        where no vectors, or a total weight of 0, are averaged. A number that is not finite makes
        NaN of what it takes part in: in a vector, the means over it; in a code, those of the head.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices, ``metric``, ``temperature`` or ``batch_dims`` do not fit.

    Source: Yu et al., "Language Model Beats Diffusion -- Tokenizer is Key to Visual Generation"
    (2023), eq. 4, for the losses; Dao et al., "FlashAttention" (2022), sec. 3.1, for probabilities
    that are computed again.
    """
    check_floating("x", x)
    check_floating("codebook", codebook)
    check_device(x=x, codebook=codebook)
    check_codebook(x, codebook)
    check_choice("metric", metric, METRICS)
    if not _LEAST_TEMPERATURE < temperature < math.inf:
        raise ValueError(
            f"temperature must be above {_LEAST_TEMPERATURE:g} and finite, got {temperature}"
        )
    most = x.dim() - codebook.dim() + 1
    if not 0 <= batch_dims <= most:
        raise ValueError(
            f"batch_dims must be from 0 to {most} for x of shape {tuple(x.shape)}, got {batch_dims}"
        )
    if weights is not None:
        check_dtype("weights", weights, (torch.bool, *FLOATING))
        check_device(x=x, weights=weights)
        if weights.shape != x.shape[:-1]:
            raise ValueError(
                f"weights must have shape {tuple(x.shape[:-1])}, got {tuple(weights.shape)}"
            )
        weights = weights.detach().to(output_dtype(x, codebook))
    result = backends.call(OP, x, codebook, weights, float(temperature), metric, batch_dims)
    return SoftAssignmentStatistics(*result[:2])


def _batch(x: Tensor, codebook: Tensor, batch_dims: int) -> torch.Size:
    """Sizes of heads and batch dimensions."""
    return x.shape[: codebook.dim() - 2 + batch_dims]


class _Group(NamedTuple):
    """Vectors that are averaged, and the codes of their head, in float64; the metric is that of
    x and codes less ``centre``, which changes no probability and keeps a common offset out of the
    rounding."""

    head: int
    group: int  # within the head
    x: Tensor  # [N, D], centred or normalised as the metric wants it
    codes: Tensor  # [K, D], likewise
    per_x: Tensor  # [N, 1], and [K, 1]: what vectors and codes were multiplied with
    per_code: Tensor
    weights: Tensor  # [N, 1], with the sum 1, or zeros

    def logits(self, rows: slice, metric: str) -> Tensor:
        """[n, K], but for terms that all codes share."""
        products = self.x[rows] @ self.codes.T
        squares = self.codes.square().sum(1)  # [K]
        if metric == "euclidean":
            return 2 * products - squares
        if metric == "distance":
            square = self.x[rows].square().sum(1, keepdim=True) + squares - 2 * products
            return -square.clamp_min(LEAST_SQUARE).sqrt()
        return products

    def pieces(self) -> list[slice]:
        """Of the rows, that need a bounded workspace."""
        step = max(1, _WORKSPACE // self.codes.shape[0])
        return [slice(i, i + step) for i in range(0, self.x.shape[0], step)]


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of norm 1, or zeros, and what they were multiplied with."""
    norm = x.norm(dim=-1, keepdim=True)
    factor = torch.where(norm == 0, 0, 1 / norm)
    return x * factor, factor


def _groups(
    x: Tensor, codebook: Tensor, weights: Tensor | None, metric: str, batch_dims: int
) -> Iterator[_Group]:
    heads = codebook.shape[0] if codebook.dim() == 3 else 1
    lead = _batch(x, codebook, batch_dims)
    count = x.shape[len(lead) : -1].numel()
    each = x.reshape(heads, lead.numel() // max(heads, 1), count, x.shape[-1])  # [H, G, N, D]
    all_weights = x.new_ones(x.shape[:-1]) if weights is None else weights
    all_weights = all_weights.double().reshape(each.shape[:3])  # [H, G, N]
    for head in range(heads):
        codes = (codebook[head] if codebook.dim() == 3 else codebook).double()  # [K, D]
        centre = torch.zeros_like(codes[0]) if metric == "cosine" else codes.mean(0)
        codes = codes - centre
        per_code = torch.ones_like(codes[:, :1])
        if metric == "cosine":
            codes, per_code = _unit(codes)
        for group in range(each.shape[1]):
            rows = each[head, group].double()  # [N, D]
            per_x = torch.ones_like(rows[:, :1])
            if metric == "cosine":
                rows, per_x = _unit(rows)
            elif metric != "dot":
                rows = rows - centre
            weight = all_weights[head, group][:, None]
            total = weight.sum()
            weight = torch.where(total == 0, 0, weight / total)
            yield _Group(head, group, rows, codes, per_x, per_code, weight)


def reference(
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    temperature: float,
    metric: str,
    batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification.

    The third output, ``(..., 2)``, is what the gradient needs of each vector: the largest logit,
    without terms that all codes share (that is, for ``"euclidean"`` 2 x' c' - |c'|^2 and for
    ``"dot"`` x c', with x' and c' less the mean of the codes), and the logarithm of the sum of the
    exponentials of the logits less that one, over the temperature. Zeros where the weight is 0, NaN
    where the sum is.
    """
    means, entropy, saved = fake(x, codebook, weights, temperature, metric, batch_dims)
    mean_of = means.view(means.numel() // means.shape[-1], means.shape[-1])  # [H G, K]
    saved_of = saved.view(mean_of.shape[0], saved.numel() // max(2 * mean_of.shape[0], 1), 2)
    for i, group in enumerate(_groups(x, codebook, weights, metric, batch_dims)):
        total = group.codes.new_zeros(group.codes.shape[0])  # [K]
        entropies = group.codes.new_zeros(())
        for rows in group.pieces():
            logits = group.logits(rows, metric)  # [n, K]
            largest = logits.amax(1, keepdim=True)  # [n, 1]
            log = (logits - largest) / temperature
            log_sum = log.exp().sum(1, keepdim=True).log()
            log = log - log_sum
            p = log.exp()  # [n, K]
            weight = group.weights[rows]  # [n, 1]
            total += torch.where(weight == 0, 0, weight * p).sum(0)
            terms = -torch.where(p == 0, 0, p * log).sum(1, keepdim=True)
            entropies += torch.where(weight == 0, 0, weight * terms).sum()
            largest = torch.where(log_sum.isnan(), torch.nan, largest)
            both = torch.cat((largest, log_sum), 1)
            saved_of[i, rows] = torch.where(weight == 0, 0, both).to(saved.dtype)
        mean_of[i] = total
        entropy.view(-1)[i] = entropies
    return means, entropy, saved


def fake(
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    temperature: float,
    metric: str,
    batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs without values."""
    dtype, lead = output_dtype(x, codebook), _batch(x, codebook, batch_dims)
    return (
        x.new_empty((*lead, codebook.shape[-2]), dtype=dtype),
        x.new_empty(lead, dtype=dtype),
        x.new_empty((*x.shape[:-1], 2), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, weights, *ctx.options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, codebook, weights, output[2])


def _gradients(
    ctx: Any, means: Tensor | None, entropy: Tensor | None, saved: None
) -> tuple[Tensor | None, ...]:
    need_x, need_codebook, *_ = ctx.needs_input_grad
    grad_x, grad_codebook = backends.call(
        BACKWARD, means, entropy, *ctx.saved_tensors, *ctx.options, need_x, need_codebook
    )
    return (
        grad_x if need_x else None,
        grad_codebook if need_codebook else None,
        *(None,) * (1 + len(ctx.options)),
    )


def reference_bwd(
    means: Tensor | None,
    entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    saved: Tensor,
    temperature: float,
    metric: str,
    batch_dims: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the codebook; no elements where not needed.

    Args:
        means, entropy: gradients of these outputs, None for zeros.
        saved: the forward's third output. The specification computes it again.
    """
    grads = fake_bwd(
        means, entropy, x, codebook, weights, saved, temperature, metric, batch_dims,
        need_x, need_codebook,
    )  # fmt: skip
    found = _through(means, entropy, x, codebook, weights, temperature, metric, batch_dims, False)
    for grad, value, needed in zip(grads, found, (need_x, need_codebook), strict=True):
        if needed:
            grad.copy_(value)
    return grads


def _through(
    means: Tensor | None,
    entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    temperature: float,
    metric: str,
    batch_dims: int,
    sizes: bool,
) -> tuple[Tensor, Tensor]:
    """Both gradients in float64, of the inputs' shapes; with ``sizes`` instead the sums of the
    absolute values of their terms, to which rounding is relative."""
    grad_x = x.new_zeros(x.shape, dtype=torch.float64)
    grad_codebook = codebook.new_zeros(codebook.shape, dtype=torch.float64)
    lead = _batch(x, codebook, batch_dims).numel()  # H G
    each_x = grad_x.view(lead, x.numel() // max(lead * x.shape[-1], 1), x.shape[-1])
    each_codebook = grad_codebook if codebook.dim() == 3 else grad_codebook[None]

    def less(a: Tensor, b: Tensor) -> Tensor:
        return a + b if sizes else a - b

    def size(a: Tensor) -> Tensor:
        return a.abs() if sizes else a

    for i, group in enumerate(_groups(x, codebook, weights, metric, batch_dims)):
        g = e = group.codes.new_zeros(())
        if means is not None:
            g = size(means.double().reshape(lead, -1)[i])  # [K]
        if entropy is not None:
            e = size(entropy.double().reshape(-1)[i])
        codes = size(group.codes)  # [K, D]
        to_codes = torch.zeros_like(codes)
        for rows in group.pieces():
            weight = group.weights[rows]  # [n, 1]
            a = torch.where(weight == 0, 0, size(group.x[rows]))  # [n, D]
            logits = group.logits(rows, metric)  # [n, K]
            log = (logits / temperature).log_softmax(1)
            p = log.exp()
            log = torch.where(p == 0, 0, log)
            own = -(p * log).sum(1, keepdim=True)  # [n, 1], the entropy
            of_means = less(g, (p * g).sum(1, keepdim=True))
            q = p * less(of_means, e * (less(-log, own) if sizes else log + own)) / temperature
            q = torch.where(weight == 0, 0, weight * q)  # [n, K], gradients of the logits
            # Of a squared distance the gradient is -2 q (x - c), of a distance -q (x - c) over it.
            if metric == "euclidean":
                q = 2 * q
            elif metric == "distance":
                q = torch.where(logits < -math.sqrt(LEAST_SQUARE), q / -logits, 0 * q)
            to_x = q @ codes
            to_codes += q.T @ a
            if metric in ("euclidean", "distance"):
                to_x = less(to_x, q.sum(1, keepdim=True) * a)
                to_codes = less(to_codes, q.sum(0)[:, None] * codes)
            if metric == "cosine":
                to_x = _through_norm(to_x, a, group.per_x[rows], sizes)
            each_x[i, rows] = torch.where(weight == 0, 0, to_x)
        if metric == "cosine":
            to_codes = _through_norm(to_codes, codes, group.per_code, sizes)
        each_codebook[group.head] += to_codes
    return grad_x, grad_codebook


def _through_norm(grad: Tensor, unit: Tensor, factor: Tensor, sizes: bool) -> Tensor:
    """From the gradient of a vector of norm 1 to that of the one it was made of."""
    along = (grad * unit).sum(1, keepdim=True) * unit
    return factor * (grad + along if sizes else grad - along)


def fake_bwd(
    means: Tensor | None,
    entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    saved: Tensor,
    temperature: float,
    metric: str,
    batch_dims: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    return (
        x.new_empty(x.shape if need_x else (0,)),
        codebook.new_empty(codebook.shape if need_codebook else (0,)),
    )


def cost(
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    temperature: float,
    metric: str,
    batch_dims: int,
) -> Cost:
    """Inputs read once, outputs written once; of each pair a product over D, and an exponential."""
    outputs = fake(x, codebook, weights, temperature, metric, batch_dims)
    moved = x.nbytes + codebook.nbytes + sum(t.nbytes for t in outputs)
    moved += 0 if weights is None else weights.nbytes
    return Cost(bytes=moved, flops=_operations(x, codebook, 1))


def _operations(x: Tensor, codebook: Tensor, products: int) -> int:
    """So many products over D of each pair, and its exponential, with the sums over it."""
    pairs = x.shape[:-1].numel() * codebook.shape[-2]
    return pairs * (2 * products * x.shape[-1] + 24)


def cost_bwd(
    means: Tensor | None,
    entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    weights: Tensor | None,
    saved: Tensor,
    temperature: float,
    metric: str,
    batch_dims: int,
    need_x: bool,
    need_codebook: bool,
) -> Cost:
    """Inputs read once, gradients written once; the product of each pair again, and one for each
    of the two gradients."""
    given = (means, entropy, x, codebook, weights, saved)
    moved = sum(t.nbytes for t in given if t is not None)
    moved += x.nbytes * need_x + codebook.nbytes * need_codebook
    return Cost(bytes=moved, flops=_operations(x, codebook, 1 + need_x + need_codebook))


def _logit_error(
    x: Tensor, codebook: Tensor, metric: str, batch_dims: int
) -> tuple[Tensor, Tensor]:
    """Bounds of the rounding of logits and, relative to it, of the inverse of a distance, each for
    all: float64 and ()."""
    dtype = output_dtype(x, codebook)
    unit = (8 + math.sqrt(x.shape[-1])) * torch.finfo(dtype).eps
    zero = x.new_zeros((), dtype=torch.float64)
    error, of_inverse = zero, zero
    if x.numel() == 0:
        return zero, zero
    for head, _, vectors, codes, *_ in _groups(x, codebook, None, metric, batch_dims):
        own = (codebook[head] if codebook.dim() == 3 else codebook).double()
        # Half precisions are multiplied as they are, without centring.
        half = torch.finfo(x.dtype).bits == 16
        offset = own.mean(0).norm() if half and metric != "cosine" else zero
        a = vectors.nan_to_num(0, 0, 0).norm(dim=1).amax() + (offset if metric != "dot" else 0)
        c = codes.nan_to_num(0, 0, 0).norm(dim=1).amax() + offset
        if metric == "cosine":
            new = zero + unit
        elif metric == "dot":
            new = unit * a * c
        else:
            new = unit * (a + c).square()
        if metric == "distance":
            least = torch.cdist(vectors, codes).nan_to_num(0, 0, 0).amin().clamp_min(1e-4)
            of_inverse = torch.maximum(of_inverse, new / least.square())
            new = torch.minimum(new / least, new.sqrt())
        error = torch.maximum(error, new)
    return error, of_inverse


def _described(got: Tensor, want: Tensor) -> str:
    return f"{got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"


def _differ(got: Tensor, want: Tensor, tolerance: Tensor) -> int:
    same = ((got.double() - want.double()).abs() <= tolerance) | (got == want)
    return int((~(same | (got.isnan() & want.isnan()))).sum())


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """A logit's rounding error is relative to the norms of what is multiplied for it; that of a
    probability to the probability and its logit's error, that of an entropy to both. The public
    function returns the first two."""
    x, codebook, _, temperature, metric, batch_dims = arguments
    means, entropy, saved = expected or reference(*arguments)
    logit, _ = _logit_error(x, codebook, metric, batch_dims)
    relative = 2 * logit / temperature + 64 * torch.finfo(means.dtype).eps  # of a probability
    relative = relative.clamp_max(20)
    choices = 2 + 2 * math.log(codebook.shape[-2])
    largest = 8 * torch.finfo(saved.dtype).eps * saved.double().abs() + 2 * logit
    tolerances = (
        means.double() * relative.expm1() + 1e-35,
        relative * choices,
        torch.stack((largest[..., 0], relative.expand(saved.shape[:-1]) * choices), -1),
    )
    complaints = []
    names = ("mean probabilities", "entropies", "normalisers")
    for name, got, want, tolerance in zip(
        names, result, (means, entropy, saved), tolerances, strict=len(result) != 2
    ):
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            complaints.append(f"{name}: {_described(got, want)}")
        elif wrong := _differ(got, want, tolerance):
            complaints.append(f"{wrong} of {got.numel()} {name} differ from the reference")
    return complaints


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Rounding errors are relative to the sums of the gradients' absolute terms."""
    means, entropy, x, codebook, weights, _, temperature, metric, batch_dims, *_ = arguments
    expected = expected or reference_bwd(*arguments)
    logit, of_inverse = _logit_error(x, codebook, metric, batch_dims)
    sizes = _through(means, entropy, x, codebook, weights, temperature, metric, batch_dims, True)
    relative = (4 * logit / temperature).clamp_max(20).expm1() + of_inverse
    complaints = []
    for name, got, want, size in zip(("x", "codebook"), result, expected, sizes, strict=True):
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            complaints.append(f"{name}: {_described(got, want)}")
            continue
        if not got.numel():
            continue
        info = torch.finfo(got.dtype)
        # Half precisions may round what they multiply.
        unit = 4 * info.eps if info.bits == 16 else 64 * info.eps
        least = info.smallest_normal + 1e-30 * size.nan_to_num(0, 0, 0).amax()
        tolerance = (relative + unit) * size.nan_to_num(0, 0, 0) + least
        if wrong := _differ(got, want, tolerance):
            complaints.append(f"{wrong} of {got.numel()} gradients of {name} differ")
    return complaints


def _sample(
    n: int,
    k: int,
    d: int,
    metric: str = "euclidean",
    temperature: float = 1.0,
    heads: int = 0,
    batch: int = 0,
    weighted: bool = False,
    offset: float = 0.0,
) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        lead = (heads,) if heads else ()
        rows = (*lead, batch, n) if batch else (*lead, n)
        x = (torch.randn(*rows, d, generator=generator) + offset).to(device, dtype)
        codebook = (torch.randn(*lead, k, d, generator=generator) + offset).to(device, dtype)
        weights = None
        if weighted:
            weights = torch.rand(rows, generator=generator).sub(0.3).clamp_min(0)
            weights = weights.to(device, output_dtype(x, codebook))
        return x, codebook, weights, temperature, metric, int(batch > 0)

    name = f"{f'h{heads}_' if heads else ''}{f'b{batch}_' if batch else ''}n{n}_k{k}_d{d}_{metric}"
    name += f"{'_weighted' * weighted}{f'_offset{offset:g}' if offset else ''}"
    shape = {"N": n, "K": k, "D": d, "H": heads or 1, "B": batch or 1}
    return Sample(name, make, shape, bench=n >= 4096)


def samples() -> Iterable[Sample]:
    """Shapes of the field (``bench``) and odd ones."""
    yield _sample(16384, 1024, 64, temperature=20.0)
    yield _sample(16384, 8192, 32, temperature=10.0)
    yield _sample(0, 5, 3)
    yield _sample(1, 1, 1, "distance")
    yield _sample(33, 65, 7, "dot")
    yield _sample(63, 129, 33, temperature=5.0, offset=100.0)
    yield _sample(65, 37, 20, "distance", 0.1, weighted=True)
    yield _sample(35, 33, 5, "dot", 2.0, heads=3, weighted=True)
    yield _sample(5, 70, 6, "cosine", 0.05, heads=2, batch=3)
    yield _sample(41, 40, 72, temperature=8.0, batch=2)


def samples_bwd() -> Iterable[Sample]:
    """Gradients of the forward's samples."""

    def of(sample: Sample, need_x: bool, need_codebook: bool) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            x, codebook, weights, *options = sample.make(device, dtype, seed)
            # A long forward gains nothing from the specification.
            call = backends.call if sample.bench else (lambda op, *given: reference(*given))
            means, entropy, saved = call(OP, x, codebook, weights, *options)
            generator = torch.Generator().manual_seed(seed + 1)
            grads = [torch.randn(t.shape, generator=generator).to(t) for t in (means, entropy)]
            return *grads, x, codebook, weights, saved, *options, need_x, need_codebook

        name = f"{sample.name}{'_x' * (not need_codebook)}{'_codebook' * (not need_x)}"
        return Sample(name, make, sample.shape, sample.bench)

    for sample in samples():
        yield of(sample, True, True)
    some = _sample(34, 9, 5, "distance", heads=2)
    yield of(some, True, False)
    yield of(some, False, True)


def _load_triton() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.soft_assignment_statistics import soft_assignment_statistics as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.soft_assignment_statistics import soft_assignment_statistics_bwd as launch

    return launch


OP = register(
    Op(
        name="soft_assignment_statistics",
        schema="(Tensor x, Tensor codebook, Tensor? weights, float temperature, str metric, "
        "int batch_dims) -> (Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("soft_assignment_statistics"),
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
        name="soft_assignment_statistics_bwd",
        schema="(Tensor? means, Tensor? entropy, Tensor x, Tensor codebook, Tensor? weights, "
        "Tensor saved, float temperature, str metric, int batch_dims, bool need_x, "
        "bool need_codebook) -> (Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("soft_assignment_statistics_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
