"""Whether sums may be made in any order, where that is faster. By default they are not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_allowed = False


@contextlib.contextmanager
def sums_in_any_order() -> Iterator[None]:
    """Inside the block kernels may add to one number in any order, where that is faster.

    The same inputs then need not give the same bits. Today it is the gradient of attention's
    queries on Hopper; see ``docs/tuning.md``. As long as ``torch.use_deterministic_algorithms`` is
    on, it changes nothing. A backward pass has to run inside the block, not only its forward. The
    setting holds for the whole process, as that of :func:`mmfast.use_backend` does.
    """
    global _allowed
    before, _allowed = _allowed, True
    try:
        yield
    finally:
        _allowed = before


def any_order() -> bool:
    """Whether kernels may add in any order now."""
    return _allowed and not torch.are_deterministic_algorithms_enabled()
