"""Where a run's own time goes, so that it can be kept short."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.tables import Table, duration

TRUTH, FIRST, ROUNDS = "reference", "first calls", "rounds"
PARTS = (TRUTH, FIRST, ROUNDS)
_SLOWEST = 12


class Spent:
    """Seconds by case, part and contender.

    A part is one of ``PARTS``: computing the truth; a contender's first calls, with compiling,
    judging and measuring memory; the timed rounds. Whatever else is its own part.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str, str], float] = {}

    @contextmanager
    def on(self, case: str, part: str, who: str = "") -> Iterator[None]:
        """Count the time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = (case, part, who)
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds of everything."""
        return sum(self.seconds.values())

    def tables(self) -> list[Table]:
        """Seconds of each op by part, and the slowest single things."""
        if not self.seconds:
            return []
        columns = ("", *PARTS, "all")
        by_op = Table(f"Where the run's {duration(self.total)} went", columns)
        ops = dict.fromkeys(case.partition("/")[0] for case, _, _ in self.seconds)
        sums = {op: self._sums(op) for op in ops}
        for op, parts in sorted(sums.items(), key=lambda item: -sum(item[1].values())):
            cells = [f"{parts[p]:.1f} s" if p in parts else "-" for p in PARTS]
            by_op.add("", [op, *cells, f"{sum(parts.values()):.1f} s"])
        slowest = Table("The slowest of it", ("", "part", "seconds"))
        for (case, part, who), taken in sorted(self.seconds.items(), key=lambda i: -i[1])[
            :_SLOWEST
        ]:
            slowest.add("", [f"{case} {who}".strip(), part, f"{taken:.1f}"])
        return [by_op, slowest]

    def _sums(self, op: str) -> dict[str, float]:
        sums: dict[str, float] = {}
        for (case, part, _), taken in self.seconds.items():
            if case.partition("/")[0] == op:
                sums[part] = sums.get(part, 0.0) + taken
        return sums
