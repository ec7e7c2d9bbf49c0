"""What a model's commands read and write, by the modality of its data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmfast.commands import CommandError
from mmfast.data import FileError, ImageReader, Reader, readers_from, write_image
from mmfast.data.images import format_of
from mmfast.data.video import VideoReader, frame_rate
from mmfast.files import check_writable
from mmfast.models import VQVAE
from mmfast.train.grids import as_images, grid

SUFFIXES = {"image": ".png", "video": ".mp4", "waveform": ".wav", "mel": ".wav"}
"""Of the files that samples are written to."""

# Fields of readers that cut, scale or fill up, and what they are for whole files.
_WHOLE = {"size": None, "length": None, "frames": None}


def reader_of(about: Mapping[str, Any], vqvae: VQVAE | None = None) -> Reader:
    """The reader that prepares files for a model as its training data.

    Args:
        about: what the model's file says.
        vqvae: whose data is images, if its file does not say and it has two dimensions.

    Raises:
        CommandError: the file says nothing that this version knows, or of several modalities.
    """
    data = about.get("data")
    if data is None and vqvae is not None and vqvae.spatial_dims == 2:
        return ImageReader(channels=vqvae.channels)
    try:
        readers = readers_from(data or {})
    except ValueError as error:
        raise CommandError(f"the model's file does not say what its data is: {error}") from None
    if len(readers) != 1:
        raise CommandError(f"the model's data must be of one modality, is {', '.join(readers)}")
    return next(iter(readers.values()))


def whole(reader: Reader) -> Reader:
    """The reader without what cuts, scales and fills up."""
    names = {field.name for field in dataclasses.fields(reader)}
    return dataclasses.replace(reader, **{n: v for n, v in _WHOLE.items() if n in names})


def timed(reader: Reader, path: Path) -> Reader:
    """A reader of videos that knows how many frames there are in a second; others as they are.

    Raises:
        FileError: the file is no video.
    """
    if not isinstance(reader, VideoReader) or reader.fps is not None:
        return reader
    return dataclasses.replace(reader, fps=frame_rate(path) / (reader.stride or 1), stride=None)


def extent(reader: Reader, x: Tensor) -> tuple[float, str]:
    """How much a sample ``(C, *sizes)`` is, and of what: ``"pixel"`` or ``"second"``."""
    if reader.modality in ("image", "video"):
        return float(x[0].numel()), "pixel"
    hop = getattr(reader, "hop", 1)
    return x.shape[-1] * hop / reader.sample_rate, "second"  # type: ignore[attr-defined]


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Files that cannot be read or written, and packages that are not there, as the user's to mend.

    Raises:
        CommandError: in their place.
    """
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise CommandError(what) from None
    except (FileError, ImportError) as error:
        raise CommandError(str(error)) from None


def check_out(path: Path) -> None:
    """A file can be written there.

    Raises:
        CommandError: its folder is not there or cannot be written to, or it is a folder itself.
    """
    if path.is_dir():
        raise CommandError(f"{path}: is a folder, expected the name of a file to write")
    if not path.parent.is_dir():
        raise CommandError(f"{path}: there is no folder {path.parent}")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Files can be written to a folder, which may have to be made; nothing is made yet.

    Raises:
        CommandError: it is a file, or nothing can be written there.
    """
    with told():
        check_writable(path)


def check_format(reader: Reader, path: Path) -> None:
    """A sample of the reader's modality can be written there.

    Raises:
        CommandError: as of :func:`check_out`, or the name ends in no format of such data.
    """
    check_out(path)
    try:
        reader.check_name(path)
    except (ImportError, ValueError) as error:
        raise CommandError(str(error)) from None


def is_picture(path: Path) -> bool:
    """Whether a name ends in that of a picture format.

    Raises:
        CommandError: Pillow, which knows, is not installed.
    """
    try:
        format_of(path)
    except ImportError as error:
        raise CommandError(str(error)) from None
    except ValueError:
        return False
    return True


def check_samples(reader: Callable[[], Reader], path: Path, count: int) -> None:
    """So many samples can be written to one file by :func:`write_samples`.

    Args:
        reader: gives that of their modality, which no picture is asked for.

    Raises:
        CommandError: they cannot.
    """
    if is_picture(path):
        check_out(path)
        return
    check_format(reader(), path)
    if count > 1:
        raise CommandError(
            f"{path}: {count} samples go into a picture, such as .png, or each into a file of its "
            "own (--each FOLDER)"
        )


def write_samples(reader: Callable[[], Reader], values: Tensor, path: Path, columns: int) -> None:
    """Write samples ``(N, C, *sizes)`` as a picture of all, or the only one in its own format."""
    if is_picture(path):
        write_image(grid(as_images(values), columns=columns), path)
    else:
        reader().write(values[0], path)


def read_bytes(path: Path) -> bytes:
    """A file's.

    Raises:
        CommandError: it cannot be read.
    """
    with told():
        return path.read_bytes()
