"""Files of text."""

from __future__ import annotations

import os

from mmfast.data.errors import FileError
from mmfast.data.readers import checked_file


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a file of UTF-8, without its byte-order mark.

    Raises:
        FileError: the file is empty, or holds something else.
    """
    data = checked_file(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"is no text in UTF-8: byte {data[error.start]:#04x} at {error.start}"
        raise FileError(path, reason) from None
    if "\0" in text:
        raise FileError(path, f"is no text: a zero byte at {data.index(0)}")
    if not text.strip():
        raise FileError(path, "is empty")
    return text
