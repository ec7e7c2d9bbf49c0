"""Models that remember what they were built with, and their files."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Mapping
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


def save_model(
    model: Configured,
    path: str | os.PathLike[str],
    *,
    parts: Mapping[str, Configured] | None = None,
    **about: Any,
) -> None:
    """Write a model's weights and constructor arguments as one safetensors file, whole or not.

    Args:
        model: to be rebuilt by :func:`load_model`.
        path: of the file.
        parts: further models to keep in the file, such as the one whose latents this one makes.
        about: what else to keep, such as how the data was prepared; see :func:`describe_model`.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: the model was built with something that JSON does not know, such as a module.
    """
    from mmfast.data.errors import needed

    format_ = needed("safetensors.torch")
    parts = parts or {}
    described = {
        "format": _FORMAT,
        **_description(model),
        "about": about,
        "parts": {name: _description(part) for name, part in parts.items()},
    }
    try:
        text = json.dumps(described)
    except TypeError as error:
        raise TypeError(
            f"a {type(model).__name__} can be saved if it was built with plain values ({error}); "
            "describe a quantizer by a mapping such as {'type': 'VectorQuantize', 'dim': 64, ...}"
        ) from None
    # Tensors that share memory are refused by the format.
    weights = {
        prefix + name: value.detach().contiguous().clone()
        for prefix, module in (("", model), *((f"{name}/", part) for name, part in parts.items()))
        for name, value in module.state_dict().items()
    }
    with replacing(path) as temporary:
        format_.save_file(weights, temporary, metadata={_KEY: text})


def _description(model: Configured) -> dict[str, Any]:
    return {"class": type(model).__name__, "config": model.config}


def describe_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of :func:`save_model` says of itself: ``class``, ``config`` and ``about``, and
    ``parts``, classes and configs by name.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: it is another kind of file, or damaged.
    """
    from mmfast.data.errors import needed

    format_ = needed("safetensors")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with format_.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (format_.SafetensorError, OSError) as error:
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
    part: str | None = None,
    device: str | torch.device = "cpu",
) -> M:
    """The model that :func:`save_model` wrote, in evaluation mode.

    Args:
        path: of the file.
        expected: class of the model.
        part: load this one of the file's ``parts`` instead.
        device: to put it on.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        KeyError: the file has no such part.
        TypeError: the file holds a model of another class.
        ValueError: it is another kind of file, damaged, or its weights do not fit.
    """
    from mmfast.data.errors import needed

    described = describe_model(path)
    prefix = ""
    if part is not None:
        parts = described.get("parts", {})
        if part not in parts:
            raise KeyError(f"{path}: has no part {part!r}; it has {', '.join(parts) or 'none'}")
        described, prefix = parts[part], f"{part}/"
    cls = Configured.classes.get(described["class"])
    if cls is None or not issubclass(cls, expected):
        raise TypeError(f"{path}: holds a {described['class']}, expected a {expected.__name__}")
    model = cls(**described["config"])
    with needed("safetensors").safe_open(path, "pt") as file:
        weights = {
            name.removeprefix(prefix): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith(prefix) and (prefix or "/" not in name)
        }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit a {cls.__name__}: {error}") from None
    return model.to(device).eval()
