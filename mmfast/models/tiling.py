"""Large samples through a VQ-VAE in tiles, which bounds the memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.models.vqvae import VQVAE

LARGEST = 1 << 21  # values of one channel that go through a model at once, if no tile is given
_BLEND = 4  # cells on each side of a border, over which decoded tiles pass into each other


def reach(model: VQVAE) -> int:
    """How many cells of the grid of codes around one matter to what is encoded to it or decoded
    from it, in a model without norms."""
    widths, blocks = model.config["widths"], model.config["num_blocks"]
    convolutions = [2 * blocks + 1 for _ in widths]
    convolutions[-1] += 1
    # Each reaches one place further; of each level, half as far in cells as before.
    return 1 + math.ceil(sum(count / 2**level for level, count in enumerate(convolutions)))


def side_of(model: VQVAE, sizes: Sequence[int], tile: int | None) -> int:
    """The side of a tile's inner part, in cells.

    Args:
        model: for whose samples.
        sizes: of a sample.
        tile: side in values; 0: one tile of everything; None: likewise, up to :data:`LARGEST`
            values, else tiles of so many.

    Raises:
        ValueError: ``tile`` is below 0.
    """
    if tile is not None and tile < 0:
        raise ValueError(f"tile must be at least 0, got {tile}")
    if tile is None:
        tile = 0 if math.prod(sizes) <= LARGEST else int(LARGEST ** (1 / len(sizes)))
    return max(1, (tile or max(sizes)) // model.downsampling + (not tile))


class _Tile(NamedTuple):
    """A part of one dimension, in cells: what is kept of it, and what goes through the model."""

    start: int
    end: int
    low: int
    high: int


def _tiles(grid: Sequence[int], side: int, halo: int) -> Iterator[tuple[_Tile, ...]]:
    """The tiles of a grid, with so many cells around them as far as there are."""
    parts = []
    for size in grid:
        starts = range(0, size, side)
        ends = [min(start + side, size) for start in starts]
        parts.append(
            [
                _Tile(start, end, max(0, start - halo), min(size, end + halo))
                for start, end in zip(starts, ends, strict=True)
            ]
        )
    return itertools.product(*parts)


@torch.no_grad()
def encode_in_tiles(model: VQVAE, x: Tensor, tile: int | None = None) -> Tensor:
    """What ``model.encode`` makes of x, of one tile after another.

    Each tile is encoded with as much around it as the model's convolutions reach: without norms
    (``norm=None``) the indices are those of the whole. With group norms they are those of tiles'
    means and deviations, which may differ here and there.

    Args:
        model: in evaluation mode.
        x: ``(B, channels, *sizes)``, sizes multiples of ``downsampling``.
        tile: as of :func:`side_of`.

    Raises:
        ValueError: ``tile`` is below 0; and as :meth:`VQVAE.encode`.
    """
    sizes, step = x.shape[2:], model.downsampling
    side = side_of(model, sizes, tile)
    grid = [size // step for size in sizes]
    if all(size <= side for size in grid):
        return model.encode(x)
    made: Tensor | None = None
    for tiles in _tiles(grid, side, reach(model)):
        around = (slice(t.low * step, t.high * step) for t in tiles)
        part = model.encode(x[(slice(None), slice(None), *around)])
        if made is None:
            made = part.new_empty(len(x), *grid, *part.shape[1 + len(grid) :])
        inner = tuple(slice(t.start - t.low, t.end - t.low) for t in tiles)
        made[(slice(None), *(slice(t.start, t.end) for t in tiles))] = part[(slice(None), *inner)]
    assert made is not None
    return made


@torch.no_grad()
def decode_in_tiles(model: VQVAE, indices: Tensor, tile: int | None = None) -> Tensor:
    """What ``model.decode`` makes of indices, of one tile after another, in float32.

    As of :func:`encode_in_tiles`; at their borders tiles pass into each other linearly, so that
    what norms make different shows no seams.

    Args:
        model: in evaluation mode.
        indices: ``(B, *grid[, Q])``.
        tile: as of :func:`side_of`.
    """
    dims, step = model.spatial_dims, model.downsampling
    grid = list(indices.shape[1 : 1 + dims])
    side = side_of(model, [size * step for size in grid], tile)
    if all(size <= side for size in grid):
        return model.decode(indices).float()
    blend = min(_BLEND, side // 2)
    made: Tensor | None = None
    for tiles in _tiles(grid, side, reach(model) + blend):
        part = model.decode(
            indices[(slice(None), *(slice(t.low, t.high) for t in tiles))].contiguous()
        ).float()
        if made is None:
            sizes = (size * step for size in grid)
            made = part.new_zeros(len(indices), model.channels, *sizes)
        inside: list[slice] = [slice(None)] * 2
        outside: list[slice] = [slice(None)] * 2
        weights = part.new_ones(())
        for t, size in zip(tiles, grid, strict=True):
            start, end = max(0, t.start - blend), min(size, t.end + blend)
            inside.append(slice((start - t.low) * step, (end - t.low) * step))
            outside.append(slice(start * step, end * step))
            weights = weights[..., None] * _weights(t, start, end, size, blend, step).to(part)
        made[tuple(outside)] += weights * part[tuple(inside)]
    assert made is not None
    return made


def _weights(tile: _Tile, start: int, end: int, size: int, blend: int, step: int) -> Tensor:
    """Of a tile's values from cell ``start`` to ``end``: from 0 to 1 over the cells around a
    border with another tile, where the other's go from 1 to 0."""
    place = torch.arange(start * step, end * step) + 0.5
    weights = torch.ones_like(place)
    if blend and tile.start > 0:
        rising = place - (tile.start - blend) * step
        weights = weights * (rising / (2 * blend * step)).clamp(max=1)
    if blend and tile.end < size:
        falling = (tile.end + blend) * step - place
        weights = weights * (falling / (2 * blend * step)).clamp(max=1)
    return weights
