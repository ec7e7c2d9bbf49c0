"""Named tuples that ops and modules return."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.utils import _pytree

_Class = TypeVar("_Class", bound=type[Any])


def exportable(cls: _Class) -> _Class:
    """Give a named tuple a name in files, so that ``torch.export.save`` takes what returns it."""
    _pytree._register_namedtuple(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls
