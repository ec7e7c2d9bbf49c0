"""The folder of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfast.files import write_whole
from mmfast.train.checkpoint import checkpoints

CONFIG = "config.json"
MODEL = "model.safetensors"
LOG = "log.csv"


def model_file(path: Path | str) -> Path:
    """``path``, or the model's file in it if it is a run's folder."""
    path = Path(path)
    return path / MODEL if path.is_dir() else path


def holds_run(folder: Path) -> bool:
    """Whether a run has been started in a folder."""
    return (folder / CONFIG).exists() or (folder / MODEL).exists() or bool(checkpoints(folder))


def check_free(folder: Path, resume: bool) -> None:
    """The folder may be written by this run.

    Raises:
        FileExistsError: it holds another run, and this one does not resume it.
        NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file, expected a folder for the run")
    if holds_run(folder) and not resume:
        raise FileExistsError(
            f"{folder}: holds a run already; resume it (--resume), or name another folder"
        )


def claim(folder: Path, resume: bool) -> None:
    """Make the folder, or clear away what a killed process has left half written in it.

    Raises:
        FileExistsError, NotADirectoryError: as :func:`check_free`.
    """
    check_free(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, MODEL, LOG):
        for left in folder.glob(f".{name}.*"):
            left.unlink()


def write_config(folder: Path, described: Mapping[str, Any]) -> None:
    """Write ``config.json``."""
    write_whole(folder / CONFIG, json.dumps(described, indent=2).encode() + b"\n")
