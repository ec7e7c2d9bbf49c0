"""Counts and sums of the vectors assigned to each code."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, INDEX, check_device, check_dtype, check_floating, check_least
from mmfast.registry import Arguments, Cost, Op, Sample, register


def code_statistics(
    x: Tensor, indices: Tensor, num_codes: int, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many vectors each code has, and their sum: the segment sums of k-means and EMA.

    Deterministic: the same inputs give the same bits for any thread count, and no atomics whose
    order matters are used.

    Args:
        x: vectors, ``(N, D)``, or ``(H, N, D)`` with heads; float16, bfloat16, float32, float64.
            Any strides.
        indices: the code of each vector, ``(N,)`` or ``(H, N)``, int64 or int32. A vector whose
            index is outside ``[0, num_codes)`` is left out (-1 masks a vector).
        num_codes: K >= 1.
        weights: ``(N,)`` or ``(H, N)``, any of the four dtypes; 1 where absent.

    Returns:
        ``(counts, sums)``: ``(K,)`` and ``(K, D)``, or with leading ``H``. float64 if any of ``x``
        and ``weights`` is, else float32. ``counts[k]`` is the sum of the weights of the vectors of
        code k, ``sums[k]`` that of their weighted vectors. Not differentiable.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or ``num_codes`` do not fit.
    """
    check_floating("x", x)
    check_dtype("indices", indices, INDEX)
    tensors = {"x": x, "indices": indices}
    if weights is not None:
        check_floating("weights", weights)
        tensors["weights"] = weights
    check_device(**tensors)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be (N, D) or (H, N, D), got shape {tuple(x.shape)}")
    for name, tensor in tensors.items():
        if name != "x" and tensor.shape != x.shape[:-1]:
            raise ValueError(
                f"{name} must have x's leading shape {tuple(x.shape[:-1])}, "
                f"got shape {tuple(tensor.shape)}"
            )
    check_least(1, num_codes=num_codes)
    return backends.call(OP, x, indices, num_codes, weights)


def output_dtype(x: Tensor, weights: Tensor | None) -> torch.dtype:
    """dtype of counts and sums."""
    wide = x.dtype == torch.float64 or (weights is not None and weights.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def reference(
    x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification: index_add in float64, rounded once at the end."""
    if x.dim() == 3:
        each = [
            reference(x[h], indices[h], num_codes, None if weights is None else weights[h])
            for h in range(x.shape[0])
        ]
        if not each:
            return fake(x, indices, num_codes, weights)
        return torch.stack([c for c, _ in each]), torch.stack([s for _, s in each])
    dtype = output_dtype(x, weights)
    ones = x.new_ones(x.shape[0], dtype=torch.float64)
    weight = ones if weights is None else weights.double()  # [N]
    # Out-of-range indices land in an extra code, which is dropped.
    inside = (indices >= 0) & (indices < num_codes)
    slot = torch.where(inside, indices, num_codes).long()  # [N]
    counts = weight.new_zeros(num_codes + 1).index_add_(0, slot, weight)  # [K + 1]
    weighted = x.double() * weight[:, None]  # [N, D]
    sums = weighted.new_zeros(num_codes + 1, x.shape[1]).index_add_(0, slot, weighted)  # [K + 1, D]
    return counts[:num_codes].to(dtype), sums[:num_codes].to(dtype)


def fake(
    x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    dtype = output_dtype(x, weights)
    lead = x.shape[:-2]
    return (
        x.new_empty((*lead, num_codes), dtype=dtype),
        x.new_empty((*lead, num_codes, x.shape[-1]), dtype=dtype),
    )


def cost(x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None) -> Cost:
    """Inputs read once, outputs written once; one add per element of x."""
    heads = x.shape[:-2].numel()
    written = heads * num_codes * (1 + x.shape[-1]) * output_dtype(x, weights).itemsize
    moved = x.nbytes + indices.nbytes + written + (weights.nbytes if weights is not None else 0)
    return Cost(bytes=moved, flops=x.numel() * (1 if weights is None else 2))


def compare(
    result: tuple[Tensor, Tensor],
    arguments: Arguments,
    expected: tuple[Tensor, Tensor] | None = None,
) -> list[str]:
    """Sums must be within the rounding of a float32 (float64) accumulation of the reference's."""
    x, indices, num_codes, weights = arguments
    expected = expected or reference(*arguments)
    absolute = reference(x.abs(), indices, num_codes, None if weights is None else weights.abs())
    complaints = []
    for name, got, want, size in zip(("counts", "sums"), result, expected, absolute, strict=True):
        if got.dtype != want.dtype or got.shape != want.shape:
            complaints.append(
                f"{name} are {got.dtype} {tuple(got.shape)}, "
                f"expected {want.dtype} {tuple(want.shape)}"
            )
            continue
        tolerance = 16 * torch.finfo(got.dtype).eps * size
        same = ((got - want).abs() <= tolerance) | (got == want) | (got.isnan() & want.isnan())
        if not bool(same.all()):
            complaints.append(f"{int((~same).sum())} {name} differ from the reference")
    return complaints


def _uniform(n: int, k: int, d: int, heads: int = 0, weighted: bool = False) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        lead = (heads,) if heads else ()
        x = torch.randn(*lead, n, d, generator=generator).to(device, dtype)
        indices = torch.randint(k, (*lead, n), generator=generator).to(device)
        weights = torch.rand(*lead, n, generator=generator).to(device, dtype) if weighted else None
        return x, indices, k, weights

    name = f"{f'h{heads}_' if heads else ''}n{n}_k{k}_d{d}{'_weighted' if weighted else ''}"
    return Sample(name, make, {"N": n, "K": k, "D": d, "H": heads or 1}, bench=n >= 4096)


def samples() -> Iterable[Sample]:
    """Shapes of the field (``bench``) and odd ones."""
    yield _uniform(65536, 1024, 64)
    yield _uniform(65536, 8192, 32)
    yield _uniform(16384, 16384, 256)
    for n, k, d in ((0, 5, 3), (1, 1, 1), (7, 3, 1), (33, 65, 7), (300, 17, 33)):
        yield _uniform(n, k, d)
    yield _uniform(63, 9, 33, weighted=True)
    yield _uniform(65, 7, 5, heads=3, weighted=True)


def _load_triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from mmfast.kernels.code_statistics import code_statistics as launch

    return launch


OP = register(
    Op(
        name="code_statistics",
        schema="(Tensor x, Tensor indices, SymInt num_codes, Tensor? weights) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("code_statistics"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
    )
)
