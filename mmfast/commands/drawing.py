"""Samples of the DiT or ConditionalDiT in a model's file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.commands import CommandError
from mmfast.models import VQVAE, ConditionalDiT, Configured, Diffusion, DiT, load_model
from mmfast.train.context import Context, context_from
from mmfast.train.dit import check_scale, dropout_of
from mmfast.train.latents import decoded

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
        context: what a ConditionalDiT is conditioned on; None of a DiT.
    """

    dit: DiT | ConditionalDiT
    diffusion: Diffusion
    vqvae: VQVAE | None
    classes: list[str]
    about: dict[str, Any]
    context: Context | None = None

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

    def condition(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """What the model is told of a batch: its labels, no class where there are none; or its
        texts or codes.

        Raises:
            CommandError: a label is missing, and the model knows no samples of no class.
        """
        if self.context is None:
            return {"y": self._labels(batch)}
        return {**self.context.of({name: value.to(self.device) for name, value in batch.items()})}

    def _labels(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        assert isinstance(self.dit, DiT)
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
        check_guidance(wanted)
        if dropout_of(self.dit) > 0:
            return _GUIDANCE if wanted is None else wanted
        if wanted not in (None, 1.0):
            labels = isinstance(self.dit, DiT)
            what, where = (
                ("labels", "class_dropout_prob")
                if labels
                else ("conditions", "context_dropout_prob")
            )
            raise CommandError(
                f"--guidance {wanted} needs a model that was trained with dropped {what} "
                f"({where}), this one was not"
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
        condition: Mapping[str, Tensor],
        seeds: Tensor,
        *,
        guidance: float,
        sampler: str | None,
        steps: int,
        batch: int,
    ) -> Tensor:
        """Samples ``(N, C, *sizes)`` in [-1, 1], on the CPU, ``batch`` at a time.

        Args:
            condition: the model's arguments, each ``(N, ...)``: ``y``, labels of a DiT.
            seeds: ``(N,)``, int64, one for each sample.
            guidance, sampler, steps: as :meth:`guidance` and :meth:`check` have taken them.
            batch: does not change the samples, but for rounding.
        """
        drawn = []
        for first in range(0, len(seeds), batch):
            some = {name: value[first : first + batch] for name, value in condition.items()}
            theirs = seeds[first : first + batch]
            x = self.diffusion.sample(
                self.dit,
                (len(theirs), self.dit.in_channels, *self.dit.input_size),
                condition=some,
                guidance=guidance,
                sampler=sampler,
                steps=steps,
                seed=theirs,
                progress=sys.stderr.isatty(),
            )
            x = x if self.vqvae is None else decoded(self.vqvae, x)
            drawn.append(x.clamp(-1, 1).cpu())
        return torch.cat(drawn)


def drawer_of(file: Path, model: Configured, about: dict[str, Any]) -> Drawer:
    """What the file of a DiT or ConditionalDiT holds.

    Args:
        file: of the model.
        model: in it.
        about: what it says.

    Raises:
        CommandError: it is no DiT's, or does not say what was learned.
    """
    if not isinstance(model, DiT | ConditionalDiT):
        raise CommandError(f"{file}: holds a {type(model).__name__}, expected a DiT")
    check_objective(file, about)
    device = next(model.parameters()).device
    vqvae = context = None
    if about.get("latents"):
        vqvae = vqvae_of(file, about["latents"]["part"], device)
    if isinstance(model, ConditionalDiT):
        told = about.get("context")
        if not told:
            raise CommandError(f"{file}: does not say what the model is conditioned on (context)")
        part = told.get("part")
        try:
            context = context_from(told, None if part is None else vqvae_of(file, part, device))
        except (ImportError, ValueError) as error:
            raise CommandError(f"{file}: its context: {error}") from None
    classes = (about.get("data") or {}).get("classes") or []
    if not classes and isinstance(model, DiT):
        classes = [str(i) for i in range(model.y_embedder.num_classes)]
    try:
        diffusion = Diffusion(**about["objective"])
    except (TypeError, ValueError) as error:
        raise CommandError(f"{file}: an objective of another version ({error})") from None
    return Drawer(model, diffusion, vqvae, classes, about, context)


def check_objective(file: Path, about: Mapping[str, Any]) -> None:
    """The file says what was learned.

    Raises:
        CommandError: it does not.
    """
    if not about.get("objective"):
        raise CommandError(
            f"{file}: does not say what the model has learned (objective); mmfast train writes it"
        )


def vqvae_of(file: Path, part: str, device: torch.device) -> VQVAE:
    """A VQ-VAE that is part of a model's file, else CommandError."""
    try:
        return load_model(file, VQVAE, part=part, device=device)
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{file}: its VQVAE, part {part!r}: {error}") from None


def labels_of(wanted: str | None, classes: Sequence[str], option: str = "--classes") -> list[int]:
    """The numbers of the classes that are named, all where None.

    Args:
        wanted: names or numbers, with commas between them.
        classes: names of all.
        option: where they are named.

    Raises:
        CommandError: there is no such class, or it is named twice.
    """
    if wanted is None:
        return list(range(len(classes)))
    found = []
    names = [wanted] if wanted in classes else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name in classes:
            found.append(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            found.append(int(name))
        else:
            few = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise CommandError(f"{option}: there is no class {name!r}, there are {few}")
    twice = [name for name, label in zip(names, found, strict=True) if found.count(label) > 1]
    if twice:
        raise CommandError(f"{option}: {twice[-1]!r} is named twice")
    return found


def check_guidance(wanted: float | None) -> None:
    """A scale is a number that means something, else CommandError."""
    try:
        check_scale("--guidance", wanted)
    except ValueError as error:
        raise CommandError(str(error)) from None


def seeds_of_numbers(seed: int, count: int) -> Tensor:
    """Those of ``count`` samples of a model without classes: of :func:`seeds_of`, with class 0."""
    numbers = torch.arange(count)
    return seeds_of(seed, torch.zeros_like(numbers), numbers)


def seeds_of(seed: int, labels: Tensor, numbers: Tensor) -> Tensor:
    """A seed for each sample, of its class and its number in it, whichever others are drawn.

    Args:
        seed: of all, below 2^31.
        labels: ``(N,)``, below 2^16.
        numbers: ``(N,)``, likewise.
    """
    return (seed << 2 * _COUNTED) + (labels << _COUNTED) + numbers
