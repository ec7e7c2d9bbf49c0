"""The model's file of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from mmfast.files import replacing
from mmfast.models.configured import Configured, save_model
from mmfast.train.run_folder import MODEL
from mmfast.train.task import Task


def write_model(folder: Path, model: Any, task: Task) -> Path:
    """Write ``model.safetensors``: by :func:`mmfast.models.save_model` where the model knows what
    it was built with, else its weights alone."""
    path = folder / MODEL
    if _described(model):
        save_model(model, path, parts=task.parts, **task.about)
        return path
    from safetensors.torch import save_file

    weights = {name: t.cpu().contiguous().clone() for name, t in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary)
    return path


def _described(model: nn.Module) -> bool:
    if not isinstance(model, Configured):
        return False
    try:
        json.dumps(model.config)
    except TypeError:
        return False
    return True
