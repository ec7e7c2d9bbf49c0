"""Samples of a MultimodalDiT, and their files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.commands import CommandError
from mmfast.commands.drawing import check_objective, vqvae_of
from mmfast.commands.media import SUFFIXES, check_out, check_samples, told, write_samples
from mmfast.data import Reader, TextReader, readers_from
from mmfast.files import write_whole
from mmfast.models import MultimodalDiffusion, MultimodalDiT
from mmfast.models.modalities import Tokens
from mmfast.train.latents import Latents
from mmfast.train.multimodal import LABEL, modalities_of

_GUIDANCE = 2.0  # by default, of arrays that are made from something


class Maker(NamedTuple):
    """What a MultimodalDiT's file holds.

    Attributes:
        model: the transformer.
        diffusion: what it has learned.
        readers: of its modalities, by name; labels have none.
        classes: names of the labels, if they are a modality.
        about: what the file says.
        latents: in which some of the modalities are.
    """

    model: MultimodalDiT
    diffusion: MultimodalDiffusion
    readers: dict[str, Reader]
    classes: list[str]
    about: dict[str, Any]
    latents: Latents

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    def wanted(self, names: Sequence[str] | None, given: Mapping[str, Tensor]) -> list[str]:
        """What is to be made: all that is not given, if nothing is named.

        Raises:
            CommandError: there is no such modality, or it is given, or nothing is left.
        """
        known = list(self.model.modalities)
        wanted = [name for name in known if name not in given] if names is None else list(names)
        for name in wanted:
            if name not in known:
                raise CommandError(f"--want {name}: the model's modalities are {', '.join(known)}")
            if name in given:
                raise CommandError(f"--want {name}: it is given")
        if not wanted or len(set(wanted)) != len(wanted):
            raise CommandError("--want must name different modalities, at least one")
        return wanted

    def guidance(self, scale: float | None, want: Sequence[str], given: Mapping[str, Any]) -> float:
        """The scale to use."""
        if not given or (scale is None and self._tokens(want)):
            return 1.0
        if self.diffusion.drop == 0:
            if scale not in (None, 1.0):
                raise CommandError(
                    f"--guidance {scale} needs a model that was trained with dropped conditions "
                    "(drop), this one was not"
                )
            return 1.0
        return _GUIDANCE if scale is None else scale

    def _tokens(self, names: Sequence[str]) -> bool:
        return any(isinstance(self.model.modality(name), Tokens) for name in names)

    def check(self, sampler: str | None, steps: int) -> None:
        """The sampler serves, else CommandError."""
        try:
            self.diffusion.diffusion.table(sampler, steps)
        except ValueError as error:
            raise CommandError(str(error)) from None

    def draw(
        self,
        want: Sequence[str],
        given: Mapping[str, Tensor],
        seeds: Tensor,
        *,
        steps: int,
        batch: int,
        guidance: float | None = None,
        sampler: str | None = None,
        progress: bool = True,
    ) -> dict[str, Tensor]:
        """Samples by modality, ``(N, ...)``, on the CPU, ``batch`` at a time.

        Args:
            want: names of the modalities.
            given: others, as a dataset has them, ``(N, ...)``.
            seeds: ``(N,)``, int64, one for each sample.
            steps: of the sampler.
            batch: does not change the samples, but for rounding.
            guidance, sampler: as of ``mmfast sample``.
            progress: show a bar.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in want}
        scale = self.guidance(guidance, want, given)
        for first in range(0, len(seeds), batch):
            few = slice(first, first + batch)
            moved = {name: value[few].to(self.device) for name, value in given.items()}
            data, there = modalities_of(self.model, moved, self.latents)
            drawn = self.diffusion.generate(
                self.model,
                want,
                data,
                batch=len(seeds[few]),
                lengths=there,
                guidance=scale,
                sampler=sampler,
                steps=steps,
                seed=seeds[few],
                progress=progress and sys.stderr.isatty(),
            )
            for name, value in self.latents.decoded(drawn).items():
                parts[name].append(
                    (value.clamp(-1, 1) if value.is_floating_point() else value).cpu()
                )
        return {name: torch.cat(values) for name, values in parts.items()}

    def text_of(self, name: str, ids: Tensor) -> str:
        """What ids ``(L,)`` say."""
        if name == LABEL:
            return self.classes[int(ids[0])]
        reader = self.readers[name]
        assert isinstance(reader, TextReader)
        return reader.decode(ids)

    def check_file(self, name: str, path: Path, count: int) -> None:
        """So many samples of a modality can be written to one file.

        Raises:
            CommandError: they cannot.
        """
        if self._tokens([name]):
            check_out(path)
            if path.suffix.lower() != ".txt":
                raise CommandError(f"{path}: the name of a file of {name} must end in .txt")
        else:
            check_samples(lambda: self.readers[name], path, count)

    def write(self, name: str, values: Tensor, path: Path) -> None:
        """Write samples ``(N, ...)`` of a modality as :meth:`check_file` allows: texts in a line
        each, arrays as a picture of all, or the only one in its own format."""
        if self._tokens([name]):
            lines = [self.text_of(name, ids) for ids in values]
            write_whole(path, ("\n".join(lines) + "\n").encode())
        else:
            write_samples(lambda: self.readers[name], values, path, min(len(values), 8))

    def write_each(self, drawn: Mapping[str, Tensor], folder: Path) -> None:
        """Write each sample of each modality as a file of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in drawn.items():
            suffix = ".txt" if self._tokens([name]) else SUFFIXES[self.readers[name].modality]
            for i in range(len(values)):
                self.write(name, values[i : i + 1], folder / f"{i}-{name}{suffix}")


def maker_of(file: Path, model: MultimodalDiT, about: dict[str, Any]) -> Maker:
    """What the file of a MultimodalDiT holds.

    Args:
        file: of the model.
        model: in it.
        about: what it says.

    Raises:
        CommandError: it does not say what was learned, and of which data.
    """
    check_objective(file, about)
    data = about.get("data") or {}
    try:
        diffusion = MultimodalDiffusion(**about["objective"])
        with told():
            readers = readers_from(data)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{file}: of another version ({error})") from None
    classes = data.get("classes", [])
    known = {*readers, *([LABEL] if classes else [])}
    if known != set(model.modalities):
        raise CommandError(
            f"{file}: its data is of {', '.join(sorted(known))}, the model of "
            f"{', '.join(model.modalities)}"
        )
    device = next(model.parameters()).device
    told_latents = (about.get("latents") or {}).items()
    latents = Latents({name: vqvae_of(file, of["part"], device) for name, of in told_latents})
    return Maker(model, diffusion, readers, classes, about, latents)
