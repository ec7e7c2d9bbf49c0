"""What several commands' options mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmfast.commands import CommandError
from mmfast.models import Configured, describe_model, load_model
from mmfast.train.run_folder import model_file

M = TypeVar("M", bound=Configured)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, for :func:`device_of`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="to run on (%(default)s)")


def add_tile(parser: argparse.ArgumentParser) -> None:
    """``--tile``, of :mod:`mmfast.models.tiling`."""
    parser.add_argument(
        "--tile",
        type=within(0, 1 << 31),
        metavar="SIDE",
        help="go through large files in tiles of so many pixels or samples; 0: all at once (tiles "
        "of what is large)",
    )


def within(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    return parse


def device_of(given: argparse.Namespace) -> torch.device:
    """The device that was asked for.

    Raises:
        CommandError: it is not there, or no device.
    """
    try:
        device = torch.device(given.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {given.device}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, got {device}")
    return device


def open_model(path: Path, expected: type[M], device: torch.device) -> tuple[M, dict[str, Any]]:
    """The model of a file or of a run's folder, and what the file says ``about`` it.

    Raises:
        CommandError: there is none, it is of another class, or the file is damaged.
    """
    file = model_file(path)
    try:
        return load_model(file, expected, device=device), describe_model(file)["about"]
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from None
