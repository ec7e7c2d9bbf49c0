"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Files can be made in a folder, which may have to be made itself; nothing is left.

    That is found out by making one: permissions do not tell of file systems that are read-only.

    Raises:
        NotADirectoryError: the folder, or one that it is in, is a file.
        OSError: nothing can be made there.
    """
    folder = Path(path)
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there}: is a file, expected a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"{folder}: nothing can be written to {there}: {why}") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file's path beside ``path``, which takes its place if the block succeeds.

    The bytes are on the disk before the name changes, so that a killed process or a lost machine
    leaves the old file or the new one, never a part.

    Args:
        path: of the file to write; its directory must exist.

    Raises:
        OSError: the directory cannot be written.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` as the file ``path``: all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``path``, which takes its place if the block succeeds.

    Every file in it is on the disk before the name changes. A folder of that name that is there
    already goes away first. What a killed process leaves has a name that starts with a dot.

    Args:
        path: of the folder to write; the directory that it is in must exist.

    Raises:
        OSError: the directory cannot be written.
    """
    target = Path(path)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for file in sorted(temporary.rglob("*"), reverse=True):
            _to_disk(file)
        _to_disk(temporary)
        if target.exists():
            remove_folder(target)
        temporary.replace(target)
        _to_disk(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder, renamed first: a part of it never has its name."""
    target = Path(path)
    going = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    target.replace(going)
    shutil.rmtree(going)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
