"""Training of a class-conditional diffusion transformer, on data or in a VQ-VAE's latent space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.models import VQVAE, ConditionalDiT, Diffusion, DiT
from mmfast.nn.ranks import add_up, several
from mmfast.train.about import modality_of
from mmfast.train.grids import as_images, grid
from mmfast.train.latents import LATENT, decoded, latent_shape, latents_of
from mmfast.train.task import Step, Task

_SAMPLES_FOR_STD = 1024


class DiTTask(Task):
    """The diffusion loss, with labels that are dropped now and then for guidance.

    In a VQ-VAE's latent space, the vectors before quantisation are normalised by their mean and
    deviation in each channel, of the first samples; both are in the ``objective`` of the model's
    file.

    Args:
        model: to be trained.
        diffusion: what it learns.
        data: what the samples are, of one modality, by which a batch has them, beside ``"label"``
            if they have labels: see :func:`mmfast.train.about_data`.
        vqvae: in whose latent space the model works; without, on the data itself.
        guidance: of the samples that are shown.
        sampler: of those; see :meth:`mmfast.models.Diffusion.table`.
        sampler_steps: of those.
        pictures: how many samples are shown.

    Raises:
        ValueError: the VQ-VAE, the data or what is learned does not fit the model, or the guidance
            makes no sense.
    """

    def __init__(
        self,
        model: DiT | ConditionalDiT,
        diffusion: Diffusion,
        data: Mapping[str, Any],
        *,
        vqvae: VQVAE | None = None,
        guidance: float = 2.0,
        sampler: str | None = None,
        sampler_steps: int = 25,
        pictures: int = 40,
    ) -> None:
        shape = (model.in_channels, *model.input_size)
        found = latent_shape(vqvae, data)
        if found != shape:
            raise ValueError(f"the model takes {shape}, its data is {found}")
        self.model: DiT | ConditionalDiT = model
        self.diffusion = diffusion
        self._data = dict(data)
        self._vqvae = vqvae
        if vqvae is not None:
            self.parts = {"vqvae": vqvae.eval().requires_grad_(False)}
        check_scale("guidance", guidance)
        if model.learn_sigma:
            diffusion.check_learned_variances()
        self._drop = dropout_of(model)
        self._guidance = guidance if self._drop > 0 else 1.0
        diffusion.table(sampler, sampler_steps)  # refuses what does not fit, before training
        self._sampler, self._sampler_steps = sampler, sampler_steps
        self._pictures = pictures

    @property
    def about(self) -> dict[str, Any]:  # type: ignore[override]
        """What the model's file says of itself."""
        latents = None
        if self._vqvae is not None:
            latents = {"part": "vqvae", "shape": [self.model.in_channels, *self.model.input_size]}
        return {"data": self._data, "objective": self.diffusion.config, "latents": latents}

    def _x0(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What is to be noised."""
        if LATENT in batch:
            return batch[LATENT]
        x = batch[modality_of(self._data)]
        return x if self._vqvae is None else latents_of(self._vqvae, x)

    def encoded(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What training needs of a batch, in the latent space: it can be kept."""
        return {LATENT: self._x0(batch), **({"label": batch["label"]} if "label" in batch else {})}

    def wants(self, step: int) -> int:
        """Samples whose latents give the scale."""
        return _SAMPLES_FOR_STD if step == 0 and self._vqvae is not None else 0

    def begin(self, batch: Mapping[str, Tensor], step: int) -> None:
        """Measure the latents of all processes."""
        x = self._x0(batch).double().transpose(0, 1).flatten(1)  # [C, N]
        sums = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])
        count, total, squares = add_up(sums, several(), "measuring latents")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        std = torch.where(std > 0, std, 1.0)  # a constant channel stays what it is
        self.diffusion = dataclasses.replace(
            self.diffusion, data_mean=mean.tolist(), data_std=std.tolist()
        )

    def condition(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model is told of a batch beside the times: its labels."""
        y = batch.get("label")
        if y is None:
            first = next(iter(batch.values()))
            y = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        return {"y": y}

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """``loss``; with learned variances also ``squared`` and ``bound``."""
        x0 = self._x0(batch)
        losses = self.diffusion.losses(
            self.model,
            x0,
            seed=batch["seed"],
            condition=self.condition(batch),
            drop=self._drop if self._drop > 0 else None,
        )
        made = {"loss": losses.total.mean()}
        if self.model.learn_sigma:
            made |= {"squared": losses.squared.mean(), "bound": losses.bound.mean()}
        return made

    def sample(self, model: nn.Module, step: int) -> Tensor | None:
        """Samples of the classes, one after another."""
        assert isinstance(self.model, DiT)
        classes = self.model.y_embedder.num_classes
        device = next(model.parameters()).device
        columns = min(classes, 10) if classes > 1 else 8
        labels = torch.arange(self._pictures, device=device) % columns % classes
        drawn = self._drawn(model, {"y": labels}, self._pictures)
        return grid(as_images(drawn.clamp(-1, 1)), columns=columns)

    def _drawn(self, model: nn.Module, condition: Mapping[str, Tensor], count: int) -> Tensor:
        """Samples of the data's shape."""
        drawn = self.diffusion.sample(
            model,
            (count, self.model.in_channels, *self.model.input_size),
            condition=condition,
            guidance=self._guidance,
            sampler=self._sampler,
            steps=self._sampler_steps,
            progress=False,
        )
        return drawn if self._vqvae is None else decoded(self._vqvae, drawn)

    def state(self) -> dict[str, Any]:
        """The objective, as latents have been measured."""
        return {"objective": self.diffusion.config}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take the objective of a checkpoint."""
        self.diffusion = Diffusion(**state["objective"])


def check_scale(what: str, scale: float | None) -> None:
    """A scale of classifier-free guidance is a finite number from 0, or not given.

    0 is the prediction without the condition, 1 the one with it, more what is beyond; below 0
    samples would be led away from their condition.

    Raises:
        ValueError: it is another.
    """
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(
            f"{what} must be a finite number from 0 (0: without the condition, 1: no guidance), "
            f"got {scale}"
        )


def dropout_of(model: DiT | ConditionalDiT) -> float:
    """The probability with which a condition is dropped in training; 0: no guidance."""
    if isinstance(model, ConditionalDiT):
        return model.context_dropout_prob
    return model.y_embedder.dropout_prob
