"""The data that ``mmfast evaluate`` measures on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset

from mmfast.commands import CommandError
from mmfast.commands.media import told
from mmfast.data import FileError, InMemory, Reader
from mmfast.data.progress import tracked
from mmfast.data.sampling import Loader
from mmfast.data.sources import open_source

Batch = Mapping[str, Tensor]


class HeldOut(NamedTuple):
    """Samples to measure on, and others.

    Attributes:
        name: of the data.
        modality: of the samples, the first if they have several.
        test: of data that the model was trained on, the part that is held out from training; else
            all of it.
        train: what could be trained on.
        classes: names of the labels.
        batch: how many samples are read at a time.
    """

    name: str
    modality: str
    test: Any
    train: Any
    classes: list[str]
    batch: int

    def labelled(self) -> Any:
        """Of what could be trained on, the samples that have a label."""
        if isinstance(self.train, InMemory):
            labels = self.train.tensors.get("label", torch.empty(0, dtype=torch.int64))
        else:
            labels = self.train.labels
        return self.train.subset((labels >= 0).nonzero()[:, 0])

    def some(self, limit: int) -> Any:
        """At most ``limit`` samples of the test part, from all of it."""
        chosen = torch.linspace(0, len(self.test) - 1, self.count(limit)).round().long()
        return Subset(self.test, chosen.tolist())

    def count(self, limit: int) -> int:
        """How many samples :meth:`batches` has."""
        return min(limit, len(self.test))

    def batches(self, limit: int) -> Iterator[Batch]:
        """Those, in batches.

        Raises:
            CommandError: a file is broken.
        """
        loader = Loader(
            self.some(limit),
            self.batch,
            shuffle=False,
            drop_last=False,
            collate_fn=self.train.collate,
        )
        try:
            yield from tracked(loader, "measuring", len(loader))
        except FileError as error:
            raise CommandError(str(error)) from None


def open_held_out(
    wanted: str | None,
    about: Mapping[str, Any],
    readers: Sequence[Reader],
    batch: int,
    *,
    partial: bool = False,
    labelled: bool = True,
    split: bool = False,
) -> HeldOut:
    """The data that is named, or what the model was trained on.

    Args:
        wanted: name of a source, see :func:`mmfast.data.sources.open_source`.
        about: what the model's file says.
        readers: that prepare files for the model.
        batch: samples at a time; one, where their sizes vary.
        partial: samples may lack modalities.
        labelled: labels must be of the model's classes.
        split: hold a part of other data out, too.

    Raises:
        CommandError: there is no such data, or it is broken.
    """
    data = about.get("data") or {}
    name = wanted or data.get("source")
    if name is None:
        raise CommandError("the model's file does not say what it was trained on: give --data")
    with told():
        try:
            train, test, classes = open_source(
                name,
                {reader.modality: reader for reader in readers},
                require=() if partial else None,
                classes=data.get("classes") if labelled else None,
                split=split or _is_own(name, data.get("source")),
            )
        except FileError:
            raise
        except ValueError as error:
            raise CommandError(f"--data {name}: {str(error).splitlines()[0]}") from None
    size = 1 if any(None in reader.shape for reader in readers) else batch
    return HeldOut(name, readers[0].modality, test, train, classes, size)


def _is_own(name: str, source: str | None) -> bool:
    """Whether a model was trained on the data of a name, which has a part held out from that."""
    return source is not None and Path(name).resolve() == Path(source).resolve()
