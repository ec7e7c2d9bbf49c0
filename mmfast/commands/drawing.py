"""Samples of the DiT in a model's file."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.commands import CommandError
from mmfast.commands.options import model_file, open_model
from mmfast.models import VQVAE, Diffusion, DiT, load_model

_GUIDANCE = 2.0  # by default, of models that know no class too
_COUNTED = 16  # bits of a seed for the number of a sample in its class


class Drawer(NamedTuple):
    """What a DiT's file holds.

    Attributes:
        dit: the model.
        diffusion: what it has learned.
        vqvae: in whose latents it works, if it does.
        classes: names of the labels.
        about: what the file says.
    """

    dit: DiT
    diffusion: Diffusion
    vqvae: VQVAE | None
    classes: list[str]
    about: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The models'."""
        return next(self.dit.parameters()).device

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, *sizes)`` of a sample."""
        sizes = self.dit.input_size
        if self.vqvae is None:
            return self.dit.in_channels, *sizes
        return self.vqvae.channels, *(size * self.vqvae.downsampling for size in sizes)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """What the model is told of a batch: its labels, no class where there are none.

        Raises:
            CommandError: a label is missing, and the model knows no samples of no class.
        """
        embedder = self.dit.y_embedder
        labels = batch.get("label")
        if embedder.num_classes == 1:
            return torch.zeros(len(next(iter(batch.values()))), dtype=torch.int64).to(self.device)
        if embedder.dropout_prob > 0:
            if labels is None:
                return None
            return torch.where(labels < 0, embedder.num_classes, labels).to(self.device)
        if labels is None or bool((labels < 0).any()):
            raise CommandError("the data lacks labels, and the model takes no samples without")
        return labels.to(self.device)

    def guidance(self, wanted: float | None) -> float:
        """The scale to use.

        Raises:
            CommandError: it is no number, or the model was trained without what guidance needs.
        """
        if wanted is not None and not math.isfinite(wanted):
            raise CommandError(f"--guidance must be a finite number, got {wanted}")
        if self.dit.y_embedder.dropout_prob > 0:
            return _GUIDANCE if wanted is None else wanted
        if wanted not in (None, 1.0):
            raise CommandError(
                f"--guidance {wanted} needs a model that was trained with dropped labels "
                "(class_dropout_prob), this one was not"
            )
        return 1.0

    def check(self, sampler: str | None, steps: int) -> None:
        """The sampler serves.

        Raises:
            CommandError: it is unknown, or not for what the model has learned.
        """
        try:
            self.diffusion.table(sampler, steps)
        except ValueError as error:
            raise CommandError(str(error)) from None

    def draw(
        self,
        labels: Tensor,
        seeds: Tensor,
        *,
        guidance: float,
        sampler: str | None,
        steps: int,
        batch: int,
    ) -> Tensor:
        """Samples ``(N, C, *sizes)`` in [-1, 1], on the CPU, ``batch`` at a time.

        Args:
            labels: ``(N,)``, int64.
            seeds: ``(N,)``, int64, one for each sample.
            guidance, sampler, steps: as :meth:`guidance` and :meth:`check` have taken them.
            batch: does not change the samples, but for rounding.
        """
        drawn = []
        for some, theirs in zip(labels.split(batch), seeds.split(batch), strict=True):
            x = self.diffusion.sample(
                self.dit,
                (len(some), self.dit.in_channels, *self.dit.input_size),
                classes=some,
                guidance=guidance,
                sampler=sampler,
                steps=steps,
                seed=theirs,
                progress=sys.stderr.isatty(),
            )
            drawn.append(self._decoded(x).clamp(-1, 1).cpu())
        return torch.cat(drawn)

    @torch.no_grad()
    def _decoded(self, x: Tensor) -> Tensor:
        return x if self.vqvae is None else self.vqvae.decoder(self.vqvae.quantize(x)[0])


def open_dit(path: Path, device: torch.device) -> Drawer:
    """The DiT of a file or of a run's folder.

    Raises:
        CommandError: it is no DiT's, damaged, or does not say what was learned.
    """
    dit, about = open_model(path, DiT, device)
    file = model_file(path)
    if not about.get("objective"):
        raise CommandError(
            f"{file}: does not say what the model has learned (objective); mmfast train writes it"
        )
    vqvae = None
    if about.get("latents"):
        part = about["latents"]["part"]
        try:
            vqvae = load_model(file, VQVAE, part=part, device=device)
        except (KeyError, TypeError, ValueError) as error:
            raise CommandError(f"{file}: its VQVAE, part {part!r}: {error}") from None
    classes = (about.get("data") or {}).get("classes")
    if not classes:
        classes = [str(i) for i in range(dit.y_embedder.num_classes)]
    try:
        diffusion = Diffusion(**about["objective"])
    except (TypeError, ValueError) as error:
        raise CommandError(f"{file}: an objective of another version ({error})") from None
    return Drawer(dit, diffusion, vqvae, classes, about)


def labels_of(wanted: str | None, classes: Sequence[str]) -> list[int]:
    """The numbers of the classes that are named, all where None.

    Raises:
        CommandError: there is no such class.
    """
    if wanted is None:
        return list(range(len(classes)))
    found = []
    for name in wanted.split(","):
        name = name.strip()
        if name in classes:
            found.append(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            found.append(int(name))
        else:
            few = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise CommandError(f"--classes: there is no class {name!r}, there are {few}")
    return found


def seeds_of(seed: int, labels: Tensor, numbers: Tensor) -> Tensor:
    """A seed for each sample, of its class and its number in it, whichever others are drawn.

    Args:
        seed: of all, below 2^31.
        labels: ``(N,)``, below 2^16.
        numbers: ``(N,)``, likewise.
    """
    return (seed << 2 * _COUNTED) + (labels << _COUNTED) + numbers
