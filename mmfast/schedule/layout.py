"""Where the coefficients of a sampler's step stand in a row of its table.

A step is a linear map. Its sources are, in this order: the sample x, the model's output m, the
noise n, the denoised prediction p, and the slots of the history. It computes

    p    = clamp(denoised . (x, m, n), low, high)
    next = next . (x, m, n, p, slots)
    slot = slot . (x, m, n, p, slots), for each slot

and a slot whose row is its own unit vector stays as it is. A source whose coefficient is 0 is not
read: what it holds, NaN included, does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

X, M, N, P, HISTORY = range(5)


@dataclass(frozen=True)
class Layout:
    """Columns of a table's row, for so many slots of history.

    Attributes:
        slots: S, tensors of history.
    """

    slots: int

    DENOISED = 0  # x, m, n
    LOW = 3
    HIGH = 4
    LOG_SCALE = 5  # bias and factor: the noise is scaled by exp(bias + factor * variance)
    GUIDANCE = 7  # 1: guided as asked; 0: the conditional output alone; what is between, mixed
    INPUT_SCALE = 8  # of the next step's model input
    NEXT = 9  # x, m, n, p, slots

    @property
    def sources(self) -> int:
        """Number of sources of a step."""
        return HISTORY + self.slots

    def slot(self, s: int) -> int:
        """First column of the row that makes slot s."""
        return self.NEXT + (1 + s) * self.sources

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.slot(self.slots)


def slots_of(columns: int) -> int:
    """How many slots a table of so many columns has.

    Raises:
        ValueError: no table has so many.
    """
    for slots in range(columns):
        have = Layout(slots).columns
        if have == columns:
            return slots
        if have > columns:
            break
    raise ValueError(f"no sampler's table has {columns} columns")
