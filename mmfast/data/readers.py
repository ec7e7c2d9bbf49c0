"""What all readers share: from a file to tensors and back, and how that is recorded."""

from __future__ import annotations

import dataclasses
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmfast.data.errors import FileError

_READERS = {
    "image": ("mmfast.data.images", "ImageReader"),
    "video": ("mmfast.data.video", "VideoReader"),
    "waveform": ("mmfast.data.audio", "WaveformReader"),
    "mel": ("mmfast.data.audio", "MelReader"),
    "text": ("mmfast.data.text", "TextReader"),
}


@dataclasses.dataclass(frozen=True)
class Reader(ABC):
    """A modality's files as tensors, and the way back. Subclasses' fields are the preprocessing.

    Attributes:
        modality: what it makes.
        source: the kind of file that it reads, several readers' perhaps.
        suffixes: of such files.
        sequential: whether the last dimension is as long as the file is.
        inline: whether manifests can hold what files hold.
        dtype: of the tensors.
    """

    modality: ClassVar[str]
    source: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    sequential: ClassVar[bool] = False
    inline: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    @abstractmethod
    def shape(self) -> tuple[int | None, ...]:
        """Of what :meth:`read` makes; None where it depends on the file."""

    @property
    def padding(self) -> float:
        """What short files are filled up with, and missing ones made of."""
        return 0

    @abstractmethod
    def prepare(self, value: Any, generator: Generator | None = None) -> Tensor:
        """What a file holds, prepared; see the subclass for what ``value`` is."""

    @abstractmethod
    def load(self, path: str | os.PathLike[str], generator: Generator | None = None) -> Tensor:
        """The file's tensor, not yet filled up; arguments and errors as :meth:`read` has them."""

    def read(self, path: str | os.PathLike[str], generator: Generator | None = None) -> Tensor:
        """The file's tensor.

        Args:
            path: of the file.
            generator: for random crops and the like, where the reader has such; None leaves them
                out.

        Raises:
            FileError: the file is empty, damaged, or not what its name says.
            ImportError: the package that reads such files is not installed.
        """
        return self.filled(self.load(path, generator))

    def filled(self, value: Tensor) -> Tensor:
        """Filled up in its last dimension, where the shape says how far."""
        length = self.shape[-1]
        if length is None or value.shape[-1] >= length:
            return value
        return F.pad(value, (0, length - value.shape[-1]), value=self.padding)

    def missing(self) -> Tensor:
        """In the place of a file that a sample lacks; of length 0 where lengths vary."""
        return torch.full([side or 0 for side in self.shape], self.padding, dtype=self.dtype)

    @abstractmethod
    def verify(self, path: str | os.PathLike[str]) -> None:
        """Read all of the file and raise what :meth:`read` may raise."""

    @abstractmethod
    def check_name(self, path: str | os.PathLike[str]) -> None:
        """The name ends in that of a format that :meth:`write` knows.

        Raises:
            ImportError: the package that writes such files is not installed.
            ValueError: it does not.
        """

    @abstractmethod
    def write(self, value: Tensor, path: str | os.PathLike[str]) -> None:
        """The way back, in the format that the name asks for; the file is written whole or not."""

    def describe(self) -> dict[str, Any]:
        """The preprocessing as JSON knows it, for :func:`reader_from`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {"modality": self.modality, **lists}


def reader_from(description: Mapping[str, Any]) -> Reader:
    """The reader that :meth:`Reader.describe` described.

    Raises:
        ValueError: there is no such modality, or it has no such options.
    """
    options = {n: tuple(v) if isinstance(v, list) else v for n, v in description.items()}
    modality = options.pop("modality", None)
    if modality not in _READERS:
        raise ValueError(f"modality must be one of {', '.join(_READERS)}, got {modality!r}")
    module, name = _READERS[modality]
    made = getattr(importlib.import_module(module), name)
    try:
        return made(**options)
    except TypeError as error:
        raise ValueError(f"no description of a reader of modality {modality}: {error}") from None


def readers_from(description: Mapping[str, Any]) -> dict[str, Reader]:
    """Readers by modality, of one reader's description or of a dataset's.

    Raises:
        ValueError: it is neither.
    """
    if "modality" in description:
        reader = reader_from(description)
        return {reader.modality: reader}
    if not isinstance(description.get("modalities"), Mapping):
        raise ValueError(
            f"a description of data must have modality or modalities, got {', '.join(description)}"
        )
    return {name: reader_from(given) for name, given in description["modalities"].items()}


def checked_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file that exists and is not empty.

    Raises:
        FileError: it is not so.
    """
    found = Path(path)
    if not found.is_file():
        raise FileError(path, "is a directory" if found.is_dir() else "no such file")
    try:
        size = found.stat().st_size
        with found.open("rb"):
            pass
    except OSError as error:
        raise FileError(path, f"cannot be opened ({error.strerror})") from None
    if not size:
        raise FileError(path, "is empty")
    return found
