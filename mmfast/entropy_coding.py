"""Grids of codes as few bytes: range coding with a model that learns while it reads.

A code is often that of a neighbour: which one is coded with frequencies that depend on which of
the neighbours are alike. Other codes are coded as two digits, the second with frequencies that
depend on the first. All frequencies are whole numbers that begin anew with each grid: a stream is
the same on every machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# Of a position, nearest first, all before it, by the number of dimensions.
_NEIGHBOURS = {
    1: ((-1,), (-2,)),
    2: ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0)),
    3: ((-1, 0, 0), (0, 0, -1), (0, -1, 0), (0, -1, -1), (0, -1, 1), (-2, 0, 0)),
}
_MARGIN = 2  # around a grid, as far as neighbours are
_NOTHING = -1  # in the margin

# Krichevsky and Trofimov's estimator starts with 1/2 and counts in ones. Halving at _LIMIT lets
# the newer symbols count for more.
_START, _STEP, _LIMIT = 2, 5, 1280


class _Frequencies:
    """How often each of n symbols came: float32, whole numbers, as the coder takes them."""

    def __init__(self, n: int) -> None:
        self.weights = np.full(n, _START, np.float32)
        self._total = _START * n

    def saw(self, symbol: int) -> None:
        self.weights[symbol] += _STEP
        self._total += _STEP
        if self._total > max(_LIMIT, 2 * _START * len(self.weights)):
            self.weights = (self.weights + 1) // 2
            self._total = int(self.weights.sum())


class _Coder(Protocol):
    def __call__(self, symbol: int | None, weights: np.ndarray) -> int:
        """Write ``symbol``, or read it where it is None."""


def encode_indices(grids: np.ndarray, num_codes: Sequence[int]) -> bytes:
    """Write grids of codes.

    Args:
        grids: ``(Q, *grid)``, integers, of 1 to 3 dimensions behind Q, each from 0 to K - 1.
        num_codes: K of each of the Q grids.

    Returns:
        A multiple of 4 bytes.

    Raises:
        ImportError: constriction is not installed.
        ValueError: an index is out of range.
    """
    stream, family = _range_coding()
    encoder = stream.RangeEncoder()

    def write(symbol: int | None, weights: np.ndarray) -> int:
        assert symbol is not None
        encoder.encode(symbol, family(weights, lazy=True))
        return symbol

    for grid, count in zip(grids, num_codes, strict=True):
        if grid.size and not 0 <= grid.min() <= grid.max() < count:
            raise ValueError(f"codes must be from 0 to {count - 1}, got {grid.min()}, {grid.max()}")
        _walk(grid.shape, count, write, grid)
    words: np.ndarray = encoder.get_compressed()
    return words.astype("<u4").tobytes()


def decode_indices(data: bytes, shape: Sequence[int], num_codes: Sequence[int]) -> np.ndarray:
    """The grids that :func:`encode_indices` wrote, int64 ``(Q, *grid)``.

    Args:
        data: what it returned.
        shape: of a grid.
        num_codes: K of each grid.

    Raises:
        ImportError: constriction is not installed.
        ValueError: ``data`` is no such stream, or one of other grids.
    """
    if len(data) % 4:
        raise ValueError(f"damaged: {len(data)} bytes of codes are no multiple of 4")
    stream, family = _range_coding()
    decoder = stream.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def read(symbol: int | None, weights: np.ndarray) -> int:
        try:
            found: int = decoder.decode(family(weights, lazy=True))
        except (AssertionError, ValueError) as error:
            raise ValueError(f"damaged: the codes cannot be decoded ({error})") from None
        return found

    grids = np.stack([_walk(tuple(shape), count, read, None) for count in num_codes])
    if not decoder.maybe_exhausted():
        raise ValueError("damaged: there are more codes than the sizes say")
    return grids


def _walk(shape: tuple[int, ...], num_codes: int, code: _Coder, known: Any) -> np.ndarray:
    """Code a grid position by position; ``known`` holds it where it is to be written."""
    padded = np.full([size + 2 * _MARGIN for size in shape], _NOTHING)
    steps = [stride // padded.itemsize for stride in padded.strides]
    near = [sum(map(math.prod, zip(o, steps, strict=True))) for o in _NEIGHBOURS[len(shape)]]
    places = [
        sum((i + _MARGIN) * step for i, step in zip(place, steps, strict=True))
        for place in itertools.product(*map(range, shape))
    ]
    values: list[int] = padded.ravel().tolist()
    wanted: list[int | None] = [None] * len(places) if known is None else known.ravel().tolist()
    base = 1 << ((num_codes - 1).bit_length() + 1) // 2
    which: dict[tuple[int, ...], _Frequencies] = {}
    highs = _Frequencies(-(-num_codes // base))
    lows: dict[int, _Frequencies] = {}

    def coded(symbol: int | None, frequencies: _Frequencies) -> int:
        if len(frequencies.weights) == 1:
            return 0
        found = code(symbol, frequencies.weights)
        frequencies.saw(found)
        return found

    for place, value in zip(places, wanted, strict=True):
        distinct: list[int] = []
        pattern = []
        for step in near:
            neighbour = values[place + step]
            if neighbour == _NOTHING:
                pattern.append(_NOTHING)
                continue
            if neighbour not in distinct:
                distinct.append(neighbour)
            pattern.append(distinct.index(neighbour))
        other = len(distinct)
        rank = None
        if value is not None:
            rank = distinct.index(value) if value in distinct else other
        key = tuple(pattern)
        if key not in which:
            which[key] = _Frequencies(other + 1)
        rank = coded(rank, which[key])
        if rank < other:
            values[place] = distinct[rank]
            continue
        digits = (None, None) if value is None else divmod(value, base)
        high = coded(digits[0], highs)
        if high not in lows:
            lows[high] = _Frequencies(min(base, num_codes - high * base))
        values[place] = high * base + coded(digits[1], lows[high])
    inside = (slice(_MARGIN, -_MARGIN),) * len(shape)
    return np.array(values).reshape(padded.shape)[inside]


def _range_coding() -> tuple[Any, Any]:
    """The coder's module, and the family of its models."""
    from mmfast.data.errors import needed

    constriction = needed("constriction")
    return constriction.stream.queue, constriction.stream.model.Categorical
