"""What a run shows on the terminal: loss, speed and time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console

from mmfast.progress import progress_bar

_LINES_APART = 10.0  # seconds, where there is no terminal


def written(row: Mapping[str, float]) -> str:
    """A row of the log as text."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


class TrainingProgress:
    """A bar on standard error, or a line every few seconds where that is no terminal.

    Args:
        steps: of the whole run.
        start: that have been made already.
        shown: show anything.
    """

    def __init__(self, steps: int, start: int, *, shown: bool = True) -> None:
        self._console = Console(stderr=True, quiet=not shown)
        self._bar = progress_bar(
            "training",
            said=True,
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, completed=start, said="")
        self._steps = steps
        self.began = time.perf_counter()
        self._last = self.began, start
        self._told = 0.0

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, done: int) -> None:
        """``done`` steps have been made."""
        self._bar.update(self._task, completed=done)

    def row(self, done: int, row: Mapping[str, float]) -> None:
        """Show the loss, and how fast it goes since the row before."""
        now = time.perf_counter()
        before, steps = self._last
        speed = (done - steps) / max(now - before, 1e-9)
        self._last = now, done
        said = f"loss {row['loss']:.4g}, {speed:.3g} steps/s"
        self._bar.update(self._task, completed=done, said=said)
        if self._bar.disable and (now - self._told > _LINES_APART or done == self._steps):
            self._told = now
            left = (self._steps - done) / speed
            self.say(f"step {done} of {self._steps}: {said}, {left:.0f} s left")

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
