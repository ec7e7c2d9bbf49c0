"""Telling the training code that batches were not finite, without waiting for the device."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


class NonFiniteBatches:
    """Warns when a counter on any device has moved.

    A counter on the CPU is read at once. One on a GPU is copied to the host in the background,
    and what has arrived is read at a later call: nothing waits, and the warning comes some steps
    late. Tracing and the capture of CUDA graphs only count.
    """

    def __init__(self) -> None:
        self._arrived: Tensor | None = None
        self._told = 0

    def look(self, counter: Tensor) -> None:
        """Warn if ``counter`` () int64 has been seen to rise."""
        if torch.compiler.is_compiling() or counter.is_meta or is_fake(counter):
            return
        if counter.device.type == "cpu":
            self._tell(int(counter))
        elif counter.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            if self._arrived is None:
                self._arrived = torch.zeros((), dtype=counter.dtype, pin_memory=True)
            self._tell(int(self._arrived))
            self._arrived.copy_(counter, non_blocking=True)

    def _tell(self, count: int) -> None:
        if count > self._told:
            warnings.warn(
                "a training batch had vectors that are not finite: the codes that they chose keep "
                "their averages; the codebook's nonfinite_batches counts such batches",
                RuntimeWarning,
                stacklevel=4,
            )
        self._told = count

    def __getstate__(self) -> dict[str, object]:
        # A copy of pinned memory is not pinned.
        return self.__dict__ | {"_arrived": None}
