"""What a model's file says of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmfast.data import Reader


def about_data(
    source: str, shape: Sequence[int], reader: Reader, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """The entry ``data`` of a model's file, of JSON's kinds; :func:`mmfast.data.readers_from` makes
    readers of it.

    Args:
        source: where the data is from, for people.
        shape: ``(C, ...)`` of a sample.
        reader: that prepares files like the data.
        classes: names of the labels, if there are labels.
    """
    return {
        "source": source,
        "shape": list(shape),
        "modalities": {reader.modality: reader.describe()},
        **({"classes": list(classes)} if classes else {}),
    }


def modality_of(data: Mapping[str, Any]) -> str:
    """The modality of a description of data of one.

    Raises:
        ValueError: it describes several, or none.
    """
    modalities = list(data.get("modalities", ()))
    if len(modalities) != 1:
        raise ValueError(f"the data must be of one modality, got {', '.join(modalities) or 'none'}")
    return modalities[0]
