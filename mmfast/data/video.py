"""Videos, read and written with PyAV."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from mmfast.checks import check_choice
from mmfast.data.errors import FileError, needed
from mmfast.data.fitting import FITS, Size, checked_size, resized
from mmfast.data.images import to_uint8
from mmfast.data.readers import Reader, checked_file
from mmfast.data.truncation import check_whole
from mmfast.files import replacing

# What PyAV calls the container of each.
_FORMATS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".avi": "avi",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
    ".ogv": "ogg",
}
_TICK = 1e-6  # seconds by which times may be off through rounding


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """A file's container and its video stream; what goes wrong with it becomes a FileError."""
    av = needed("av")
    file = checked_file(path)
    check_whole(file)
    try:
        # Frames that do not decode are an error, not concealed; titles in other encodings are none.
        options = {"err_detect": "explode"}
        with av.open(str(file), options=options, metadata_errors="replace") as container:
            named, found = _FORMATS.get(file.suffix.lower()), container.format.name
            if named and named not in found.split(","):
                raise FileError(path, f"is named {file.suffix}, but holds {found}")
            if not container.streams.video:
                raise FileError(path, "holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise FileError(path, f"cannot be decoded ({error.strerror})") from None


def _pixels(path: str | os.PathLike[str], frame: Any) -> np.ndarray:
    """uint8 ``(height, width, 3)``, turned as players turn it: phones record lying down."""
    if frame.is_corrupt:
        raise FileError(path, "has damaged frames")
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


def decoded(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """All frames in the order in which they are shown, uint8 ``(height, width, 3)``.

    Raises:
        FileError: the file is no video, or damaged.
        ImportError: PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            yield _pixels(path, frame)


def _timeline(path: str | os.PathLike[str]) -> tuple[list[int] | None, list[float]]:
    """When frames are shown, without decoding them: in the stream's ticks, if known, and seconds.

    Both ascend; the seconds from 0.
    """
    with _opened(path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        if not packets:
            raise FileError(path, "holds no frames")
        if any(packet.pts is None for packet in packets):
            rate = float(stream.average_rate or 25)
            return None, [i / rate for i in range(len(packets))]
        ticks = sorted(packet.pts for packet in packets)
        return ticks, [float((tick - ticks[0]) * stream.time_base) for tick in ticks]


def frame_rate(path: str | os.PathLike[str]) -> float:
    """Frames in a second, on average; 25 where the file does not say.

    Raises:
        FileError: the file is no video, or damaged.
        ImportError: PyAV is not installed.
    """
    with _opened(path) as (_, stream):
        return float(stream.average_rate or 25)


def _chosen(path: str | os.PathLike[str], wanted: Sequence[int]) -> list[np.ndarray]:
    """The frames at places ``wanted``, which ascend, of the timeline."""
    ticks, _ = _timeline(path)
    made: dict[int, np.ndarray] = {}
    needed_ones = set(wanted)
    with _opened(path) as (container, stream):
        if ticks is not None and wanted[0] > 0:
            container.seek(ticks[wanted[0]], stream=stream)  # to a key frame before
        for i, frame in enumerate(container.decode(stream)):
            place = i if ticks is None else bisect_right(ticks, frame.pts) - 1
            if place in needed_ones:
                made[place] = _pixels(path, frame)
            if place >= wanted[-1]:
                break
    if len(made) < len(needed_ones):
        raise FileError(path, f"has {len(needed_ones) - len(made)} frames that do not decode")
    return [made[place] for place in wanted]


def video_suffix(path: str | os.PathLike[str]) -> str:
    """The ending of the name of a video that is to be written, in lower case.

    Raises:
        ValueError: the name ends in no format that is written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".mp4", ".mkv", ".webm", ".mov"):
        raise ValueError(f"{path}: the name must end in .mp4, .mkv, .webm or .mov")
    return suffix


def write_video(video: Tensor, path: str | os.PathLike[str], fps: float = 25) -> None:
    """Write ``(1 or 3, T, height, width)`` in [-1, 1], in the format that the name ends in.

    Args:
        video: what is beyond -1 and 1 is clamped.
        path: of the file, whose directory must exist; .mp4, .mkv, .webm or .mov.
        fps: frames in a second.

    Raises:
        ValueError: the name ends in another format, or the video has another shape.
    """
    av = needed("av")
    suffix = video_suffix(path)
    if video.dim() != 4 or video.shape[0] not in (1, 3) or not video.numel():
        raise ValueError(f"video must be (1 or 3, T, height, width), got {tuple(video.shape)}")
    frames = to_uint8(video).expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    height, width = frames.shape[1:3]
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format=_FORMATS[suffix]) as container,
    ):
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(container.default_video_codec, rate)
        stream.width, stream.height = width, height
        # Colours at half the resolution, which all players know, need even sides.
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        stream.options = {"crf": "18"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@dataclass(frozen=True)
class VideoReader(Reader):
    """Clips as float32 ``(channels, frames, height, width)`` in [-1, 1].

    Frames are turned upright, scaled and cut as :class:`ImageReader` does it, all of a clip alike.

    Args:
        frames: T, of a clip; None takes all that ``fps`` or ``stride`` choose.
        size: of the square, or ``(height, width)``; None leaves frames as large as they are.
        fps: take a frame every so many of a second, the one that is then shown.
        stride: take every so many of the file's frames. With neither, ``frames`` are spread evenly
            over the file.
        channels: 1 (grey) or 3 (RGB).
        fit: ``"crop"`` or ``"stretch"``, see :class:`ImageReader`.
        random_start: with a generator, a clip begins anywhere instead of with the first frame.
        random_crop: with a generator, cut anywhere instead of the middle.
        random_flip: with a generator, mirror every second clip.

    Raises:
        ValueError: an option makes no sense.
    """

    frames: int | None = None
    size: int | Size | None = None
    fps: float | None = None
    stride: int | None = None
    channels: int = 3
    fit: str = "crop"
    random_start: bool = False
    random_crop: bool = False
    random_flip: bool = False

    modality: ClassVar[str] = "video"
    source: ClassVar[str] = "video"
    suffixes: ClassVar[frozenset[str]] = frozenset(_FORMATS)

    def __post_init__(self) -> None:
        if self.size is not None:
            checked_size(self.size)
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        check_choice("fit", self.fit, FITS)
        if self.fps is not None and self.stride is not None:
            raise ValueError("not possible: fps and stride")
        for name in ("frames", "fps", "stride"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and (name == "fps" or value == int(value))):
                raise ValueError(f"{name} must be above 0, got {value}")

    @property
    def shape(self) -> tuple[int | None, ...]:
        """``(channels, frames, height, width)``."""
        sides = (None, None) if self.size is None else checked_size(self.size)
        return self.channels, self.frames, *sides

    def places(self, times: Sequence[float], generator: Generator | None = None) -> list[int]:
        """Which of a video's frames make a clip.

        Args:
            times: when the frames are shown, in seconds, ascending from 0.
            generator: see :meth:`Reader.read`.

        Raises:
            ValueError: the video is too short.
        """
        have = len(times)
        drawn = 0.0
        if self.random_start and generator is not None:
            drawn = float(torch.rand((), generator=generator))
        if self.fps is not None:
            # The last frame is shown as long as the others are, on average.
            end = times[-1] * have / (have - 1) if have > 1 else _TICK
            count = self.frames or max(int((end - _TICK) * self.fps) + 1, 1)
            spare = end - _TICK - (count - 1) / self.fps
            if spare < 0:
                needs = (count - 1) / self.fps
                raise ValueError(f"is too short: lasts {end:.3g} s, more than {needs:.3g} s needed")
            start = drawn * spare
            return [bisect_right(times, start + i / self.fps + _TICK) - 1 for i in range(count)]
        step = self.stride or 1
        count = self.frames or -(-have // step)
        span = count if self.stride is None else (count - 1) * step + 1
        if span > have:
            raise ValueError(f"is too short: {have} frames, {span} needed")
        if self.stride is None:
            return torch.linspace(0, have - 1, count).round().int().tolist()
        start = min(int(drawn * (have - span + 1)), have - span)
        return [start + i * step for i in range(count)]

    def _finished(self, frames: list[np.ndarray], generator: Generator | None) -> Tensor:
        """uint8 frames as the reader's tensor."""
        if self.size is not None:
            crop = generator if self.random_crop else None
            frames = resized(frames, checked_size(self.size), self.fit, crop)
        if self.channels == 1:
            image = needed("PIL.Image")
            frames = [np.asarray(image.fromarray(f).convert("L"))[:, :, None] for f in frames]
        made = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous().float()
        made = made / 127.5 - 1
        flips = self.random_flip and generator is not None
        if flips and torch.rand((), generator=generator) < 0.5:
            made = made.flip(-1)
        return made

    def prepare(self, value: tuple[Tensor, float], generator: Generator | None = None) -> Tensor:
        """A video in memory, prepared like a file's.

        Args:
            value: uint8 ``(3, T, height, width)`` and its frames a second.
            generator: see :meth:`Reader.read`.

        Raises:
            ValueError: it is too short.
        """
        video, rate = value
        if video.dim() != 4 or video.shape[0] != 3 or video.dtype != torch.uint8:
            raise ValueError(
                f"video must be uint8 (3, T, height, width), got {video.dtype} {tuple(video.shape)}"
            )
        places = self.places([i / rate for i in range(video.shape[1])], generator)
        frames = [video[:, place].permute(1, 2, 0).numpy() for place in places]
        return self._finished(frames, generator)

    def load(self, path: str | os.PathLike[str], generator: Generator | None = None) -> Tensor:
        """The clip in a file; see :meth:`Reader.read`. Too short a video is a FileError, too."""
        _, times = _timeline(path)
        try:
            places = self.places(times, generator)
        except ValueError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(path, str(error)) from None
        return self._finished(_chosen(path, places), generator)

    def verify(self, path: str | os.PathLike[str]) -> None:
        """Decode all frames."""
        count = sum(1 for _ in decoded(path))
        _, times = _timeline(path)
        if count < len(times):
            raise FileError(path, f"has {len(times) - count} frames that do not decode")
        self.load(path)

    def check_name(self, path: str | os.PathLike[str]) -> None:
        """See :func:`write_video`."""
        video_suffix(path)

    def write(self, value: Tensor, path: str | os.PathLike[str]) -> None:
        """See :func:`write_video`."""
        write_video(value, path, self.fps or 25)
