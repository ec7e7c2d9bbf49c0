"""Images, read and written with Pillow."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from mmfast.checks import check_choice, check_floating
from mmfast.data.errors import FileError, blamed_on, needed
from mmfast.data.fitting import FITS, Size, checked_size, fitted, kept
from mmfast.data.readers import Reader, checked_file
from mmfast.files import write_whole

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Pillow's readers of formats raise whatever a damaged header leads to.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(OverflowError, struct.error, zlib.error),
)
_SAME = {"MPO": "JPEG"}  # a JPEG with more behind it, as some cameras write


def to_float(pixels: np.ndarray) -> Tensor:
    """uint8 ``(height, width, C)`` or ``(height, width)`` as float32 ``(C, height, width)``.

    0 becomes -1, 255 becomes 1.

    Raises:
        TypeError: the pixels are no uint8.
    """
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels must be uint8, got {pixels.dtype}")
    tensor = torch.from_numpy(np.array(pixels if pixels.ndim == 3 else pixels[:, :, None]))
    return tensor.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Values in [-1, 1] as uint8, the nearest; values beyond are clamped. Of any shape.

    Raises:
        TypeError: the images are no floating numbers.
    """
    check_floating("images", images)
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pillow(image: Tensor) -> Any:
    """A ``PIL.Image.Image`` of ``(1, 3 or 4, height, width)`` in [-1, 1].

    Raises:
        ValueError: the image has another shape.
    """
    pillow = needed("PIL.Image")
    if image.dim() != 3 or len(image) not in _MODES:
        raise ValueError(f"image must be (1, 3 or 4, height, width), got {tuple(image.shape)}")
    pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    return pillow.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)


def format_of(path: str | os.PathLike[str]) -> str:
    """Pillow's name of the format that a picture to be written has by its name.

    Raises:
        ValueError: the name ends in no picture format.
    """
    pillow = needed("PIL.Image")
    suffix = Path(path).suffix.lower()
    found: str | None = pillow.registered_extensions().get(suffix)
    if found is None or found not in pillow.SAVE:
        raise ValueError(
            f"{path}: the name must end in that of a picture format, such as .png, got {suffix!r}"
        )
    return found


def write_image(image: Tensor, path: str | os.PathLike[str], **options: Any) -> None:
    """Write ``(C, height, width)`` in [-1, 1] in the format that the name ends in.

    Args:
        image: of one, three or four channels.
        path: of the file; its directory must exist.
        options: of Pillow's ``save``, such as ``quality``.

    Raises:
        ValueError: the name ends in no picture format, or the format cannot hold the image.
    """
    picture_format = format_of(path)
    buffer = io.BytesIO()
    try:
        to_pillow(image).save(buffer, picture_format, **options)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written in this format ({error})") from None
    write_whole(path, buffer.getvalue())


def open_image(path: str | os.PathLike[str]) -> Any:
    """The picture in a file, as a ``PIL.Image.Image``, upright and decoded. Of several, the first.

    Raises:
        FileError: it is empty, damaged, no picture, too large, or of another format than its
            name says.
        ImportError: Pillow is not installed.
    """
    pillow, ops = needed("PIL.Image"), needed("PIL.ImageOps")
    file = checked_file(path)
    try:
        with pillow.open(file) as image:
            _check_format(file, image.format)
            return ops.exif_transpose(image)
    except pillow.UnidentifiedImageError:
        raise FileError(path, "is no picture that Pillow knows") from None
    except pillow.DecompressionBombError as error:
        raise FileError(path, f"is too large ({error})") from None
    except _DAMAGED as error:
        if isinstance(error, FileError):
            raise
        raise FileError(path, f"is a damaged picture ({error})") from None


def _check_format(path: Path, found: str | None) -> None:
    named = needed("PIL.Image").registered_extensions().get(path.suffix.lower())
    if named and _SAME.get(str(found), found) != named:
        raise FileError(path, f"is named as {named}, but holds {found}")


@dataclass(frozen=True)
class ImageReader(Reader):
    """Images as float32 ``(channels, height, width)`` in [-1, 1].

    They are turned upright (EXIF), scaled by Pillow's bicubic filter, which is as wide as
    antialiasing asks for, and cut to size. Palettes and CMYK become RGB; grey of 16 bits keeps
    them; transparent pixels are laid over a background, unless there are four channels.

    Args:
        size: of the square, or ``(height, width)``; None leaves pictures as large as they are.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        fit: ``"crop"`` keeps the shape of things and cuts off what protrudes, ``"stretch"`` scales
            both sides to size.
        random_crop: with a generator, cut anywhere instead of the middle.
        random_flip: with a generator, mirror every second picture.
        background: grey or RGB value behind transparent pixels, 0 to 255.

    Raises:
        ValueError: an option makes no sense.
    """

    size: int | Size | None = None
    channels: int = 3
    fit: str = "crop"
    random_crop: bool = False
    random_flip: bool = False
    background: int | tuple[int, int, int] = 255

    modality: ClassVar[str] = "image"
    source: ClassVar[str] = "image"
    suffixes: ClassVar[frozenset[str]] = frozenset(
        (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
    )

    def __post_init__(self) -> None:
        if self.size is not None:
            checked_size(self.size)
        if self.channels not in _MODES:
            raise ValueError(f"channels must be 1, 3 or 4, got {self.channels}")
        check_choice("fit", self.fit, FITS)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """``(channels, height, width)``."""
        sides = (None, None) if self.size is None else checked_size(self.size)
        return self.channels, *sides

    def load(self, path: str | os.PathLike[str], generator: Generator | None = None) -> Tensor:
        """The picture in a file; see :meth:`Reader.read`."""
        with blamed_on(path):
            return self.prepare(open_image(path), generator)

    def verify(self, path: str | os.PathLike[str]) -> None:
        """Decode the picture."""
        self.load(path)

    def prepare(self, image: Any, generator: Generator | None = None) -> Tensor:
        """A picture in memory, prepared like a file's.

        Args:
            image: a ``PIL.Image.Image``, or uint8 ``(height, width[, C])``.
            generator: see :meth:`Reader.read`.

        Raises:
            ValueError: its pixels are of more than 16 bits, or floating numbers.
        """
        if isinstance(image, np.ndarray):
            image = needed("PIL.Image").fromarray(image)
        converted = self._converted(image)
        if self.size is not None:
            want, have = checked_size(self.size), (converted.height, converted.width)
            box = kept(have, want, self.fit, generator if self.random_crop else None)
            converted = fitted(converted, want, box)
        values = torch.from_numpy(np.array(converted, dtype=np.float32))
        if converted.mode == "F":
            made = values.expand(min(self.channels, 3), -1, -1)
            if self.channels == 4:
                made = torch.cat([made, torch.full_like(made[:1], 255)])
        else:
            made = values.permute(2, 0, 1) if values.dim() == 3 else values[None]
        made = (made / 127.5 - 1).clamp(-1, 1).contiguous()
        flips = self.random_flip and generator is not None
        if flips and torch.rand((), generator=generator) < 0.5:
            made = made.flip(-1)
        return made

    def check_name(self, path: str | os.PathLike[str]) -> None:
        """See :func:`format_of`."""
        format_of(path)

    def write(self, value: Tensor, path: str | os.PathLike[str]) -> None:
        """See :func:`write_image`."""
        write_image(value, path)

    def _converted(self, image: Any) -> Any:
        """In the wanted mode; of more than 8 bits, as floating numbers up to 255."""
        if image.mode == "F":
            raise ValueError("has pixels of floating numbers, of which no scale is known")
        if image.mode.startswith("I"):
            # Pillow has 16 bits in 32, too.
            values = np.asarray(image).astype(np.float32)
            if values.min() < 0 or values.max() > 0xFFFF:
                raise ValueError("has pixels of more than 16 bits")
            return needed("PIL.Image").fromarray(values / 257)
        if self.channels == 4:
            return image.convert("RGBA")
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            colour = self.background
            behind = (colour,) * 3 if isinstance(colour, int) else tuple(colour)
            under = needed("PIL.Image").new("RGBA", image.size, (*behind, 255))
            image = needed("PIL.Image").alpha_composite(under, image)
        if image.mode not in ("1", "L", "RGB"):
            image = image.convert("RGB")
        return image.convert(_MODES[self.channels])
