"""Whether a file of sound or video ends before its container says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from mmfast.data.errors import FileError

_ENDLESS = 0x7FFFF000  # streams, whose length was not known, have such a size or a larger one


def check_whole(path: str | os.PathLike[str]) -> None:
    """Refuse files of WAV, AVI, AIFF, AU, MP4, Matroska and Ogg that were cut off.

    Decoders take these for shorter ones.

    Raises:
        FileError: the file was cut off.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        head = file.read(12)
        if head[:4] in (b"RIFF", b"FORM"):
            end = _chunk(head)
        elif head[:4] == b".snd":
            end = _au(head)
        elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            end = _boxes(file, size)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            end = _matroska(file, size)
        elif head[:4] == b"OggS":
            end = _ogg(file, size)
        else:
            return
    if end > size:
        raise FileError(path, f"is truncated: {size} bytes, of {end} at least")


def _chunk(head: bytes) -> int:
    """Where the outer chunk ends. Source: "EA IFF 85"; RIFF is the same in little-endian."""
    length = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
    return 0 if length >= _ENDLESS else 8 + length


def _au(head: bytes) -> int:
    """Source: the Audio File Format of Sun: where samples begin, and how many bytes they are."""
    start, length = (int.from_bytes(head[i : i + 4], "big") for i in (4, 8))
    return start if length >= _ENDLESS else start + length


def _boxes(file: BinaryIO, size: int) -> int:
    """Where the last box ends. Source: ISO/IEC 14496-12."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length == 0:  # to the end
            return size
        position += max(length, 8)
    return position


def _matroska(file: BinaryIO, size: int) -> int:
    """Where the first segment ends. Source: RFC 8794, RFC 9559."""
    file.seek(4)
    length = _variable(file)
    if length is None:
        return 0
    start = file.tell() + length
    if start > size:
        return start
    file.seek(start)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _variable(file)
    return 0 if length is None else file.tell() + length


def _variable(file: BinaryIO) -> int | None:
    """A number of a length of its own; None if all its bits are set, which means unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(first + file.read(more), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value


def _ogg(file: BinaryIO, size: int) -> int:
    """Where the last page ends, and further if it is not marked as the last. Source: RFC 3533."""
    start = max(size - (1 << 17), 0)  # a page has less than 64 KiB
    file.seek(start)
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0 or page + 27 > len(tail):
        return size + 1
    segments = tail[page + 26]
    lengths = tail[page + 27 : page + 27 + segments]
    end = start + page + 27 + segments + sum(lengths)
    last = tail[page + 5] & 4
    return end if last and len(lengths) == segments else max(end, size + 1)
