"""Which files belong to which sample: folders and manifests."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfast.data.errors import FileError
from mmfast.data.readers import Reader
from mmfast.data.text_files import read_text


@dataclass
class Record:
    """A sample's sources.

    Attributes:
        name: that tells it from all others.
        sources: by modality, a file, or the text itself.
        label: the name of its class, None where it has none.
    """

    name: str
    sources: dict[str, Path | str]
    label: str | None = None


@dataclass
class Found:
    """What a folder or a manifest holds.

    Attributes:
        records: the samples.
        refused: files that belong nowhere, and why.
        ignored: files that no reader reads.
    """

    records: list[Record]
    refused: list[FileError] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)


def scan_folder(
    root: str | os.PathLike[str], readers: Mapping[str, Reader], labels: bool | None = None
) -> Found:
    """The samples in a folder: files of one name but for the ending belong together.

    Args:
        root: of the folder; folders in it are looked through, hidden files are not.
        readers: by modality; which files one reads, its ``suffixes`` say.
        labels: whether the folders right under the root are classes; None: if no file lies outside
            of such.

    Raises:
        FileError: there is no such folder.
    """
    top = Path(root)
    if not top.is_dir():
        raise FileError(root, "no such folder")
    found = Found([])
    records: dict[str, Record] = {}
    for path in _files(top):
        names = [n for n, reader in readers.items() if path.suffix.lower() in reader.suffixes]
        if not names:
            found.ignored.append(path)
            continue
        sample = path.relative_to(top).with_suffix("").as_posix()
        record = records.setdefault(sample, Record(sample, {}))
        for name in names:
            other = record.sources.setdefault(name, path)
            if other is not path:
                reason = f"is a second {name} of sample {sample}, beside {Path(other).name}"
                found.refused.append(FileError(path, reason))
    found.records = list(records.values())
    if labels is None:
        labels = all("/" in record.name for record in found.records)
    if labels:
        for record in found.records:
            folder, slash, _ = record.name.partition("/")
            record.label = folder if slash else None
    return found


def _files(top: Path) -> Iterator[Path]:
    """All that are not hidden, sorted."""
    for path in sorted(top.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def read_manifest(path: str | os.PathLike[str], readers: Mapping[str, Reader]) -> Found:
    """The samples of a CSV file with a header, or of a file of one JSON object a line.

    Columns are named by modality and hold paths, relative to the manifest; ``text`` holds the text
    itself, ``text_file`` the path of a text. Several readers of one kind of file, such as
    ``waveform`` and ``mel``, may share its column, ``audio``. Further columns: ``label`` and
    ``name``. What is empty or not there is missing.

    Args:
        path: of the manifest, which ends in .csv, .jsonl or .json.
        readers: by modality.

    Raises:
        FileError: the manifest cannot be read, has no column for a reader, or a line that is none.
    """
    file = Path(path)
    rows = list(_rows(file))
    columns = {column for row in rows for column in row}
    sources = {name: _columns(name, reader) for name, reader in readers.items()}
    for candidates in sources.values():
        if not columns & set(candidates):
            raise FileError(
                path, f"has no column {' or '.join(candidates)}, only {', '.join(sorted(columns))}"
            )
    found = Found([])
    for number, row in enumerate(rows, 1):
        record = Record(str(row.get("name") or number), {}, row.get("label"))
        for name, candidates in sources.items():
            for column in candidates:
                if row.get(column):
                    inline = column in (name, readers[name].source) and readers[name].inline
                    value = row[column]
                    record.sources[name] = value if inline else file.parent / value
                    break
        found.records.append(record)
    return found


def _columns(name: str, reader: Reader) -> list[str]:
    """Where a reader looks, the first that has something counts."""
    names = list(dict.fromkeys((name, reader.source)))
    return names + [f"{n}_file" for n in names] if reader.inline else names


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """What each line says, as text; what says nothing is left out."""
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        lines = _csv(path, text)
    elif suffix in (".jsonl", ".json"):
        lines = _json(path, text)
    else:
        raise FileError(path, "is no manifest: the name must end in .csv or .jsonl")
    for number, row in lines:
        for key, value in row.items():
            if not isinstance(value, str | int | float | None):
                kind = type(value).__name__
                raise FileError(path, f"line {number}: {key} must be text or a number, is {kind}")
        yield {key: str(value) for key, value in row.items() if value not in (None, "")}


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of lines, and what they hold."""
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            # So it says that there are too many columns, or too few.
            if None in row or None in row.values():
                reason = f"line {rows.line_num}: has not as many columns as the header"
                raise FileError(path, reason)
            yield rows.line_num, row
    except csv.Error as error:
        raise FileError(path, f"line {rows.line_num}: {error}") from None


def _json(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of lines, and what they hold."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FileError(path, f"line {number}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise FileError(path, f"line {number}: must be an object, is {type(row).__name__}")
        yield number, row
