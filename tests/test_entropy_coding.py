"""Grids of codes as bytes and back: exactly, in few bytes, the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("constriction")

from mmfast.entropy_coding import decode_indices, encode_indices


def blocks(side: int = 32, seed: int = 0) -> np.ndarray:
    """(1, side, side): areas of 4 x 4 of the same code."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 512, (1, side // 4, side // 4)).repeat(4, 1).repeat(4, 2)


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.lists(st.integers(1, 5000), min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_there_and_back(shape, num_codes, seed, alike):
    rng = np.random.default_rng(seed)
    grids = np.stack([rng.integers(0, min(k, 3) if alike else k, shape) for k in num_codes])
    data = encode_indices(grids, num_codes)
    np.testing.assert_array_equal(decode_indices(data, shape, num_codes), grids)


def test_many_codes():
    grids = np.random.default_rng(0).integers(0, 1 << 18, (1, 20, 30))
    data = encode_indices(grids, [1 << 18])
    assert len(data) < 1.1 * 18 / 8 * grids.size
    np.testing.assert_array_equal(decode_indices(data, (20, 30), [1 << 18]), grids)


def test_neighbours_save_bytes():
    """Areas of one code cost less than a third of the bytes of their codes, each written once."""
    zstandard = pytest.importorskip("zstandard")
    grids = blocks(64)
    size = len(encode_indices(grids, [512]))
    assert size < 9 / 8 * grids.size / 3
    assert size < len(zstandard.compress(grids.astype("<u2").tobytes(), 19))


def test_the_format_stays():
    """Files that were written once must be read by all versions of the coder."""
    data = encode_indices(blocks(), [512])
    assert len(data) == 96
    digest = "6e4179b49f64052da93c7032cf6e31f8bc37e4831fc4eaec348cbc8f153b04a5"
    assert hashlib.sha256(data).hexdigest() == digest


def test_what_is_refused():
    with pytest.raises(ValueError, match="codes must be from 0 to 511, got 0, 512"):
        encode_indices(np.array([[0, 512]]), [512])
    data = encode_indices(blocks(), [512])
    with pytest.raises(ValueError, match="no multiple of 4"):
        decode_indices(data[:-1], (32, 32), [512])
    with pytest.raises(ValueError, match="more codes than the sizes say"):
        decode_indices(data, (4, 4), [512])
    noise = np.random.default_rng(0).bytes(400)
    with pytest.raises(ValueError, match="damaged"):
        decode_indices(noise, (32, 32), [512])
