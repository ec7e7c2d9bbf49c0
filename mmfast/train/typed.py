"""Typed settings: dataclasses filled from a JSON or TOML file and from flags of a command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")

_METAVARS = {int: "N", float: "X", str: "NAME"}


def check_least(config: Any, **bounds: float) -> None:
    """Raise ValueError for an attribute of ``config`` that is below its bound."""
    for name, bound in bounds.items():
        if not getattr(config, name) >= bound:
            raise ValueError(f"{name} must be at least {bound}, got {getattr(config, name)}")


class SettingError(ValueError):
    """A setting that is unknown, or of another kind than expected; the message names it."""


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and what ``--help`` says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a ``.json`` or ``.toml`` file.

    Raises:
        SettingError: it is no such file, or holds something else.
    """
    readers = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix not in readers:
        raise SettingError(f"{path}: settings are read from .json and .toml files")
    try:
        found = readers[path.suffix](path.read_text("utf-8"))
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingError(f"{path}: not read as {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(found, dict):
        raise SettingError(f"{path}: must hold named settings, got a {type(found).__name__}")
    return found


def build(cls: type[C], values: Mapping[str, Any], where: str = "settings") -> C:
    """An instance of the dataclass ``cls``, nested ones included, from a mapping.

    Args:
        cls: the dataclass. Its fields may be bool, int, float, str, a ``Literal``, a
            ``tuple[T, ...]``, a ``dict``, one of them or None, or another dataclass.
        values: by name; what is missing keeps its default.
        where: they are from, for messages.

    Raises:
        SettingError: a name is unknown, the nearest known one is told; or a value does not fit.
    """
    hints = typing.get_type_hints(cls)
    made = {}
    for name, value in values.items():
        if name not in hints:
            raise SettingError(f"{where}: unknown setting {name!r}{nearest_name(name, hints)}")
        made[name] = _fitting(hints[name], value, f"{where}: {name}")
    try:
        return cls(**made)
    except SettingError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingError(f"{where}: {error}") from None


def nearest_name(name: str, known: Mapping[str, Any]) -> str:
    """What to say behind an unknown name: the one that was meant, or all there are."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def _fitting(hint: Any, value: Any, what: str) -> Any:
    """``value`` as the type that ``hint`` says, else SettingError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingError(f"{what} must be named settings, got {value!r}")
        return build(typing.cast(type, hint), value, what)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return _fitting(kind, value, what)
    if origin is typing.Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise SettingError(f"{what} must be one of {choices}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SettingError(f"{what} must be a list, got {value!r}")
        return tuple(_fitting(arguments[0], item, what) for item in value)
    kind = origin or hint
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SettingError(f"{what} must be of type {kind.__name__}, got {value!r}")
    return value


def _flags(cls: type) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Flag, field and type, without None, of each field that a flag can set."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
        nested = dataclasses.is_dataclass(hint) or dict in (hint, typing.get_origin(hint))
        if not nested:
            yield "--" + field.name.replace("_", "-"), field, hint


def add_flags(parser: argparse._ActionsContainer, cls: type) -> None:
    """A flag for each field of the dataclass ``cls``; those not given leave no trace."""
    for flag, field, hint in _flags(cls):
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        shown = "" if field.default in (None, (), "") else f" ({_shown(field.default)})"
        options["help"] = (field.metadata.get("help", "") + shown).replace("%", "%%")
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif origin is typing.Literal:
            options["choices"] = arguments
        elif origin is tuple:
            options |= {"nargs": "+", "type": arguments[0], "metavar": _METAVARS[arguments[0]]}
        else:
            options |= {"type": hint, "metavar": _METAVARS[hint]}
        parser.add_argument(flag, **options)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def given_flags(given: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The values of the flags of ``cls`` that were given."""
    names = [field.name for _, field, _ in _flags(cls)]
    return {name: getattr(given, name) for name in names if hasattr(given, name)}
