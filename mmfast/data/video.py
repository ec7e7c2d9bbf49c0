"""Videos, read with PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from mmfast.data.errors import FileError, needed
from mmfast.data.sizes import Size, covering


def decoded(
    path: str | os.PathLike[str], size: Size | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Frames in the order in which they are shown.

    Args:
        path: of the file.
        size: height and width, to which frames are scaled and, in the middle, cut; by default,
            they stay as they are.

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
                have = frame.height, frame.width
                # Turned as players turn it: phones record upright videos lying down.
                turns = round(frame.rotation / 90) % 4
                want = size and (size[::-1] if turns % 2 else size)
                height, width = covering(have, want) if want else have
                pixels = frame.to_ndarray(
                    format="rgb24", width=width, height=height, interpolation="BICUBIC"
                )
                if want:
                    top, left = (height - want[0]) // 2, (width - want[1]) // 2
                    pixels = pixels[top : top + want[0], left : left + want[1]]
                yield float(frame.time or 0.0), np.rot90(pixels, turns)
    except av.FFmpegError as error:
        raise FileError(path, f"cannot be decoded ({error.strerror})") from None
