"""What readers raise."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType


class FileError(ValueError):
    """A file that cannot be used.

    Attributes:
        path: of the file.
        reason: in a few words.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)  # both, so that it can be pickled between processes
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@contextlib.contextmanager
def blamed_on(path: str | os.PathLike[str]) -> Iterator[None]:
    """A ValueError of the block becomes a :class:`FileError` of this file, unless it is one."""
    try:
        yield
    except FileError:
        raise
    except ValueError as error:
        raise FileError(path, str(error)) from None


def needed(module: str, extra: str = "train") -> ModuleType:
    """An optional package's module.

    Raises:
        ImportError: it is not installed; the message says which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise ImportError(f"{error}; pip install 'mmfast[{extra}]' brings it") from None
