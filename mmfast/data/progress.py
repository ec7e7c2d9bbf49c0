"""A progress bar for what takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from mmfast.progress import progress_bar

T = TypeVar("T")

PATIENCE = 2.0  # seconds before a bar is shown


def tracked(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items; on a terminal, a bar on standard error once they take more than two seconds.

    Args:
        items: to go through.
        what: is being done, in a word or two.
        total: number of items.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    bar = progress_bar(what)
    task = bar.add_task("", total=total)
    start, shown = time.monotonic(), False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and time.monotonic() - start > PATIENCE:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()
