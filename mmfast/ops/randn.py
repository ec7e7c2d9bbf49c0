"""Normal random numbers that depend on a seed, an offset and the element, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mmfast import backends, philox
from mmfast.checks import FLOATING, check_integer
from mmfast.registry import Arguments, Cost, Op, Sample, register


def randn(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers, the same on every backend and whatever else is in the batch.

    An element is a function of the seed, the offset and its own index, counted row-major within its
    sample. With one number for both ``seed`` and ``offset`` the whole shape is a single sample: a
    longer first dimension appends to what a shorter one gives. If either has one number per
    sample, each sample counts from 0: row b of the result is
    ``randn((1, *shape[1:]), seed=seed[b], offset=offset[b])[0]``.

    Args:
        shape: of the result; its first dimension is B.
        seed: an int of at most 64 bits, or an int64 tensor of shape ``()`` or ``(B,)``, which is
            read where it lives: nothing is synchronised.
        offset: likewise; the steps of a sampler, say. Other offsets give independent numbers.
        dtype: float32, float16, bfloat16 or float64.
        device: of the result; that of a tensor among ``seed`` and ``offset``, else the CPU.

    Returns:
        The numbers, without gradient: float32 within 4 units of the last place of those that
        float64 arithmetic gives for the same 32 bits, the half precisions those rounded, float64
        from the same uniform numbers. ``mmfast/philox.py`` is the definition.

    Raises:
        TypeError: ``seed`` or ``offset`` is no int and no int64 tensor, ``shape`` no sequence of
            ints, or ``dtype`` another one.
        ValueError: shapes or devices do not fit.

    Source: Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011);
    Box and Muller, "A note on the generation of random normal deviates" (1958).
    """
    if dtype not in FLOATING:
        got = str(dtype).removeprefix("torch.")
        raise TypeError(f"dtype must be float32, float16, bfloat16, float64, got {got}")
    seed, offset = philox.streams(seed, offset, device)
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of ints, got {type(shape).__name__}")
    shape = list(shape)
    for size in shape:
        check_integer("a size of shape", size)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must have no negative size, got {shape}")
    for name, stream in (("seed", seed), ("offset", offset)):
        if stream.dim() and list(stream.shape) != shape[:1]:
            raise ValueError(
                f"{name} must be of shape () or (B,) with the shape's B = "
                f"{shape[0] if shape else 'none'}, got {tuple(stream.shape)}"
            )
    return backends.call(OP, seed, offset, shape, dtype)


def reference(seed: Tensor, offset: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The specification: normals in float64, rounded to float32 on the way to half precisions."""
    seed, offset = torch.broadcast_tensors(seed, offset)
    result = fake(seed, offset, shape, dtype)
    total = result.numel()
    count = total // max(shape[0], 1) if seed.dim() else total
    return result.copy_(_rounded(philox.normals(seed, offset, count), dtype).view(shape))


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype == torch.float64 else values.float().to(dtype)


def fake(seed: Tensor, offset: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The output without values."""
    return seed.new_empty(shape, dtype=dtype)


def cost(seed: Tensor, offset: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Cost:
    """Outputs written once. Of the operations only Philox's products are counted, ten per number:
    the rest is bits."""
    total = torch.Size(shape).numel()
    return Cost(bytes=total * dtype.itemsize + seed.nbytes + offset.nbytes, flops=10 * total)


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Within 4 units of the last place of float32 (8 of float64), one more rounding for the half
    precisions."""
    want = reference(*arguments) if expected is None else expected
    if (result.dtype, result.shape) != (want.dtype, want.shape):
        return [f"{result.dtype} {tuple(result.shape)}, expected {want.dtype} {tuple(want.shape)}"]
    info = torch.finfo(want.dtype)
    units = {torch.float32: 4, torch.float64: 8}.get(want.dtype, 1)
    # Numbers below the smallest normal one differ by the last bit of those.
    tolerance = units * info.eps * want.double().abs() + info.smallest_normal * info.eps
    wrong = ~((result.double() - want.double()).abs() <= tolerance)
    return [f"{int(wrong.sum())} of {want.numel()} numbers are wrong"] if bool(wrong.any()) else []


def samples() -> Iterable[Sample]:
    """Latents of diffusion models (``bench``) and odd shapes."""

    def of(*shape: int, seeds: int = 0, offsets: int = 0, bench: bool = False) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            generator = torch.Generator().manual_seed(seed)
            most = torch.iinfo(torch.int64).max
            numbers = [
                torch.randint(-most, most, (n,) if n else (), generator=generator).to(device)
                for n in (seeds, offsets)
            ]
            return *numbers, list(shape), dtype

        name = "x".join(map(str, shape)) + "_seeds" * bool(seeds) + "_offsets" * bool(offsets)
        count = torch.Size(shape[1:]).numel()
        sizes = {"N": shape[0] * count, "K": shape[0], "D": count, "H": 1}
        return Sample(name, make, sizes, bench)

    yield of(1, 16, 21, 60, 104, bench=True)
    yield of(8, 4, 64, 64, seeds=8, bench=True)
    yield of(0, 3)
    yield of(2, 0, seeds=2)
    for n in (1, 2, 3, 5, 31, 33, 129, 1037):
        yield of(n)
    yield of(33, 5, 7)
    yield of(3, 5, 67, seeds=3)
    yield of(5, 1, 3, offsets=5)
    yield of(33, 47, seeds=33, offsets=33)


def _load_triton() -> Callable[..., Tensor]:
    from mmfast.kernels.randn import randn as launch

    return launch


OP = register(
    Op(
        name="randn",
        schema="(Tensor seed, Tensor offset, SymInt[] shape, ScalarType dtype) -> Tensor",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("randn"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
    )
)
