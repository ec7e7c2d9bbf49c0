"""The data that ``mmfast train`` is told to train on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from mmfast.data import Dataset, InMemory, Loader, Reader, reader_from
from mmfast.data.progress import tracked
from mmfast.data.sources import open_source
from mmfast.models import VQVAE
from mmfast.train.about import about_data, modality_of
from mmfast.train.dit import LATENT, latents_of
from mmfast.train.typed import setting

_BATCH = 64  # samples that are encoded at a time


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how it is prepared."""

    data: str = setting("", "mnist, photographs, a folder, or a manifest (.csv, .jsonl)")
    modality: Literal["image", "video", "waveform", "mel"] = setting("image", "of the files")
    size: tuple[int, ...] = setting((32,), "of images and videos: a side, or height and width")
    channels: int | None = setting(None, "of images and videos: 1 or 3 (1 of mnist, else 3)")
    frames: int | None = setting(None, "of a video or mel spectrogram")
    length: int | None = setting(None, "of a waveform, in samples")
    flip: bool = setting(False, "mirror every second image or video of a folder or manifest")
    crop: bool = setting(False, "cut images and videos of a folder or manifest anywhere")
    on_error: Literal["raise", "skip"] = setting("raise", "what to do about unusable files")
    reader: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make_reader(self) -> Reader:
        """What prepares the files; ``reader`` has further options of it.

        Raises:
            ValueError: an option makes no sense.
        """
        options: dict[str, Any] = {}
        if self.modality in ("image", "video"):
            if len(self.size) not in (1, 2):
                raise ValueError(f"size must be a side, or height and width, got {self.size}")
            channels = self.channels or (1 if self.data == "mnist" else 3)
            options = {"size": self.size if len(self.size) == 2 else self.size[0]}
            options |= {"channels": channels, "random_flip": self.flip, "random_crop": self.crop}
        if self.modality in ("video", "mel"):
            options["frames"] = self.frames
        if self.modality == "waveform":
            options["length"] = self.length
        return reader_from({"modality": self.modality, **options, **self.reader})


class Data(NamedTuple):
    """What :func:`open_data` found.

    Attributes:
        train: to train on.
        test: held out.
        about: what the model's file says of it.
        shape: ``(C, ...)`` of a sample.
        classes: how many the labels have; 0 without labels.
        augmented: whether the training data is another each epoch.
    """

    train: Dataset | InMemory
    test: Dataset | InMemory
    about: dict[str, Any]
    shape: tuple[int, ...]
    classes: int
    augmented: bool


def open_data(config: DataConfig, seed: int) -> Data:
    """The data, all samples of one shape; where there are labels, those that have one.

    Args:
        config: which.
        seed: of random crops and the like.

    Raises:
        FileError: there is no such source, or a file cannot be used.
        ImportError: a package is not installed.
        ValueError: an option makes no sense, or samples are of several shapes.
    """
    if not config.data:
        raise ValueError("no data to train on: give --data")
    reader = config.make_reader()
    shape = tuple(side for side in reader.shape if side is not None)
    if len(shape) < len(reader.shape):
        missing = {"video": "frames", "mel": "frames", "waveform": "length"}[config.modality]
        raise ValueError(f"samples must be of one shape: give --{missing}")
    source = open_source(config.data, reader, on_error=config.on_error)
    train, test = source.train, source.test
    augmented = any(v for n, v in reader.describe().items() if n.startswith("random_"))
    if augmented and not isinstance(train, Dataset):
        raise ValueError(f"{config.data} is not cut or mirrored randomly, only files are")
    if isinstance(train, Dataset) and isinstance(test, Dataset):
        if source.classes:
            train, test = (d.subset((d.labels >= 0).nonzero()[:, 0]) for d in (train, test))
        train.augment, train.seed = augmented, seed
    about = about_data(config.data, shape, reader, source.classes)
    return Data(train, test, about, shape, len(source.classes), augmented)


def cached_latents(vqvae: VQVAE, data: Data, device: torch.device) -> InMemory:
    """The latents of all training samples, and their labels.

    Args:
        vqvae: whose.
        data: that is the same each epoch.
        device: to encode on.
    """
    loader = Loader(data.train, _BATCH, shuffle=False, drop_last=False, rank=0, world_size=1)
    vqvae.to(device)
    kept: dict[str, list[torch.Tensor]] = {}
    for batch in tracked(loader, "encoding", len(loader)):
        x = batch[modality_of(data.about)].to(device)
        kept.setdefault(LATENT, []).append(latents_of(vqvae, x).cpu())
        if "label" in batch:
            kept.setdefault("label", []).append(batch["label"])
    return InMemory(**{name: torch.cat(parts) for name, parts in kept.items()})
