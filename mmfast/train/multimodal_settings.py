"""The settings of ``mmfast train multimodal``, and what is made of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mmfast.data import Dataset, InMemory, Reader, TextReader
from mmfast.models import VQVAE, MultimodalDiffusion, MultimodalDiT, load_model
from mmfast.train.batches import collated
from mmfast.train.config import TrainConfig
from mmfast.train.latents import Latents, latent_shape
from mmfast.train.multimodal import LABEL, MultimodalTask
from mmfast.train.run_folder import model_file
from mmfast.train.settings import PICTURES, ObjectiveConfig, Prepared
from mmfast.train.sources import FilesConfig, TextConfig, open_samples
from mmfast.train.typed import check_least, setting

_FILES = ("image", "video", "waveform", "mel")
Measured = tuple[float, float] | tuple[list[float], list[float]]  # a number, or of each channel

_MEASURED = 256  # samples whose mean and deviation the model is given


@dataclass(frozen=True)
class MultimodalDataConfig(FilesConfig):
    """Data of several modalities; ``readers`` has further options of their readers, by name."""

    modalities: tuple[str, ...] = setting(
        ("image", "text"), f"of the samples: {', '.join(_FILES)}, text, label"
    )
    readers: dict[str, Any] = field(default_factory=dict)

    def make_readers(self, text: TextConfig) -> dict[str, Reader]:
        """What prepares the files.

        Raises:
            FileError: the tokenizer or a text cannot be read.
            ImportError: tokenizers is not installed.
            ValueError: an option makes no sense, or there are no such modalities.
        """
        known = (*_FILES, "text", LABEL)
        for name in self.modalities:
            if name not in known:
                raise ValueError(f"modalities must be of {', '.join(known)}, got {name!r}")
        of_files = [name for name in self.modalities if name != LABEL]
        if len(set(self.modalities)) != len(self.modalities) or not of_files:
            given = ", ".join(self.modalities) or "none"
            raise ValueError(f"modalities must be different ones, not only label, got {given}")
        for name in self.readers:
            if name not in of_files:
                raise ValueError(f"readers has {name!r}, modalities has {', '.join(of_files)}")
        return {
            name: text.make_reader(self)
            if name == "text"
            else self.reader_of(name, self.readers.get(name, {}))
            for name in of_files
        }


@dataclass(frozen=True)
class MultimodalConfig:
    """A transformer over several modalities."""

    hidden_size: int = setting(384, "channels of the tokens")
    depth: int = setting(12, "blocks")
    num_heads: int = setting(6, "of the attention")
    patch_size: int = setting(4, "of images' and videos' sides, and of a spectrogram's frames")
    waveform_patch: int = setting(64, "samples of a waveform that are a token")
    vqvaes: tuple[str, ...] = setting(
        (), "NAME=FILE: modalities that are made in the latents of a VQ-VAE, its file or run"
    )
    latent_patch: int = setting(1, "side of what is a token of those")
    guidance: float = setting(2.0, "of the samples that are shown")
    sampler: str | None = setting(None, "of those; docs/samplers.md has them")
    sampler_steps: int = setting(25, "of those")

    def __post_init__(self) -> None:
        check_least(self, hidden_size=1, depth=1, num_heads=1, sampler_steps=1)
        check_least(self, patch_size=1, waveform_patch=1, latent_patch=1)

    def latents(self, data: MultimodalData, device: torch.device) -> Latents:
        """Those of ``vqvaes``.

        Raises:
            FileNotFoundError: there is no such VQ-VAE.
            ValueError: it is of no such modality, or for other data.
        """
        found: dict[str, VQVAE] = {}
        arrays = [n for n, reader in data.readers.items() if not isinstance(reader, TextReader)]
        for word in self.vqvaes:
            name, _, path = word.partition("=")
            if name not in arrays or name in found or not path:
                raise ValueError(
                    "vqvaes must be NAME=FILE, each for another one of "
                    f"{', '.join(arrays) or 'no modality'}, got {', '.join(self.vqvaes)}"
                )
            found[name] = load_model(model_file(path), VQVAE, device=device)
            latent_shape(found[name], {"shape": data.readers[name].shape})
        return Latents(found)

    def described(
        self, data: MultimodalData, measured: dict[str, Measured], latents: Latents
    ) -> dict[str, dict[str, Any]]:
        """The modalities as :class:`mmfast.models.MultimodalDiT` takes them.

        Args:
            data: of the modalities.
            measured: mean and deviation of those of floating numbers.
            latents: in which some are.

        Raises:
            ValueError: a VQ-VAE is for other data.
        """
        made: dict[str, dict[str, Any]] = {}
        for name, reader in data.readers.items():
            if isinstance(reader, TextReader):
                made[name] = {
                    "type": "tokens",
                    "codes": reader.vocab_size,
                    "length": reader.length,
                }
                continue
            channels, *size = latent_shape(latents.vqvaes.get(name), {"shape": reader.shape})
            side = self.waveform_patch if name == "waveform" else self.patch_size
            patch = [1, side, side] if name == "video" else [side] * len(size)
            if name in latents.vqvaes:
                patch = [self.latent_patch] * len(size)
            mean, std = measured[name]
            made[name] = {"type": "patches", "size": size, "channels": channels}
            made[name] |= {"patch_size": patch, "mean": mean, "std": std}
        if data.labelled:
            made[LABEL] = {"type": "tokens", "codes": len(data.classes), "length": 1}
        return made


@dataclass(frozen=True)
class MultimodalObjectiveConfig(ObjectiveConfig):
    """What a multimodal diffusion model learns; ``weights`` are those of modalities' losses."""

    target: float = setting(0.5, "probability that a modality is to be generated")
    drop: float = setting(0.1, "probability that a condition is dropped, for guidance")
    weights: dict[str, Any] = field(default_factory=dict)

    def made_for(self, names: list[str]) -> MultimodalDiffusion:
        """The objective.

        Args:
            names: of the modalities.

        Raises:
            ValueError: options do not go together.
        """
        for name, weight in self.weights.items():
            if name not in names:
                raise ValueError(f"weights has {name!r}, modalities are {', '.join(names)}")
            if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"weights must be numbers from 0, got {weight!r} of {name}")
        return MultimodalDiffusion(self.make(), self.target, self.drop, self.weights)


class MultimodalData(NamedTuple):
    """What is trained on.

    Attributes:
        train: to train on.
        test: held out.
        readers: of the modalities, by name.
        classes: names of the labels; empty without labels.
        labelled: whether the labels are a modality.
        about: what the model's file says of it.
    """

    train: Dataset | InMemory
    test: Dataset | InMemory
    readers: dict[str, Reader]
    classes: list[str]
    labelled: bool
    about: dict[str, Any]


@dataclass(frozen=True)
class MultimodalRun:
    """Settings of ``mmfast train multimodal``."""

    data: MultimodalDataConfig = field(default_factory=MultimodalDataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: MultimodalConfig = field(default_factory=MultimodalConfig)
    objective: MultimodalObjectiveConfig = field(default_factory=MultimodalObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def open(self) -> MultimodalData:
        """The data, in which samples may lack modalities.

        Raises:
            FileError: there is no such source, or a file cannot be used.
            ImportError: a package is not installed.
            ValueError: an option makes no sense, or there are no labels though they are wanted.
        """
        if not self.data.data:
            raise ValueError("no data to train on: give --data")
        readers = self.data.make_readers(self.text)
        train, test, classes, _ = open_samples(self.data, readers, self.train.seed, partial=True)
        labelled = LABEL in self.data.modalities
        if labelled and not classes:
            raise ValueError(f"modalities has {LABEL}, but {self.data.data} has no labels")
        for name in readers:
            if isinstance(train, Dataset) and not any(name in r.sources for r in train.records):
                raise ValueError(f"no sample of {self.data.data} has the modality {name}")
        about = {
            "source": self.data.data,
            "modalities": {name: reader.describe() for name, reader in readers.items()},
            **({"classes": classes} if labelled else {}),
        }
        # As they come from a file: lists, not tuples.
        about = json.loads(json.dumps(about))
        return MultimodalData(train, test, readers, classes, labelled, about)

    def prepare(self, data: MultimodalData, device: torch.device) -> Prepared:
        """The task.

        Raises:
            FileNotFoundError: there is no such VQ-VAE.
            ValueError: settings do not fit each other or the data.
        """
        config = self.model
        latents = config.latents(data, device)
        measured = _measured(data, latents, device)
        torch.manual_seed(self.train.seed)
        model = MultimodalDiT(
            config.described(data, measured, latents),
            config.hidden_size,
            config.depth,
            config.num_heads,
        )
        task = MultimodalTask(
            model,
            self.objective.made_for(list(model.modalities)),
            data.about,
            latents=latents,
            shown=collated(data.test, range(min(PICTURES, len(data.test)))),
            guidance=config.guidance,
            sampler=config.sampler,
            sampler_steps=config.sampler_steps,
        )
        return Prepared(task, data.train)


def _measured(data: MultimodalData, latents: Latents, device: torch.device) -> dict[str, Measured]:
    """Mean and deviation of what is floating numbers, in some of the training samples that have
    it: of latents in each channel."""
    made: dict[str, Measured] = {}
    for name, reader in data.readers.items():
        if isinstance(reader, TextReader):
            continue
        whole: Any = data.train
        if isinstance(whole, Dataset):
            has = [i for i, record in enumerate(whole.records) if name in record.sources]
        else:
            has = list(range(len(whole)))
        chosen = torch.linspace(0, len(has) - 1, min(_MEASURED, len(has))).round().long()
        values = collated(whole, [has[i] for i in chosen.tolist()])[name]
        if name in latents.vqvaes:
            values = latents.encoded({name: values.to(device)})[name]
            channels = values.double().transpose(0, 1).flatten(1)
            std = channels.std(1, unbiased=False)
            made[name] = channels.mean(1).tolist(), torch.where(std > 0, std, 1.0).tolist()
        else:
            values = values.double()
            made[name] = values.mean().item(), values.std(unbiased=False).item() or 1.0
    return made
