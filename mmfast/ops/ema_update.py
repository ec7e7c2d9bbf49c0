"""The exponential moving averages that a codebook follows instead of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_device, check_floating
from mmfast.ops.code_statistics import code_statistics
from mmfast.regions import without_gradients
from mmfast.registry import Arguments, Cost, Op, Sample, register

_LEAST_NORM = 1e-6  # of a normalised code's division


@torch.no_grad()
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float = 0.8,
    eps: float = 1e-5,
    weights: Tensor | None = None,
    normalize: bool = False,
) -> None:
    """Move a codebook towards the vectors that chose its codes, in place.

    ``cluster_size`` and ``embed_sum`` decay towards the counts and sums of this batch; a code is
    its sum over its size, with the sizes smoothed so that no code divides by zero.

    Args:
        codebook: ``(K, D)`` or ``(H, K, D)``. Changed, and must share memory with no other
            argument that is.
        cluster_size: ``(K,)`` or ``(H, K)``. Changed.
        embed_sum: as ``codebook``. Changed.
        x: the batch's vectors, ``(N, D)`` or ``(H, N, D)``.
        indices: their codes, ``(N,)`` or ``(H, N)``; those outside [0, K) are left out.
        decay: what remains of the old averages, 0 to 1.
        eps: of the smoothing (cluster_size + eps) / (total + K eps) total.
        weights: of the vectors, ``(N,)`` or ``(H, N)``.
        normalize: give the codes unit norm, for the cosine metric.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or ``decay`` do not fit.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), appendix A.1;
    Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (2019) for the
    smoothing.
    """
    check_floating("codebook", codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be (K, D) or (H, K, D), got shape {tuple(codebook.shape)}")
    counts, sums = code_statistics(x, indices, codebook.shape[-2], weights=weights)
    ema_update_from_statistics_(
        codebook, cluster_size, embed_sum, counts, sums, decay=decay, eps=eps, normalize=normalize
    )


@without_gradients
def ema_update_from_statistics_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float = 0.8,
    eps: float = 1e-5,
    normalize: bool = False,
) -> None:
    """:func:`ema_update_` from the batch's counts and sums, which ranks may have added up.

    Args:
        counts: ``(K,)`` or ``(H, K)``. sums: as ``codebook``. The others: see there.
    """
    tensors = {
        "codebook": codebook,
        "cluster_size": cluster_size,
        "embed_sum": embed_sum,
        "counts": counts,
        "sums": sums,
    }
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        expected = (
            codebook.shape if name in ("codebook", "embed_sum", "sums") else codebook.shape[:-1]
        )
        if codebook.dim() not in (2, 3) or tensor.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")
    check_device(**tensors)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be from 0 to 1, got {decay}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    backends.call(
        OP, codebook, cluster_size, embed_sum, counts, sums, float(decay), float(eps), normalize
    )


def reference(
    codebook: Tensor,  # [..., K, D]
    cluster_size: Tensor,  # [..., K]
    embed_sum: Tensor,  # [..., K, D]
    counts: Tensor,  # [..., K]
    sums: Tensor,  # [..., K, D]
    decay: float,
    eps: float,
    normalize: bool,
) -> None:
    """The specification, in float64 throughout."""
    size = torch.lerp(counts.double(), cluster_size.double(), decay)
    total_sum = torch.lerp(sums.double(), embed_sum.double(), decay)
    total = size.sum(-1, keepdim=True)
    codebook.copy_(codes_of(codebook, size, total_sum, total, size.shape[-1], eps, normalize))
    cluster_size.copy_(size)
    embed_sum.copy_(total_sum)


def codes_of(
    codebook: Tensor,
    size: Tensor,
    total_sum: Tensor,
    total: Tensor,
    num_codes: int,
    eps: float,
    normalize: bool,
) -> Tensor:
    """The codes (..., P, D), P of the ``num_codes`` K, that averages in float64 say.

    Args:
        codebook: the old ones. size: ``(..., P)``. total_sum: ``(..., P, D)``.
        total: ``(..., 1)``, of the sizes of all K.
    """
    smooth = (size + eps) / (total + num_codes * eps) * total
    # Nothing was ever counted: the codes stay.
    codes = torch.where(total[..., None] > 0, total_sum / smooth[..., None], codebook.double())
    if normalize:
        codes = torch.nn.functional.normalize(codes, dim=-1, eps=_LEAST_NORM)
    return codes.to(codebook.dtype)


def fake(*_: object) -> None:
    """There is no output: arguments change."""


def cost(codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, *_: object) -> Cost:
    """Averages and statistics read once, averages and codes written once."""
    moved = 3 * embed_sum.nbytes + codebook.nbytes + 3 * cluster_size.nbytes
    return Cost(bytes=moved, flops=4 * codebook.numel())


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Within rounding of the reference, relative to the largest term."""
    expected = expected or OP.result(reference, arguments)
    complaints = []
    names = ("codebook", "cluster_size", "embed_sum")
    for name, got, want in zip(names, result, expected, strict=True):
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            complaints.append(f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype}")
            continue
        rounding = 16 * torch.finfo(got.dtype).eps
        # Old and new may cancel.
        largest = float(want.abs().nan_to_num(0, 0, 0).amax()) if want.numel() else 0.0
        if not torch.allclose(got, want, rtol=rounding, atol=rounding * largest, equal_nan=True):
            complaints.append(f"{name} differs from the reference")
    return complaints


def samples() -> Iterable[Sample]:
    """Codebooks of the field (``bench``) and odd ones."""

    def of(k: int, d: int, heads: int = 0, normalize: bool = False) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            generator = torch.Generator().manual_seed(seed)
            lead = (heads,) if heads else ()
            codes, sums, new = (torch.randn(*lead, k, d, generator=generator) for _ in range(3))
            size, counts = (torch.rand(*lead, k, generator=generator) * 9 for _ in range(2))
            tensors = (t.to(device, dtype) for t in (codes, size, sums, counts, new))
            return *tensors, 0.8, 1e-5, normalize

        # What it goes through are the codes.
        name = f"{f'h{heads}_' if heads else ''}k{k}_d{d}{'_normalize' * normalize}"
        return Sample(name, make, {"N": k, "K": k, "D": d, "H": heads or 1}, bench=k >= 4096)

    yield of(8192, 32)
    yield of(16384, 256)
    for k, d in ((1, 1), (5, 3), (65, 33)):
        yield of(k, d)
    yield of(7, 5, heads=3)
    yield of(17, 19, heads=2, normalize=True)


def _load_triton() -> Callable[..., None]:
    from mmfast.kernels.ema_update import ema_update as launch

    return launch


OP = register(
    Op(
        name="ema_update",
        schema="(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, "
        "Tensor counts, Tensor sums, float decay, float eps, bool normalize) -> ()",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("ema_update"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        mutates=(0, 1, 2),
    )
)
