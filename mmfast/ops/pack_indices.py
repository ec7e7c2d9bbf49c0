"""Indices as streams of as many bits as they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import INDEX, check_dtype
from mmfast.ops.unequal import unequal
from mmfast.registry import Arguments, Cost, Op, Sample, register

MOST_BITS = 32


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Write indices with ``bits`` bits each, without gaps.

    Bit j of index i is bit ``i * bits + j`` of the stream, and bit b of the stream is bit ``b % 8``
    of byte ``b // 8``, counted from the lowest. What is left of the last byte is zero. With 8, 16,
    24 or 32 bits these are the little-endian bytes of the indices.

    Args:
        indices: ``(..., L)``, int64 or int32, each from 0 to 2^bits - 1. Any strides.
        bits: 1 to 32.

    Returns:
        ``(..., ceil(L * bits / 8))``, uint8: each of the last dimension's rows by itself.

    Raises:
        TypeError: ``indices`` is no tensor, or has another dtype.
        ValueError: ``indices`` has no dimension, ``bits`` is out of range, or an index on the CPU.
            An index out of range elsewhere, or in compiled code, is an assertion that fails where
            the index is: nothing is read back for it.
    """
    check_dtype("indices", indices, INDEX)
    _check(indices, "indices", bits)
    inside = _inside(indices, bits).all()
    message = f"indices must be from 0 to 2^{bits} - 1"
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(inside, message)
    elif not inside:
        low, high = indices.aminmax()
        raise ValueError(f"{message}, got {int(low)} to {int(high)}")
    return backends.call(OP, indices, bits)


def unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_indices`.

    Args:
        packed: ``(..., ceil(count * bits / 8))``, uint8. Any strides.
        bits: 1 to 32, as it was packed.
        count: L, the number of indices in a row.

    Returns:
        ``(..., L)``, int64.

    Raises:
        TypeError: ``packed`` is no tensor, or has another dtype.
        ValueError: its shape, ``bits`` or ``count`` do not fit.
    """
    check_dtype("packed", packed, (torch.uint8,))
    _check(packed, "packed", bits)
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    if packed.shape[-1] != packed_size(count, bits):
        raise ValueError(
            f"packed must be (..., {packed_size(count, bits)}) for {count} indices of {bits} bits, "
            f"got shape {tuple(packed.shape)}"
        )
    return backends.call(INVERSE, packed, bits, count)


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` indices."""
    return (count * bits + 7) // 8


def _check(tensor: Tensor, name: str, bits: int) -> None:
    if tensor.dim() < 1:
        raise ValueError(f"{name} must have at least one dimension, got shape ()")
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits must be from 1 to {MOST_BITS}, got {bits}")


def _inside(indices: Tensor, bits: int) -> Tensor:
    inside = indices >= 0
    if bits < torch.iinfo(indices.dtype).bits - 1:
        inside &= indices >> bits == 0
    return inside


def reference(indices: Tensor, bits: int) -> Tensor:
    """The specification. Bits above the lowest ``bits`` are left out."""
    rows = indices.reshape(indices.shape[:-1].numel(), indices.shape[-1])  # [N, L]
    result = fake(indices, bits)
    place = torch.arange(bits, device=indices.device)
    stream = (rows.long()[:, :, None] >> place & 1).flatten(1).to(torch.uint8)  # [N, L bits]
    padded = torch.nn.functional.pad(stream, (0, 8 * result.shape[-1] - stream.shape[1]))
    eight = torch.arange(8, device=indices.device, dtype=torch.uint8)
    octets = padded.unflatten(1, (result.shape[-1], 8)) << eight  # [N, bytes, 8]
    return result.copy_(octets.sum(2, dtype=torch.uint8).view(result.shape))


def fake(indices: Tensor, bits: int) -> Tensor:
    """The output without values."""
    size = (*indices.shape[:-1], packed_size(indices.shape[-1], bits))
    return indices.new_empty(size, dtype=torch.uint8)


def reference_unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The specification of the inverse."""
    rows = packed.reshape(packed.shape[:-1].numel(), packed.shape[-1])  # [N, bytes]
    eight = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = (rows[:, :, None] >> eight & 1).flatten(1)[:, : count * bits]  # [N, L bits]
    place = torch.arange(bits, device=packed.device)
    indices = (stream.unflatten(1, (count, bits)).long() << place).sum(2)  # [N, L]
    result = fake_unpack(packed, bits, count)
    return result.copy_(indices.view(result.shape))


def fake_unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The output without values."""
    return packed.new_empty((*packed.shape[:-1], count), dtype=torch.int64)


def cost(indices: Tensor, bits: int) -> Cost:
    """Indices read once, bytes written once."""
    return Cost(bytes=indices.nbytes + fake(indices.to("meta"), bits).nbytes, flops=indices.numel())


def cost_unpack(packed: Tensor, bits: int, count: int) -> Cost:
    """Bytes read once, indices written once."""
    indices = packed.shape[:-1].numel() * count
    return Cost(bytes=packed.nbytes + 8 * indices, flops=indices)


def compare(result: Tensor, arguments: Arguments, expected: Tensor | None = None) -> list[str]:
    """Every byte must equal the reference's."""
    return unequal(result, reference(*arguments) if expected is None else expected)


def compare_unpack(
    result: Tensor, arguments: Arguments, expected: Tensor | None = None
) -> list[str]:
    """Every index must equal the reference's."""
    return unequal(result, reference_unpack(*arguments) if expected is None else expected)


def _sample(rows: int, length: int, bits: int) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        index_dtype = dtype if dtype in INDEX else torch.int64
        most = min(1 << bits, torch.iinfo(index_dtype).max)
        indices = torch.randint(most, (rows, length), generator=generator)
        return indices.to(device, index_dtype), bits

    shape = {"N": rows * length, "K": 1 << bits, "D": bits}
    return Sample(f"n{rows}x{length}_b{bits}", make, shape, bench=rows * length >= 4096)


def samples() -> Iterable[Sample]:
    """Shapes of the field (``bench``) and odd ones."""
    yield _sample(64, 1024, 10)
    yield _sample(1024, 1024, 13)
    for rows, length, bits in ((0, 3, 5), (2, 0, 5), (1, 1, 1), (3, 17, 3), (2, 9, 31), (5, 7, 32)):
        yield _sample(rows, length, bits)


def samples_unpack() -> Iterable[Sample]:
    """What the forward's samples become."""

    def of(sample: Sample) -> Sample:
        def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
            indices, bits = sample.make(device, torch.int64, seed)
            return reference(indices, bits), bits, indices.shape[-1]

        return Sample(sample.name, make, sample.shape, sample.bench)

    return [of(sample) for sample in samples()]


def _load_triton() -> Callable[..., Tensor]:
    from mmfast.kernels.pack_indices import pack_indices as launch

    return launch


def _load_triton_unpack() -> Callable[..., Tensor]:
    from mmfast.kernels.pack_indices import unpack_indices as launch

    return launch


OP = register(
    Op(
        name="pack_indices",
        schema="(Tensor indices, int bits) -> Tensor",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("pack_indices"),
            "triton": backends.triton(_load_triton, backends.always),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=INDEX,
    )
)

INVERSE = register(
    Op(
        name="unpack_indices",
        schema="(Tensor packed, int bits, SymInt count) -> Tensor",
        reference=reference_unpack,
        fake=fake_unpack,
        backends={
            "cpp": backends.cpp("unpack_indices"),
            "triton": backends.triton(_load_triton_unpack, backends.always),
        },
        samples=samples_unpack,
        cost=cost_unpack,
        compare=compare_unpack,
        dtypes=(torch.uint8,),
    )
)
