"""Conditions of samples: files, texts and classes that a command is given."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmfast.commands import CommandError
from mmfast.commands.drawing import labels_of
from mmfast.commands.media import told
from mmfast.data import Reader
from mmfast.data.errors import blamed_on
from mmfast.train.multimodal import LABEL


def add_given(parser: argparse._ActionsContainer) -> None:
    """``--given`` and ``--text``, for :func:`read_given`."""
    parser.add_argument(
        "--given",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="what samples are made from, by modality: image=a.png, mel=a.wav, text=a.txt; "
        "label=CLASS",
    )
    parser.add_argument("--text", help="a text itself, in place of --given text=FILE")


def read_given(
    given: argparse.Namespace, readers: Mapping[str, Reader], classes: Sequence[str] = ()
) -> dict[str, Tensor]:
    """A batch of one sample with what is given, as a :class:`mmfast.data.Dataset` has it.

    Args:
        given: the command line.
        readers: of the modalities that may be given.
        classes: names of the labels, where one may be given.

    Raises:
        CommandError: there is no such modality or class, a file cannot be read, or one modality is
            given twice.
    """
    names = [*readers, *([LABEL] if classes else [])]
    words = [(*_pair(word), False) for word in given.given]
    words += [] if given.text is None else [("text", given.text, True)]
    batch: dict[str, Tensor] = {}
    for name, value, inline in words:
        if name not in names:
            known = ", ".join(names) or "nothing"
            raise CommandError(f"{name} cannot be given, the model takes {known}")
        if name in batch:
            raise CommandError(f"{name} is given twice")
        if name == LABEL:
            labels = labels_of(value, classes, f"--given {LABEL}")
            if len(labels) != 1:
                raise CommandError(f"--given {LABEL}: must be one class, got {value!r}")
            batch[LABEL] = torch.tensor(labels)
            continue
        reader = readers[name]
        with told(), blamed_on("--text" if inline else value):
            read = reader.prepare(value) if inline else reader.load(Path(value))
        batch[name] = reader.filled(read)[None]
        if reader.sequential:
            batch[f"{name}_length"] = torch.tensor([read.shape[-1]])
    return batch


def _pair(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (equals and name and value):
        raise CommandError(f"--given must be NAME=FILE, such as image=a.png, got {word!r}")
    return name, value
