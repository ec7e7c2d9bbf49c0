"""Models that remember what they were built with, and their files."""

from __future__ import annotations

import functools
import inspect
import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from mmfast.files import replacing

M = TypeVar("M", bound="Configured")

_FORMAT = 1
_KEY = "mmfast"  # of the description among a file's metadata


class Configured(nn.Module):
    """A module whose ``config`` holds the arguments of its constructor, by name.

    Subclasses can be saved with :func:`save_model` as long as those arguments are what JSON knows.
    """

    classes: ClassVar[dict[str, type[Configured]]] = {}
    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Configured.classes[cls.__name__] = cls
        make = cls.__init__
        signature = inspect.signature(make)

        @functools.wraps(make)
        def recording(self: Configured, *args: Any, **options: Any) -> None:
            given = signature.bind(self, *args, **options)
            given.apply_defaults()
            make(self, *args, **options)
            if type(self) is cls:
                self.config = dict(list(given.arguments.items())[1:])

        cls.__init__ = recording  # type: ignore[method-assign, assignment]


def save_model(model: Configured, path: str | os.PathLike[str], **about: Any) -> None:
    """Write a model's weights and constructor arguments as one safetensors file, whole or not.

    Args:
        model: to be rebuilt by :func:`load_model`.
        path: of the file.
        about: what else to keep, such as how the data was prepared; see :func:`describe_model`.

    Raises:
        TypeError: the model was built with something that JSON does not know, such as a module.
    """
    from safetensors.torch import save_file

    described = {
        "format": _FORMAT,
        "class": type(model).__name__,
        "config": model.config,
        "about": about,
    }
    try:
        text = json.dumps(described)
    except TypeError as error:
        raise TypeError(
            f"a {type(model).__name__} can be saved if it was built with plain values ({error}); "
            "describe a quantizer by a mapping such as {'type': 'VectorQuantize', 'dim': 64, ...}"
        ) from None
    # Tensors that share memory are refused by the format.
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={_KEY: text})


def describe_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of :func:`save_model` says of itself: ``class``, ``config`` and ``about``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no safetensors file, or a damaged one ({error})") from None
    if _KEY not in metadata:
        raise ValueError(f"{path}: holds no mmfast model, only tensors")
    described: dict[str, Any] = json.loads(metadata[_KEY])
    if described.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: is of format {described.get('format')}, this version reads {_FORMAT}"
        )
    return described


def load_model(
    path: str | os.PathLike[str],
    expected: type[M] = Configured,  # type: ignore[assignment]
    *,
    device: str | torch.device = "cpu",
) -> M:
    """The model that :func:`save_model` wrote, in evaluation mode.

    Args:
        path: of the file.
        expected: class of the model.
        device: to put it on.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the file holds a model of another class.
        ValueError: it is another kind of file, damaged, or its weights do not fit.
    """
    from safetensors.torch import load_file

    described = describe_model(path)
    cls = Configured.classes.get(described["class"])
    if cls is None or not issubclass(cls, expected):
        raise TypeError(f"{path}: holds a {described['class']}, expected a {expected.__name__}")
    model = cls(**described["config"])
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit a {cls.__name__}: {error}") from None
    return model.to(device).eval()
