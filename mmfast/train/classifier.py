"""Training of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmfast.models import Classifier
from mmfast.train.about import modality_of
from mmfast.train.task import Step, Task

_SMOOTHING = 0.1  # of the labels


class ClassifierTask(Task):
    """The cross entropy of ``"label"``.

    Args:
        model: to be trained.
        data: what the samples are, of one modality, by which a batch has them: see
            :func:`mmfast.train.about_data`.
    """

    def __init__(self, model: Classifier, data: Mapping[str, Any]) -> None:
        self.model: Classifier = model
        self.about = {"data": dict(data), "objective": None, "latents": None}
        self._modality = modality_of(data)

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """``loss`` and ``accuracy``."""
        logits, labels = self.model(batch[self._modality]), batch["label"]
        loss = F.cross_entropy(logits, labels, label_smoothing=_SMOOTHING)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}
