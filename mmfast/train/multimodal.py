"""Training of a multimodal diffusion transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.models import MultimodalDiffusion, MultimodalDiT
from mmfast.train.dit import check_scale
from mmfast.train.grids import as_images, grid
from mmfast.train.latents import NO_LATENTS, Latents
from mmfast.train.task import Step, Task

LABEL = "label"  # name of the labels, as a modality
DRAWN = ("image", "video", "mel", "waveform")  # what pictures can show, the first that there is


def modalities_of(
    model: MultimodalDiT, batch: Mapping[str, Tensor], latents: Latents = NO_LATENTS
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the model takes of a batch, and which of it is there.

    Args:
        model: whose modalities are meant.
        batch: as a :class:`mmfast.data.Dataset` has it.
        latents: in which some of its modalities are.

    Returns:
        The data by modality, and for those that may be missing ``(B,)``, bool.
    """
    data = {name: batch[name] for name in model.modalities if name in batch}
    there = {name: batch[f"{name}_present"] for name in data if f"{name}_present" in batch}
    if LABEL in data:
        labels = data[LABEL]
        data[LABEL] = labels.clamp(min=0)[:, None]
        there[LABEL] = labels >= 0
    return latents.encoded(data), there


class MultimodalTask(Task):
    """The loss of :class:`mmfast.models.MultimodalDiffusion`, and that of each modality.

    Args:
        model: to be trained. The modality ``"label"`` are the labels; samples may lack any.
        diffusion: what it learns.
        data: what the samples are, for the model's file.
        latents: in which some of the modalities are.
        shown: samples, of which pictures have the image (or video, spectrogram, waveform), and
            below each one that is drawn from all that it has else. None without.
        guidance: of the samples that are shown.
        sampler: of those; see :meth:`mmfast.models.Diffusion.table`.
        sampler_steps: of those.

    Raises:
        ValueError: the sampler does not serve, or the guidance makes no sense.
    """

    def __init__(
        self,
        model: MultimodalDiT,
        diffusion: MultimodalDiffusion,
        data: Mapping[str, Any],
        *,
        latents: Latents = NO_LATENTS,
        shown: Mapping[str, Tensor] | None = None,
        guidance: float = 2.0,
        sampler: str | None = None,
        sampler_steps: int = 25,
    ) -> None:
        self.model: MultimodalDiT = model
        self.diffusion = diffusion
        self.about = {
            "data": dict(data),
            "objective": diffusion.config,
            "latents": latents.about,
        }
        self.parts, self._latents = latents.parts, latents
        self._shown = shown
        check_scale("guidance", guidance)
        diffusion.diffusion.table(sampler, sampler_steps)  # refuses what does not fit
        self._guidance, self._sampler, self._steps = guidance, sampler, sampler_steps

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """``loss``, and by its name that of each modality."""
        data, there = modalities_of(self.model, batch, self._latents)
        return self.diffusion.losses(self.model, data, lengths=there, seed=batch["seed"])

    def sample(self, model: nn.Module, step: int) -> Tensor | None:
        """Samples that the model has not seen, and below each one drawn from its other parts."""
        assert isinstance(model, MultimodalDiT)
        name = next((n for n in DRAWN if n in model.modalities), None)
        if self._shown is None or name is None:
            return None
        device = next(model.parameters()).device
        batch = {n: v.to(device) for n, v in self._shown.items()}
        real = batch.pop(name)
        given, there = modalities_of(model, batch, self._latents)
        drawn = self.diffusion.generate(
            model,
            [name],
            given,
            batch=len(real),
            lengths=there,
            guidance=self._guidance if given else 1.0,
            sampler=self._sampler,
            steps=self._steps,
            progress=False,
        )
        made = self._latents.decoded(drawn)[name].clamp(-1, 1)
        pictures = torch.cat([as_images(real).cpu(), as_images(made).cpu()])
        return grid(pictures, columns=len(real))

    def state(self) -> dict[str, Any]:
        """What the model's numbers mean: the same data makes the same."""
        return {"modalities": self.model.config["modalities"], "data": self.about["data"]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a run whose data was prepared otherwise.

        Raises:
            ValueError: it was.
        """
        for name, own in self.state().items():
            if state.get(name) != own:
                raise ValueError(
                    "the run to be resumed prepares its data otherwise: other files, settings or "
                    "tokens"
                )
