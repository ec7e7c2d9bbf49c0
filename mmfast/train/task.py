"""What is trained: a model and its losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.models.configured import Configured


class Step(NamedTuple):
    """Where the training is.

    Attributes:
        number: of the optimiser step, from 0.
        micro: the micro-batch of the step, from 0.
        micros: how many of them the step has.
    """

    number: int
    micro: int = 0
    micros: int = 1

    @property
    def last(self) -> bool:
        """Whether the optimiser follows."""
        return self.micro == self.micros - 1


class Task:
    """A model and its losses, for :func:`mmfast.train.fit`. A task must have a ``model`` and
    :meth:`loss`; the rest may stay.

    Attributes:
        model: what is trained.
        about: what to keep in the model's file beside the weights: see
            :func:`mmfast.models.save_model`.
        parts: further models in that file, such as the VQ-VAE in whose latent space a diffusion
            model was trained.
    """

    model: nn.Module
    about: Mapping[str, Any] = {}
    parts: Mapping[str, Configured] = {}

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        for module in (self.model, *self.parts.values()):
            module.to(device)

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> Mapping[str, Tensor]:
        """Named numbers ``()`` of a batch: ``"loss"`` is minimised, all are logged as means.

        Args:
            batch: named tensors ``(B, ...)``, and ``"seed"`` ``(B,)`` int64, another one for each
                sample that is seen in a run: random numbers made of it are the same however the
                samples are spread over processes.
            step: where the training is.
        """
        raise NotImplementedError

    def wants(self, step: int) -> int:
        """How many samples :meth:`begin` is to get before step ``step``; 0: it is not called."""
        return 0

    def begin(self, batch: Mapping[str, Tensor], step: int) -> None:
        """Prepare, such as a codebook from the first vectors, without gradients.

        Args:
            batch: this process's share of the samples that :meth:`wants` asked for.
            step: that follows.
        """

    def metrics(self) -> Mapping[str, float]:
        """Further numbers to log, of the steps since the last call; the same on all processes."""
        return {}

    def sample(self, model: nn.Module, step: int) -> Tensor | None:
        """A picture ``(C, H, W)`` in [-1, 1] of what the model can do by now, if there is one.

        Called on the first process, without gradients, with random numbers that leave the
        training's alone.

        Args:
            model: like :attr:`model`, in evaluation mode, with the averaged weights.
            step: that was the last.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the task, for JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave."""
