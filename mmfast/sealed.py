"""Binary files that tell when they are foreign, truncated, damaged or of another version."""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

_CRC = struct.Struct("<I")


class Opened(NamedTuple):
    """``fields`` of the header, and the ``sections`` behind it."""

    fields: tuple[Any, ...]
    sections: tuple[bytes, ...]


class SealedFormat:
    """A kind of file: magic, version and fields, lengths of the sections; the sections; CRC-32.

    All numbers are little-endian.

    Args:
        magic: 8 bytes that no other kind of file starts with. As PNG's, they should have a byte
            above 127 and line ends, which a transfer as text would break.
        version: of the fields and sections, from 0 to 255.
        fields: format of the header's fields as :mod:`struct` has it, without the byte order.
        sections: their number.
        kind: what a file is, for messages: "a compressed picture".
    """

    def __init__(self, magic: bytes, version: int, fields: str, sections: int, kind: str) -> None:
        self._magic, self._version, self._kind = magic, version, kind
        self._count = sections
        self._header = struct.Struct(f"<8sB{fields}{sections}I")

    def seal(self, fields: tuple[Any, ...], sections: tuple[bytes, ...]) -> bytes:
        """A file's bytes.

        Raises:
            struct.error: a field is out of its range.
        """
        lengths = map(len, sections)
        header = self._header.pack(self._magic, self._version, *fields, *lengths)
        data = b"".join([header, *sections])
        return data + _CRC.pack(zlib.crc32(data))

    def open(self, data: bytes) -> Opened:
        """What :meth:`seal` made ``data`` of.

        Raises:
            ValueError: it is another kind of file, of another version, truncated or damaged.
        """
        if not data or data[: len(self._magic)] != self._magic[: len(data)]:
            raise ValueError(f"not {self._kind}")
        if len(data) < self._header.size + _CRC.size:
            raise ValueError(f"truncated: {len(data)} bytes are less than the header")
        _, version, *fields = self._header.unpack_from(data)
        if version != self._version:
            raise ValueError(f"version {version} of the format; this program reads {self._version}")
        lengths = fields[len(fields) - self._count :]
        expected = self._header.size + sum(lengths) + _CRC.size
        if len(data) != expected:
            kind = "truncated" if len(data) < expected else "damaged"
            raise ValueError(f"{kind}: {len(data)} bytes, the header says {expected}")
        if zlib.crc32(data[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:
            raise ValueError("damaged: the checksum does not match")
        sections = []
        start = self._header.size
        for length in lengths:
            sections.append(data[start : start + length])
            start += length
        return Opened(tuple(fields[: len(fields) - self._count]), tuple(sections))
