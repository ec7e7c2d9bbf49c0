"""Files that tell what is wrong with them."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.sealed import SealedFormat

FORMAT = SealedFormat(b"\x89TST\r\n\x1a\n", 3, "BH", 2, "a test's file")
DATA = FORMAT.seal((7, 300), (b"the first", b""))


@given(st.integers(0, 255), st.integers(0, 65535), st.binary(max_size=20), st.binary(max_size=20))
def test_there_and_back(a, b, one, two):
    opened = FORMAT.open(FORMAT.seal((a, b), (one, two)))
    assert opened.fields == (a, b)
    assert opened.sections == (one, two)


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_a_damaged_byte_is_detected(position, change):
    damaged = bytearray(DATA)
    damaged[position] ^= change
    with pytest.raises(ValueError, match=r"not a test's|version|truncated|damaged"):
        FORMAT.open(bytes(damaged))


@given(st.integers(0, len(DATA) - 1))
def test_truncation_is_detected(length):
    with pytest.raises(ValueError, match=r"truncated|not a test's file"):
        FORMAT.open(DATA[:length])


def test_the_layout():
    """Files that were written once must stay readable."""
    header = b"\x89TST\r\n\x1a\n" + struct.pack("<BBHII", 3, 7, 300, 9, 0)
    assert header + b"the first" + struct.pack("<I", zlib.crc32(header + b"the first")) == DATA


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a test's file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "not a test's file"),
        (DATA + b"\0", "damaged: 34 bytes, the header says 33"),
        (DATA[:-6], "truncated: 27 bytes, the header says 33"),
        (DATA[:20], "truncated: 20 bytes are less than the header"),
        (DATA[:8] + b"\4" + DATA[9:], "version 4 of the format; this program reads 3"),
        (DATA[:9] + b"\0" + DATA[10:], "the checksum does not match"),
    ],
)
def test_messages(data, message):
    with pytest.raises(ValueError, match=message):
        FORMAT.open(data)


def test_a_field_out_of_range():
    with pytest.raises(struct.error):
        FORMAT.seal((256, 0), (b"", b""))
