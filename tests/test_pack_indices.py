"""pack_indices and unpack_indices: a stream of bits, and back."""

from __future__ import annotations

import pytest
import torch
from cases import backends_here, device_of
from hypothesis import given, settings
from hypothesis import strategies as st

import mmfast
from mmfast.ops import pack_indices

BACKENDS = backends_here(pack_indices.OP)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def stream(indices: list[int], bits: int) -> bytes:
    """The bytes by Python's integers."""
    total = sum(index << bits * i for i, index in enumerate(indices))
    return total.to_bytes((len(indices) * bits + 7) // 8, "little")


@settings(max_examples=150)
@given(data=st.data(), bits=st.integers(1, 32), dtype=st.sampled_from([torch.int64, torch.int32]))
def test_round_trip(data, bits, dtype):
    most = min((1 << bits) - 1, torch.iinfo(dtype).max)
    indices = data.draw(st.lists(st.integers(0, most), max_size=40))
    for name in BACKENDS:
        given = torch.tensor(indices, dtype=dtype, device=device_of(name))
        with mmfast.use_backend(name):
            packed = mmfast.pack_indices(given, bits)
            back = mmfast.unpack_indices(packed, bits, len(indices))
        assert packed.dtype == torch.uint8
        assert bytes(packed.tolist()) == stream(indices, bits)
        assert back.dtype == torch.int64
        assert back.tolist() == indices


@pytest.mark.parametrize("bits", [1, 3, 8, 13, 16, 24, 31, 32])
def test_rows_by_themselves(backend, bits):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(1 << bits, (3, 4, 13), generator=generator).to(device_of(backend))
    packed = mmfast.pack_indices(indices, bits)
    for i in range(3):
        for j in range(4):
            assert bytes(packed[i, j].tolist()) == stream(indices[i, j].tolist(), bits)
    assert torch.equal(mmfast.unpack_indices(packed, bits, 13), indices)
    strided = indices.permute(2, 0, 1)
    assert torch.equal(
        mmfast.pack_indices(strided, bits), mmfast.pack_indices(strided.contiguous(), bits)
    )


def test_many_indices(backend, threads):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(1 << 11, (100_003,), generator=generator).to(device_of(backend))
    packed = mmfast.pack_indices(indices, 11)
    assert bytes(packed.tolist()) == stream(indices.tolist(), 11)
    assert torch.equal(mmfast.unpack_indices(packed, 11, 100_003), indices)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("index", "bits"), [(-1, 4), (16, 4), (2, 1), (1 << 30, 30)])
def test_out_of_range(index, bits, dtype):
    indices = torch.tensor([0, index, 1], dtype=dtype)
    low, high = min(0, index), max(1, index)
    with pytest.raises(
        ValueError, match=rf"indices must be from 0 to 2\^{bits} - 1, got {low} to {high}"
    ):
        mmfast.pack_indices(indices, bits)


def test_largest_indices():
    for dtype in (torch.int64, torch.int32):
        most = torch.tensor([torch.iinfo(torch.int32).max], dtype=dtype)
        for bits in (31, 32):
            assert torch.equal(
                mmfast.unpack_indices(mmfast.pack_indices(most, bits), bits, 1), most.long()
            )


def test_messages():
    indices = torch.arange(4)
    with pytest.raises(ValueError, match="bits must be from 1 to 32, got 33"):
        mmfast.pack_indices(indices, 33)
    with pytest.raises(TypeError, match="indices must be int64, int32, got float32"):
        mmfast.pack_indices(indices.float(), 4)
    with pytest.raises(ValueError, match="indices must have at least one dimension"):
        mmfast.pack_indices(indices[0], 4)
    packed = mmfast.pack_indices(indices, 3)
    with pytest.raises(ValueError, match=r"packed must be \(..., 3\) for 6 indices of 3 bits"):
        mmfast.unpack_indices(packed, 3, 6)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        mmfast.unpack_indices(packed, 3, -1)
    with pytest.raises(TypeError, match="packed must be uint8, got int64"):
        mmfast.unpack_indices(indices, 3, 4)


def test_compiles():
    def there_and_back(indices):
        return mmfast.unpack_indices(mmfast.pack_indices(indices, 5), 5, indices.shape[0])

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    indices = torch.arange(32)
    assert torch.equal(compiled(indices), indices)
    with pytest.raises(RuntimeError, match="indices must be from 0 to"):
        compiled(indices + 1)
