"""Samples of named modalities, from files."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Generator, Tensor

from mmfast.checks import check_choice
from mmfast.data.collate import collate
from mmfast.data.errors import FileError, blamed_on
from mmfast.data.memory import InMemory
from mmfast.data.progress import tracked
from mmfast.data.readers import Reader
from mmfast.data.records import Found, Record, read_manifest, scan_folder
from mmfast.data.report import Report

Sample = dict[str, Tensor]
_FEW = 1000  # classes, of which most may be missing


class Dataset(torch.utils.data.Dataset[Sample]):
    """Samples whose modalities come from files; see :meth:`from_folder`, :meth:`from_manifest`.

    A sample is a dict of a tensor for each modality, of ``<modality>_length`` (int64) for sound and
    text, and of ``label`` (int64), the index in ``classes``, where there are labels. If any sample
    lacks a modality, all have ``<modality>_present`` (bool): what is missing is of the same shape,
    filled with the reader's padding, of length 0 where lengths vary; a missing label is -1.

    Args:
        found: the samples.
        readers: by modality.
        on_error: what to do about files that are empty, damaged or not what their name says:
            ``"raise"`` a :class:`FileError`, or ``"skip"`` them, so that their samples lack a
            modality, and print :attr:`report`.
        verify: read all files once, before the first is used. Otherwise only their presence is
            checked, all samples have ``<modality>_present``, and what is skipped is told by a
            warning when it is met.
        require: modalities, or ``"label"``, that no sample may lack; others are left out. What has
            no modality at all always is.
        classes: names of the classes; by default those that occur, sorted, or, if all are whole
            numbers, the numbers from 0 to the largest; of more than 1000 numbers of which less than
            a tenth occur, those that do.
        augment: whether readers crop and flip randomly, if made so.
        seed: of that; what a sample's random numbers are depends on it, the epoch and the sample's
            name alone.

    Attributes:
        records: the samples' names, sources and labels.
        report: a :class:`Report`.

    Raises:
        FileError: a file cannot be used, and ``on_error`` is ``"raise"``.
        ValueError: there are no readers, or no samples.
    """

    def __init__(
        self,
        found: Found,
        readers: Mapping[str, Reader],
        *,
        on_error: str = "raise",
        verify: bool = True,
        require: Sequence[str] = (),
        classes: Sequence[str] | None = None,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        check_choice("on_error", on_error, ("raise", "skip"))
        if not readers:
            raise ValueError("a dataset needs at least one reader")
        for name in require:
            check_choice("require", name, (*readers, "label"))
        self.readers, self.on_error, self.verified = dict(readers), on_error, verify
        self.augment, self.seed = augment, seed
        given = {record.label for record in found.records} - {None}
        self.classes = list(classes) if classes is not None else _sorted([*map(str, given)])
        self._class = {name: i for i, name in enumerate(self.classes)}

        self._refused: list[FileError] = []
        for error in found.refused:
            self._refuse(error)
        usable = self._usable(found.records)
        left_out = [record.name for record in usable if self._lacks(record, require)]
        self.records = [record for record in usable if not self._lacks(record, require)]
        missing = {name: sum(name not in r.sources for r in self.records) for name in readers}
        missing["label"] = sum(r.label is None for r in self.records) if self.classes else 0
        ignored = [str(path) for path in found.ignored]
        self.report = Report(len(self.records), self._refused, left_out, missing, ignored)
        if self._refused or left_out:
            together = torch.distributed.is_available() and torch.distributed.is_initialized()
            if not together or torch.distributed.get_rank() == 0:
                self.report.show()
        if not self.records:
            nothing = f"there are no files for {', '.join(readers)}"
            looked = found.records or found.refused or found.ignored
            raise ValueError(f"no samples: {self.report if looked else nothing}")
        self.partial = not verify or any(missing.values())

    @classmethod
    def from_folder(
        cls,
        root: str | os.PathLike[str],
        readers: Mapping[str, Reader],
        *,
        labels: bool | None = None,
        **options: Any,
    ) -> Dataset:
        """The files in a folder; those of one name but for the ending are one sample.

        Args:
            root: of the folder; the folders in it are looked through, too.
            readers: by modality, such as ``{"image": ImageReader(32), "text": TextReader(...)}``.
            labels: whether the folders right under the root are classes; None: if no file lies
                outside of such.
            options: of :class:`Dataset`.

        Raises:
            FileError, ValueError: see :class:`Dataset`; or there is no such folder.
        """
        return cls(scan_folder(root, readers, labels), readers, **options)

    @classmethod
    def from_manifest(
        cls, path: str | os.PathLike[str], readers: Mapping[str, Reader], **options: Any
    ) -> Dataset:
        """The samples of a CSV or JSONL file; see :func:`mmfast.data.read_manifest`.

        Args:
            path: of the manifest; paths in it are relative to it.
            readers: by modality, which columns are named by.
            options: of :class:`Dataset`.

        Raises:
            FileError, ValueError: see :class:`Dataset`; or the manifest is damaged.
        """
        return cls(read_manifest(path, readers), readers, **options)

    def _refuse(self, error: FileError) -> None:
        if self.on_error == "raise":
            raise error
        self._refused.append(error)

    def _usable(self, records: Sequence[Record]) -> list[Record]:
        """Records without the sources and labels that cannot be used."""

        def check(record: Record) -> tuple[Record, list[FileError]]:
            errors, sources = [], {}
            for name, source in record.sources.items():
                try:
                    self._check(name, source, record)
                    sources[name] = source
                except FileError as error:
                    errors.append(error)
            label = record.label
            if label is not None and label not in self._class:
                known = ", ".join(self.classes)
                errors.append(FileError(record.name, f"label {label!r} is none of {known}"))
                label = None
            return replace(record, sources=sources, label=label), errors

        usable = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            checked = pool.map(check, records)
            for record, errors in tracked(checked, "checking files", len(records)):
                for error in errors:
                    self._refuse(error)
                usable.append(record)
        return usable

    def _check(self, name: str, source: Path | str, record: Record) -> None:
        """Read a source, or just see whether it is there."""
        if self.verified and isinstance(source, Path):
            self.readers[name].verify(source)
        elif self.verified:
            self._load(name, source, record, None)
        elif isinstance(source, Path) and not source.is_file():
            raise FileError(source, "no such file")

    @staticmethod
    def _lacks(record: Record, require: Sequence[str]) -> bool:
        has = {*record.sources, *(["label"] if record.label is not None else [])}
        return not record.sources or not has.issuperset(require)

    def _load(
        self, name: str, source: Path | str, record: Record, generator: Generator | None
    ) -> Tensor:
        """A modality of a record, not filled up."""
        if isinstance(source, Path):
            return self.readers[name].load(source, generator)
        with blamed_on(f"{record.name} ({name})"):
            return self.readers[name].prepare(source, generator)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record, epoch = self.records[index], getattr(index, "epoch", 0)
        sample = {}
        for name, reader in self.readers.items():
            value = self._value(name, record, epoch)
            sample[name] = reader.missing() if value is None else reader.filled(value)
            if reader.sequential:
                length = 0 if value is None else value.shape[-1]
                sample[f"{name}_length"] = torch.tensor(length)
            if self.partial:
                sample[f"{name}_present"] = torch.tensor(value is not None)
        if self.classes:
            sample["label"] = self._label(record)
        return sample

    def _value(self, name: str, record: Record, epoch: int) -> Tensor | None:
        if name not in record.sources:
            return None
        generator = None
        if self.augment:
            what = f"{self.seed} {epoch} {name} {record.name}"
            generator = Generator().manual_seed(zlib.crc32(what.encode()))
        try:
            return self._load(name, record.sources[name], record, generator)
        except FileError as error:
            if self.on_error == "raise" or self.verified:
                raise
            warnings.warn(f"skipped {error}", stacklevel=2)
            return None

    def _label(self, record: Record) -> Tensor:
        return torch.tensor(-1 if record.label is None else self._class[record.label])

    @property
    def labels(self) -> Tensor:
        """int64 ``(N,)``: of all samples, -1 where there is none."""
        return torch.tensor([-1 if r.label is None else self._class[r.label] for r in self.records])

    @property
    def collate(self) -> Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]:
        """For a DataLoader: :func:`mmfast.data.collate` with the readers' padding."""
        return _Collate({name: reader.padding for name, reader in self.readers.items()})

    def subset(self, indices: Sequence[int] | Tensor) -> Dataset:
        """A dataset of some of the samples, as this one has them."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.records = [self.records[int(i)] for i in indices]
        return made

    def in_memory(self) -> InMemory:
        """All samples read, as tensors; random crops are those of the first epoch."""
        samples = (self[i] for i in range(len(self)))
        return InMemory(**self.collate(list(tracked(samples, "reading", len(self)))))

    def describe(self) -> dict[str, Any]:
        """How the data is prepared, as JSON knows it; :func:`readers_from` makes it readers."""
        described: dict[str, Any] = {
            "modalities": {name: reader.describe() for name, reader in self.readers.items()}
        }
        if self.classes:
            described["classes"] = self.classes
        return described


class _Collate:
    """A picklable function."""

    def __init__(self, padding: Mapping[str, float]) -> None:
        self.padding = padding

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return collate(samples, self.padding)


def _sorted(names: Sequence[str]) -> list[str]:
    """In the alphabet's order, numbers as themselves; where hardly any occur, in their order."""
    if not names or not all(name.isdecimal() and str(int(name)) == name for name in names):
        return sorted(names)
    count = 1 + max(map(int, names))
    if count > max(_FEW, 10 * len(names)):
        return sorted(names, key=int)
    return [str(i) for i in range(count)]
