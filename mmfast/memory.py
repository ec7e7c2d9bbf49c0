"""Memory of outputs on the CPU: that of tensors that died is kept for the next ones.

The first write to a page of new memory costs a microsecond for 4 KiB, more than most kernels need
for it, and the C library hands large pieces back to the system whenever they are freed. Outputs of
mmfast's C++ kernels from 256 KiB on, and the rooms that linear layers need, lie in memory of their
own instead, as outputs on a GPU do: what is freed serves the next outputs. Of what no tensor uses
at most a 32nd of the machine's memory is kept, and at most 1 GiB, or as many MiB as the environment
variable ``MMFAST_KEPT_MIB`` says; 0 keeps nothing. Such an output cannot grow by ``resize_``: its
storage is not torch's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import backends, library

# No dtype makes more of fewer numbers than memory is kept for.
_SMALL = 0 if backends.extension_missing() else backends.extension().LEAST_KEPT // 8

_given = os.environ.get("MMFAST_KEPT_MIB", "0")
if not (_given.isascii() and _given.isdigit()):
    raise ValueError(f"MMFAST_KEPT_MIB must be a whole number of MiB, got {_given!r}")


def empty_cache() -> None:
    """Give the memory that no tensor uses back to the system."""
    if not backends.extension_missing():
        backends.extension().release_kept_memory()


def kept_bytes() -> int:
    """Bytes that are kept for outputs to come."""
    return 0 if backends.extension_missing() else backends.extension().kept_bytes()


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As :func:`torch.empty_like`, in kept memory where an output of a kernel would be."""
    if _kept(tensor, tensor.numel()):
        return library.new_output(tensor, tensor.shape, dtype or tensor.dtype)
    # An argument takes time, even one that changes nothing.
    return torch.empty_like(tensor) if dtype is None else torch.empty_like(tensor, dtype=dtype)


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """As :meth:`torch.Tensor.new_empty`, in kept memory where an output of a kernel would be."""
    dtype = dtype or like.dtype
    if _kept(like, _SMALL):
        return library.new_output(like, shape, dtype)
    return like.new_empty(shape, dtype=dtype)


def _kept(like: Tensor, numbers: int) -> bool:
    return (
        numbers >= _SMALL > 0
        and like.device.type == "cpu"
        and like.is_contiguous()
        and library.unwatched((like,))
    )
