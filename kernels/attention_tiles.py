"""Sizes of the attention kernels' tiles, and how the kernels are launched.

They decide the order of the sums, and with it the last bits. They depend on head sizes, dtype, kind
of mask and of device, on Hopper also on whether the sequences are long, and on what
``tuned.json`` has for these: there are several to choose from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton

from mmfast.kernels.attention import (
    ADDED_MASK,
    BOOL_MASK,
    BOOL_OF_KEYS,
    DENSE,
    NO_MASK,
    NOT_CAUSAL,
    TOP_LEFT,
)
from mmfast.kernels.common import device_limits, interpreting

KEY = ["E", "EV", "MASK", "CAUSAL", "TWO", "BITS", "LONG"]  # of what tuned.json has
FUSED_KEY = ["E", "EV", "MASK", "CAUSAL", "BITS", "LONG", "ANY_ORDER"]
# Which spills up to 120 bytes in one pass over heads of 112 and 128.
_BEFORE_3_7 = tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)
_LONG = 1024  # keys or queries from which on descriptors are worth making


def precision(dtype: torch.dtype) -> str:
    """How products are made."""
    if interpreting() or dtype != torch.float32:
        return "ieee"
    return (
        "tf32x3" if triton.runtime.driver.active.get_current_target().backend == "cuda" else "ieee"
    )


def facts(dtype: torch.dtype, scale: float, *lengths: int) -> dict[str, Any]:
    """What the choice depends on besides the compile-time arguments. ``lengths``: of sequences,
    the longest of each stream."""
    return {
        "BITS": torch.finfo(dtype).bits,
        "LONG": max(lengths) >= _LONG,
        "POSITIVE": min(scale, *lengths) > 0,
    }


def _config(rows: int, columns: int, warps: int, stages: int, **more: bool) -> triton.Config:
    flags = {"TMA": False, "AHEAD": False} | more
    sizes = {"BLOCK_M": rows, "BLOCK_N": columns}
    return triton.Config({**sizes, **flags}, num_warps=warps, num_stages=stages)


def _plain(kernel: str, constants: Mapping[str, Any], **more: bool) -> triton.Config:
    """For all kinds of devices."""
    backend, arch, _ = device_limits(triton.runtime.driver.active.get_current_device())
    arch = arch if backend == "cuda" else None
    mask, bits = constants["MASK"], constants["BITS"]
    pairs = mask < BOOL_OF_KEYS.value
    masked = _masked_tiles(constants, kernel, arch, pairs) if mask and bits == 16 else None
    rows, columns, warps, stages = masked or _tiles(bits, constants, kernel, arch)
    return _config(rows, columns, warps, min(stages, 2) if backend == "hip" else stages, **more)


def forward_configs(configs: list[triton.Config], **constants: Any) -> list[triton.Config]:
    """What the forward has to choose from; ``docs/tuning.md`` says what is expected of which."""
    plain = _plain("forward", constants, SPECIAL=False)
    if not _on_hopper(constants):
        return [plain]
    width, masked = widest(constants), constants["MASK"] != NO_MASK.value
    dense = constants["Q_KIND"] == constants["K_KIND"] == DENSE.value
    simple = not masked and not constants["TWO"]
    made = functools.partial(_config, AHEAD=True)
    # Two small programs of a multiprocessor, or one large.
    small = 128 if width <= 80 and dense and not masked else 64
    by_pointers = [made(64, small, 4, 2, SPECIAL=False), made(128, 64, 8, 2, SPECIAL=False)]
    large = (128, 2) if width <= (128 if simple and _uncut(constants) else 80) else (64, 3)
    by_descriptors = [made(128, large[0], 8, large[1], TMA=True, SPECIAL=False)]
    # The blocks of keys that come first and last have memory of their own.
    special = (128, 2) if width <= 96 else (64, 3)
    # Causality must cut no block but the last.
    last = constants["CAUSAL"] == TOP_LEFT.value and special[0] == 128
    if simple and dense and (last or _uncut(constants)):
        by_descriptors.append(made(128, special[0], 4, special[1], TMA=True, SPECIAL=True))
    return _in_order(constants, plain, by_pointers, by_descriptors)


def query_gradient_configs(configs: list[triton.Config], **constants: Any) -> list[triton.Config]:
    """What the gradient of the queries has to choose from."""
    plain = _plain("query_gradient", constants)
    if not _on_hopper(constants) or constants["STORE"]:
        return [plain]
    made = functools.partial(_config, 128, AHEAD=True)
    by_descriptors = [made(64, 8, 2, TMA=True)]
    if widest(constants) <= 96:
        by_descriptors.insert(0, made(128, 8, 2, TMA=True))
    return _in_order(constants, plain, [made(64, 8, 2)], by_descriptors)


def key_gradient_configs(configs: list[triton.Config], **constants: Any) -> list[triton.Config]:
    """What the gradient of keys and values has to choose from."""
    plain = _plain("key_gradient", constants)
    width = widest(constants)
    # Two loops, of blocks that causality cuts and of others, take registers as well.
    if not _on_hopper(constants) or (width > 96 and not _uncut(constants)):
        return [plain]
    masked = constants["MASK"] != NO_MASK.value
    simple = not masked and not constants["TWO"] and _uncut(constants)
    rows = 64 if width <= 64 and _uncut(constants) else 32
    by_pointers = _config(rows, 128, 8, 2, AHEAD=True)
    # The descriptors of two streams take registers, and so does a mask.
    rows = 64 if width <= (96 if simple else 64) else 32
    by_descriptors = [_config(rows, 128, 8, 2, TMA=True, AHEAD=True)]
    if width > 96 and (masked or constants["TWO"]):
        by_descriptors = []
    return _in_order(constants, plain, [by_pointers], by_descriptors)


# For the fused gradients, to choose from as well: the kernels of queries and of keys instead.
TWO_KERNELS = triton.Config({"BLOCK_M": 0, "BLOCK_N": 0, "ORDERED": False})


def fused_gradient_configs(configs: list[triton.Config], **constants: Any) -> list[triton.Config]:
    """What all gradients of one stream of queries and one of keys have to choose from.

    Until something is measured it is two kernels, unless sums may be made in any order.
    """
    wide = widest(constants) > 96
    if not _on_hopper(constants) or (wide and _BEFORE_3_7):
        return [TWO_KERNELS]
    simple = constants["MASK"] == NO_MASK.value and _uncut(constants)
    fused = []
    for ordered in (False, True):
        # Turns take registers, and so does a mask; each order has its own last bits.
        if (constants["ANY_ORDER"] or ordered) and (simple or not (wide and ordered)):
            sizes = {"BLOCK_M": 64, "BLOCK_N": 128, "ORDERED": ordered}
            fused.append(triton.Config(sizes, num_warps=8, num_stages=2))
    if constants["ANY_ORDER"] and constants["LONG"]:
        return [*fused, TWO_KERNELS]
    return [TWO_KERNELS, *fused]


def _uncut(constants: Mapping[str, Any]) -> bool:
    return bool(constants["CAUSAL"] == NOT_CAUSAL.value)


def _in_order(
    constants: Mapping[str, Any],
    plain: triton.Config,
    by_pointers: list[triton.Config],
    by_descriptors: list[triton.Config],
) -> list[triton.Config]:
    """Until something is measured the first is taken; descriptors pay where sequences are long."""
    if constants["FACTOR"] % 8:  # 16 bytes
        return [*by_pointers, plain]
    if constants["LONG"]:
        return [*by_descriptors, *by_pointers, plain]
    return [*by_pointers, plain, *by_descriptors]


def _on_hopper(constants: Mapping[str, Any]) -> bool:
    """Whether its own means apply: asynchronous products, and memory copied by descriptors."""
    backend, arch, _ = device_limits(triton.runtime.driver.active.get_current_device())
    return bool(backend == "cuda" and arch == 90 and suits_hopper(constants))


def suits_hopper(constants: Mapping[str, Any]) -> bool:
    """Whether they would, on one."""
    return bool(
        constants["BITS"] == 16
        and constants["POSITIVE"]
        and not constants["DROPOUT"]
        and constants["MASK"] not in (BOOL_MASK.value, ADDED_MASK.value)
        and widest(constants) <= 128
    )


def widest(sizes: Mapping[str, Any]) -> int:
    """Columns of the wider of two heads' tiles."""
    return int(max(sizes["BLOCK_E1"] + sizes["BLOCK_E2"], sizes["BLOCK_V1"] + sizes["BLOCK_V2"]))


def _tiles(
    bits: int, sizes: Mapping[str, Any], kernel: str, arch: int | None
) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages: the largest whose sums stay in registers.

    Args:
        arch: NVIDIA's number, or None for AMD.
    """
    width = widest(sizes)
    split = sizes["BLOCK_E2"] + sizes["BLOCK_V2"] > 0
    # Products of a whole group of warps want 64 rows: queries, or keys where these are the rows.
    grouped = arch is not None and arch >= 90
    is_keys = kernel == "key_gradient"
    warps = 4 if width <= 64 else 8
    if bits == 64:
        return 16, 16, 4, 1
    if bits == 32:
        if width > 128:
            return 16, 16, 4, 1
        if not grouped:
            return 32, 16 if split else 32, 4, 1
        return (32, 64, 8, 1) if is_keys else (64, 32, 8 if split and arch >= 100 else 4, 1)
    if kernel == "forward":
        if width > 128:
            return 64, 32, 8, 2
        # On AMD a thread of fewer has more registers, which columns that are masked need.
        few = arch is None and width > 96 and max(sizes["E"], sizes["EV"]) < width
        return 128, 64, 4 if few else warps, 3
    if width > 128:
        return 32, 32, 8, 1
    if arch is None and (is_keys or width > 96):
        return 32, 64, 4, 2
    if is_keys and grouped and width > 64:
        return 32, 64, 8, 2
    if is_keys and not grouped:
        return (32, 32, 4, 2) if split else (32, 64, warps, 2)
    if is_keys and arch is not None and arch >= 100:
        return 64, 64, 8, 2
    return 64, 64, warps, 2


def _masked_tiles(
    sizes: Mapping[str, Any], kernel: str, arch: int | None, pairs: bool
) -> tuple[int, int, int, int] | None:
    """Likewise, of 16 bits, where a mask needs registers; None where they are as without.

    Args:
        pairs: it has a number for each pair of query and key, not only for each key.
    """
    width = widest(sizes)
    split = sizes["BLOCK_E2"] + sizes["BLOCK_V2"] > 0
    if width > 128:
        return None
    if arch is not None and arch < 90:
        if kernel == "forward":
            if width > (64 if pairs else 96):
                return 64, 32, 8, 2
            return (128, 32, 8, 2) if pairs else None
        if kernel == "query_gradient":
            return 64, 32, 4 if width <= 64 else 8, 2
        return (16, 64, 4, 1) if split else (32, 32, 4 if width <= 64 else 8, 2)
    if kernel == "forward" and width <= 64 and arch is not None and (pairs or arch >= 100):
        return 128, 64, 8, 3
    if arch is None and kernel == "forward" and width > 96:
        return 64 if pairs else 128, 64, 4, 2
    if arch is None or not pairs:
        return None
    if kernel == "forward" and width > 96:
        return (128, 32, 8, 3) if arch < 100 else (64, 64, 8, 2)
    # Keys are the rows of products, of which a group of warps wants 64.
    many = kernel == "key_gradient" and width > (96 if arch < 100 else 64)
    return (16, 64, 8, 2) if many else None
