"""The classifier by which ``mmfast evaluate`` judges samples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.commands import CommandError
from mmfast.commands.drawing import Drawer
from mmfast.commands.held_out import Batch, HeldOut
from mmfast.commands.options import open_model
from mmfast.models import Classifier
from mmfast.train import TrainConfig, fit
from mmfast.train.classifier import ClassifierTask

_BATCH = 64  # of training


def read_classifier(path: Path, drawer: Drawer) -> Classifier:
    """The classifier in a file.

    Raises:
        CommandError: there is none, or it is for other samples or classes than the DiT's.
    """
    model, _ = open_model(path, Classifier, drawer.device)
    channels, *sizes = drawer.shape
    for what, got, expected in (
        ("classes", model.num_classes, len(drawer.classes)),
        ("channels", model.channels, channels),
        ("dimensions", model.spatial_dims, len(sizes)),
    ):
        if got != expected:
            raise CommandError(f"{path}: is for {got} {what}, the samples have {expected}")
    return model


def train_classifier(drawer: Drawer, data: HeldOut, steps: int) -> Classifier:
    """A classifier of the data that is not held out.

    Raises:
        CommandError: the data has less than two classes.
    """
    train = data.labelled()
    if len(train) < 2 or len(data.classes) < 2:
        raise CommandError(f"a classifier learns from labels, which {data.name} lacks")
    channels, *sizes = drawer.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(len(drawer.classes), channels=channels, spatial_dims=len(sizes))
        config = TrainConfig(
            steps=steps,
            batch_size=min(_BATCH, len(train)),
            lr=3e-3,
            weight_decay=0.01,
            ema=0.99,
            warmup=min(100, steps // 4),
            device=str(drawer.device),
        )
        made: Classifier = fit(ClassifierTask(model, drawer.about["data"]), config, train).model
    return made.to(drawer.device)


@torch.no_grad()
def read_as(classifier: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """Which samples ``(N, C, *sizes)`` a classifier reads as their labels: bool ``(N,)``."""
    device = next(classifier.parameters()).device
    found = [classifier(some.to(device)).argmax(1).cpu() for some in x.split(256)]
    return torch.cat(found) == labels.cpu()


def judge(
    classifier: Classifier,
    drawn: Tensor,
    labels: Tensor,
    classes: list[str],
    real: Iterable[Batch],
    modality: str,
) -> dict[str, Any]:
    """How many samples are read as their class.

    Args:
        classifier: that reads them.
        drawn: ``(N, C, *sizes)``.
        labels: ``(N,)``.
        classes: their names.
        real: batches of real samples, which tell how good the classifier is.
        modality: by which they have them.

    Returns:
        The ``share`` of the ``samples``, by ``classes`` too, and ``of_real_samples``.
    """
    right = read_as(classifier, drawn, labels).double()
    true = [
        read_as(classifier, batch[modality], batch["label"])[batch["label"] >= 0]
        for batch in real
        if "label" in batch
    ]
    known = torch.cat(true).double() if true else torch.empty(0)
    return {
        "share": float(right.mean()),
        "samples": len(drawn),
        "classes": {name: float(right[labels == i].mean()) for i, name in enumerate(classes)},
        "of_real_samples": float(known.mean()) if len(known) else None,
    }
