"""Sizes of the tiles of the lookup's screening, of which ``tuned.json`` says the fastest.

The result is exact with all of them. In front is what ``docs/tuning.md`` expects to be fastest:
without an entry the first that fits the device is taken.
"""

from __future__ import annotations

from typing import Any

import triton

from mmfast.kernels.common import device_limits, interpreting

Size = tuple[int, int, int]  # rows, codes, warps

_LARGE: Size = (128, 128, 8)
_TALL: Size = (256, 64, 8)
_HALF: Size = (64, 128, 4)
_NARROW: Size = (128, 64, 4)
_MANY: Size = (128, 64, 8)
_SMALL: Size = (64, 64, 4)
_MOST_REGISTERS = 255  # of a thread


def config(
    size: Size, stages: int, *, tma: bool, ahead: bool = False, terms: bool = True
) -> triton.Config:
    """A tile of so many rows and codes, and as many stages of codes.

    Args:
        tma: tiles come by descriptors.
        ahead: products begin while the scores of the tile before are compared.
        terms: norm terms, too, are loaded before their turn.
    """
    rows, codes, warps = size
    sizes = {"BLOCK_N": rows, "BLOCK_K": codes, "TMA": tma, "AHEAD": ahead}
    sizes["STAGES"] = stages if terms else 0
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def _configs(*sizes: Size, most: int = 4, **ways: bool) -> list[triton.Config]:
    """Of each size with ``most`` stages, and with fewer, down to two."""
    return [config(size, stages, **ways) for size in sizes for stages in range(most, 1, -1)]


_PLAIN = (_LARGE, _TALL, _NARROW, _SMALL)
SCREEN = [
    *_configs(_LARGE, _HALF, _TALL, tma=True, ahead=True),
    *_configs(_SMALL, tma=True, ahead=True, most=3),
    *_configs(_LARGE, _MANY, tma=True, ahead=True, terms=False),
    *_configs(*_PLAIN, _MANY, tma=True),
    *_configs(*_PLAIN, tma=False),
]
# The few rows that it leaves.
AGAIN = [c for tma in (True, False) for c in _configs(_LARGE, (64, 64, 8), tma=tma)]
if interpreting():
    SCREEN = AGAIN = [config((32, 128, 4), 2, tma=True)]


def fitting(
    configs: list[triton.Config],
    *,
    PADDED_D: int,
    STEP_D: int,
    AGAIN: bool = False,
    WIDE: bool = False,
    **others: Any,
) -> list[triton.Config]:
    """Of each size the configuration with most stages whose float16 tiles fit the device."""
    backend, arch, limit = device_limits(triton.runtime.driver.active.get_current_device())
    stepping = STEP_D != PADDED_D
    found: dict[tuple[Any, ...], triton.Config] = {}
    for c in configs:
        rows, codes, tma, ahead = (c.kwargs[n] for n in ("BLOCK_N", "BLOCK_K", "TMA", "AHEAD"))
        # On AMD one of the stages is in registers, and more than two do not pay.
        stages = c.num_stages - (backend == "hip")
        # Rows are staged too where they come in steps.
        size = 2 * STEP_D * (rows * (stages if stepping else 1) + codes * stages)
        size = size * (1 + AGAIN) + codes * (STEP_D * ahead + 4 * stages)
        possible = _possible(c, backend, arch, PADDED_D, stepping, AGAIN, WIDE)
        if possible and size <= limit and stages <= (1 if backend == "hip" else 4):
            key = (rows, codes, c.num_warps, tma, ahead)
            found.setdefault(key, _limited(c, backend, arch, PADDED_D, stepping, WIDE))
    return list(found.values()) or configs[-1:]


def first_fitting(configs: list[triton.Config], **constants: Any) -> list[triton.Config]:
    """Where there is no choice."""
    return fitting(configs, **constants)[:1]


def _size(c: triton.Config) -> Size:
    return c.kwargs["BLOCK_N"], c.kwargs["BLOCK_K"], c.num_warps


def _possible(
    c: triton.Config, backend: str, arch: Any, padded: int, stepping: bool, again: bool, wide: bool
) -> bool:
    """Whether the device has what it takes, registers among it, as far as is known."""
    size, tma = _size(c), c.kwargs["TMA"]
    smallest = size[:2] == (64, 64)
    hopper, blackwell = (backend == "cuda" and arch in of for of in ((90,), range(100, 130)))
    if tma and not (hopper or blackwell):
        return False
    if c.kwargs["AHEAD"]:
        return hopper and not stepping and not again and _possible_ahead(c, padded, wide)
    if again:
        # On AMD so large that a thread has loads of 128 bits.
        return smallest != (hopper or (backend == "hip" and padded == 16))
    if size == _MANY:
        return hopper and (stepping or padded <= 64)
    narrow = size[1] == 64 and not smallest
    if hopper:
        if wide and padded == 128 and size == _NARROW:
            return False
        if padded == 256 and not stepping:
            return not narrow or not (tma or size == _NARROW)
        return not narrow or tma or not (stepping or (padded == 128 and size == _NARROW))
    if blackwell:
        if wide and padded == 64 and size == _TALL:
            return False
        return not (narrow and padded >= 128) and (padded != 256 or stepping or smallest)
    if backend == "cuda":
        if wide and padded >= 64 and size == _NARROW:
            return False
        return stepping or size[0] * size[1] <= (64 if padded >= 128 else 128) * 64
    if wide and padded == 64 and size == _TALL:
        return False
    return padded < 128 or stepping or size[1] != 128


def _possible_ahead(c: triton.Config, padded: int, wide: bool) -> bool:
    """Likewise, on Hopper."""
    if padded == 256:
        return c.kwargs["STAGES"] == 0
    if c.kwargs["STAGES"] == 0 or padded < 32:
        return False
    return (padded == 32 or _size(c) != _TALL) and not (wide and _size(c) == _SMALL)


def _limited(
    c: triton.Config, backend: str, arch: Any, padded: int, stepping: bool, wide: bool
) -> triton.Config:
    """With its limit of registers: left to itself ptxas may spill to reach a rounder number."""
    if backend != "cuda":
        # What is loaded before its turn is in registers there.
        return triton.Config({**c.kwargs, "STAGES": 0}, c.num_warps, c.num_stages)
    size, ahead = _size(c), c.kwargs["AHEAD"]
    registers = _MOST_REGISTERS
    if ahead and size == _SMALL:
        registers = 168  # three programs of a multiprocessor
    few = size == _MANY or (size == _SMALL and not wide)
    if not ahead and few and arch == 90 and c.kwargs["TMA"] and (stepping or padded <= 64):
        registers = 128  # two, or four
    return triton.Config(c.kwargs, c.num_warps, c.num_stages, maxnreg=registers)
