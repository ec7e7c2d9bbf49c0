"""Videos, read with PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from mmfast.data.errors import FileError, needed


def decoded(path: str | os.PathLike[str]) -> Iterator[tuple[float, np.ndarray]]:
    """Frames in the order in which they are shown.

    Yields:
        The time in seconds, and uint8 ``(height, width, 3)``.

    Raises:
        FileError: the file is no video, or damaged.
        ImportError: PyAV is not installed.
    """
    av = needed("av")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise FileError(path, "holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                # Turned as players turn it: phones record upright videos lying down.
                turns = round(frame.rotation / 90) % 4
                yield float(frame.time or 0.0), np.rot90(frame.to_ndarray(format="rgb24"), turns)
    except av.FFmpegError as error:
        raise FileError(path, f"cannot be decoded ({error.strerror})") from None
