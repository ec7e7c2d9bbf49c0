"""Inputs that the tests share: where ops can run, strided views, hard data for nearest_code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmfast.backends import interpreting
from mmfast.registry import Op

METRICS = ("euclidean", "cosine", "dot")


def device_of(backend: str) -> torch.device:
    """Where the tests run ``backend``."""
    on_gpu = backend == "cuda" or (backend == "triton" and not interpreting())
    return torch.device("cuda" if on_gpu else "cpu")


def backends_here(op: Op) -> list[str]:
    """The backends that can serve ``op`` in this process, the reference first."""
    names = ["reference"]
    for name, backend in op.backends.items():
        on_gpu = device_of(name).type == "cuda"
        if not backend.missing() and (torch.cuda.is_available() or not on_gpu):
            names.append(name)
    return names


def samples_of_pytorch(
    name: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The inputs, positional and by name, that PyTorch tests its function ``name`` with.

    Skips the test where what PyTorch's tests need is not installed.
    """
    pytest.importorskip("expecttest", reason="PyTorch's own samples need it")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == name)
    for sample in info.sample_inputs(device, dtype, requires_grad=False):
        yield [sample.input, *sample.args], dict(sample.kwargs)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers; rounded from float64, so that every dtype gets the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _inside(t: Tensor, pad: int, step: int) -> Tensor:
    """A view equal to 2-D ``t``, in a buffer of NaN that must not be read."""
    n, d = t.shape
    buffer = t.new_full((n * step + pad, d * step + pad), torch.nan)
    view = buffer[pad : pad + n * step : step, pad : pad + d * step : step]
    view.copy_(t)
    return view


# Of a 2-D tensor, each with strides of its own. The expanded ones change the values.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "padded": lambda t: _inside(t, pad=3, step=1),
    "stepped": lambda t: _inside(t, pad=1, step=2),
    "one_row": lambda t: t[:1].expand(t.shape),
    "one_column": lambda t: t[:, :1].expand(t.shape),
    "one_number": lambda t: t[:1, :1].expand(t.shape),
}


def brute_force(
    x: Tensor, codebook: Tensor, metric: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition of nearest_code in numpy, over all pairs.

    Every sum runs over D in order, in float64. ``np.argmin`` takes the first NaN, else the first
    of equals, as the op promises.

    Returns:
        Indices, the float64 metric there, and the size of what was summed for it: the rounding
        of another order of summation is relative to that.
    """
    if codebook.dim() == 3:
        heads = [brute_force(a, b, metric) for a, b in zip(x, codebook, strict=True)]
        return tuple(np.stack(arrays) for arrays in zip(*heads, strict=True))
    a = x.cpu().double().reshape(-1, x.shape[-1]).numpy()
    b = codebook.cpu().double().numpy()
    # A few rows at a time, so that the sums stay in the cache.
    blocks = [_nearest(a[i : i + 64], b, metric) for i in range(0, len(a), 64)] or [((),) * 3]
    indices, best, size = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    lead = tuple(x.shape[:-1])
    return indices.astype(np.int64).reshape(lead), best.reshape(lead), size.reshape(lead)


def _nearest(a: np.ndarray, b: np.ndarray, metric: str) -> tuple[np.ndarray, ...]:
    """:func:`brute_force` of a few vectors."""
    total = np.zeros((len(a), len(b)))
    size = np.zeros(total.shape)
    term = np.empty(total.shape)
    with np.errstate(all="ignore"):
        for p, q in zip(a.T, b.T, strict=True):
            if metric == "euclidean":
                np.subtract(p[:, None], q, out=term)
                total += np.multiply(term, term, out=term)
            else:
                total -= np.multiply(p[:, None], q, out=term)
                size += np.abs(term, out=term)
        if metric == "euclidean":
            size = total
        elif metric == "cosine":
            norms = _norms(a)[:, None] * _norms(b)[None, :]
            total = np.where(norms == 0, np.abs(total) * 0, total / norms)
            size = np.ones(total.shape)
    indices = total.argmin(1)
    rows = np.arange(len(a))
    best = total[rows, indices]
    return indices, best if metric == "euclidean" else -best, size[rows, indices]


def _norms(rows: np.ndarray) -> np.ndarray:
    total = np.zeros(len(rows))
    for column in rows.T:
        total += column**2
    return np.sqrt(total)


def complaints(result: tuple[Tensor, Tensor], x: Tensor, codebook: Tensor, metric: str) -> str:
    """What :func:`brute_force` has against ``result``; empty when nothing."""
    indices, distances = result
    wide = torch.float64 in (x.dtype, codebook.dtype)
    dtype = torch.float64 if wide else torch.float32
    if indices.dtype != torch.int64 or distances.dtype != dtype:
        return f"dtypes are {indices.dtype} and {distances.dtype}"
    if indices.shape != x.shape[:-1] or distances.shape != x.shape[:-1]:
        return f"shapes are {tuple(indices.shape)} and {tuple(distances.shape)}"
    expected_indices, best, size = brute_force(x, codebook, metric)
    wrong = indices.cpu().numpy() != expected_indices
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        return (
            f"{wrong.sum()} of {wrong.size} indices are wrong; at {at} "
            f"{indices[at].item()}, expected {expected_indices[at]}"
        )
    got = distances.cpu().double().numpy()
    expected = torch.from_numpy(best).to(dtype).double().numpy()
    info = torch.finfo(dtype)
    with np.errstate(all="ignore"):
        # Summed in another order in float64, then rounded once to the output's dtype.
        tolerance = info.eps * np.abs(expected) + 2 * x.shape[-1] * 2.0**-52 * size
        tolerance += 2 * info.smallest_normal * info.eps
        same = (np.abs(got - expected) <= tolerance) | (got == expected)
    same |= np.isnan(got) & np.isnan(expected)
    if not same.all():
        at = tuple(np.argwhere(~same)[0])
        return f"{(~same).sum()} distances are wrong; at {at} {got[at]}, expected {expected[at]}"
    return ""
