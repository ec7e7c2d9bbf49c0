"""The data that ``mmfast train`` is told to train on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmfast.data import (
    Dataset,
    InMemory,
    Loader,
    Reader,
    TextReader,
    load_tokenizer,
    reader_from,
    texts_in,
    train_tokenizer,
)
from mmfast.data.progress import tracked
from mmfast.data.sources import NAMES, open_source
from mmfast.train.about import about_data
from mmfast.train.context import Context
from mmfast.train.latents import AT_ONCE
from mmfast.train.typed import setting

_UNSHAPED = {"video": "frames", "mel": "frames", "waveform": "length"}  # what gives them a shape


@dataclass(frozen=True)
class FilesConfig:
    """Which data, and how its files are prepared."""

    data: str = setting("", "mnist, photographs, a folder, or a manifest (.csv, .jsonl)")
    size: tuple[int, ...] = setting((32,), "of images and videos: a side, or height and width")
    channels: int | None = setting(None, "of images and videos: 1 or 3 (1 of mnist, else 3)")
    frames: int | None = setting(None, "of a video or mel spectrogram")
    length: int | None = setting(None, "of a waveform, in samples")
    flip: bool = setting(False, "mirror every second image or video of a folder or manifest")
    crop: bool = setting(False, "cut images and videos of a folder or manifest anywhere")
    on_error: Literal["raise", "skip"] = setting("raise", "what to do about unusable files")

    def reader_of(self, modality: str, further: Mapping[str, Any]) -> Reader:
        """What prepares the files of a modality, all samples of one shape.

        Args:
            modality: image, video, waveform or mel.
            further: options of the reader.

        Raises:
            ValueError: an option makes no sense, or the shape depends on the file.
        """
        options: dict[str, Any] = {}
        if modality in ("image", "video"):
            if len(self.size) not in (1, 2):
                raise ValueError(f"size must be a side, or height and width, got {self.size}")
            channels = self.channels or (1 if self.data == "mnist" else 3)
            options = {"size": self.size if len(self.size) == 2 else self.size[0]}
            options |= {"channels": channels, "random_flip": self.flip, "random_crop": self.crop}
        if modality in ("video", "mel"):
            options["frames"] = self.frames
        if modality == "waveform":
            options["length"] = self.length
        reader = reader_from({"modality": modality, **options, **further})
        if None in reader.shape:
            raise ValueError(f"samples must be of one shape: give --{_UNSHAPED[modality]}")
        return reader


@dataclass(frozen=True)
class DataConfig(FilesConfig):
    """Data of one modality; ``reader`` has further options of its reader."""

    modality: Literal["image", "video", "waveform", "mel"] = setting("image", "of the files")
    reader: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make_reader(self) -> Reader:
        """What prepares the files.

        Raises:
            ValueError: as of :meth:`FilesConfig.reader_of`.
        """
        return self.reader_of(self.modality, self.reader)


@dataclass(frozen=True)
class TextConfig:
    """How texts become tokens."""

    tokenizer: str | None = setting(
        None, "file of the tokenizers package, such as tokenizer.json (learned from the texts)"
    )
    vocab_size: int = setting(1000, "tokens at most, of a tokenizer that is learned")
    text_length: int = setting(32, "tokens of a text at most; longer ones are cut")

    def make_reader(self, files: FilesConfig) -> TextReader:
        """What prepares the texts.

        Args:
            files: the data, of whose texts a tokenizer is learned if none is given.

        Raises:
            FileError: the tokenizer or a text cannot be read.
            ImportError: tokenizers is not installed.
            ValueError: a number is too small.
        """
        if self.tokenizer is not None:
            return TextReader(load_tokenizer(self.tokenizer), self.text_length)
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        if files.data in NAMES:
            raise ValueError(f"{files.data} are images, there are no texts with them")
        texts = texts_in(files.data, on_error=files.on_error)
        return TextReader(train_tokenizer(texts, self.vocab_size), self.text_length)


class Opened(NamedTuple):
    """Samples of one modality or several.

    Attributes:
        train: to train on.
        test: held out.
        classes: names of the labels; empty without labels.
        augmented: whether the training data is another each epoch.
    """

    train: Dataset | InMemory
    test: Dataset | InMemory
    classes: list[str]
    augmented: bool


def open_samples(
    config: FilesConfig,
    readers: Mapping[str, Reader],
    seed: int,
    *,
    partial: bool = False,
) -> Opened:
    """The samples, those that have a label where there are labels.

    Args:
        config: which.
        readers: that prepare them, by modality.
        seed: of random crops and the like.
        partial: modalities and labels may be missing.

    Raises:
        FileError: there is no such source, or a file cannot be used.
        ImportError: a package is not installed.
        ValueError: an option makes no sense.
    """
    if not config.data:
        raise ValueError("no data to train on: give --data")
    require = () if partial else None
    source = open_source(config.data, readers, require=require, on_error=config.on_error)
    train, test = source.train, source.test
    described = [reader.describe() for reader in readers.values()]
    augmented = any(v for one in described for n, v in one.items() if n.startswith("random_"))
    if augmented and not isinstance(train, Dataset):
        raise ValueError(f"{config.data} is not cut or mirrored randomly, only files are")
    if isinstance(train, Dataset) and isinstance(test, Dataset):
        if source.classes and not partial:
            train, test = (d.subset((d.labels >= 0).nonzero()[:, 0]) for d in (train, test))
        train.augment, train.seed = augmented, seed
    return Opened(train, test, source.classes, augmented)


class Data(NamedTuple):
    """What :func:`open_data` found.

    Attributes:
        train, test, augmented: of :class:`Opened`.
        about: what the model's file says of it.
        shape: ``(C, ...)`` of a sample.
        classes: how many the labels have; 0 without labels.
        context: another modality that samples have, for a model that is conditioned on it.
    """

    train: Dataset | InMemory
    test: Dataset | InMemory
    about: dict[str, Any]
    shape: tuple[int, ...]
    classes: int
    augmented: bool
    context: Context | None = None


def open_data(config: DataConfig, seed: int, context: Context | None = None) -> Data:
    """The data, all samples of one shape; where there are labels, those that have one.

    Args:
        config: which.
        seed: of random crops and the like.
        context: another modality, that all samples must have.

    Raises:
        FileError: there is no such source, or a file cannot be used.
        ImportError: a package is not installed.
        ValueError: an option makes no sense, or samples are of several shapes.
    """
    reader = config.make_reader()
    readers = {reader.modality: reader}
    if context is not None:
        if context.modality in readers:
            raise ValueError(f"the condition must be of another modality than {context.modality}")
        readers[context.modality] = context.reader
    train, test, classes, augmented = open_samples(config, readers, seed)
    shape = tuple(side for side in reader.shape if side is not None)
    about = about_data(config.data, shape, reader, classes)
    return Data(train, test, about, shape, len(classes), augmented, context)


def cached(
    encode: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    data: Dataset | InMemory,
    device: torch.device,
) -> InMemory:
    """What ``encode`` makes of all samples, kept on the CPU.

    Args:
        encode: makes named tensors of a batch on ``device``.
        data: that is the same each epoch.
        device: to encode on.
    """
    loader = Loader(data, AT_ONCE, shuffle=False, drop_last=False, rank=0, world_size=1)
    kept: dict[str, list[Tensor]] = {}
    for batch in tracked(loader, "encoding", len(loader)):
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        for name, tensor in encode(moved).items():
            kept.setdefault(name, []).append(tensor.cpu())
    return InMemory(**{name: torch.cat(parts) for name, parts in kept.items()})
