"""Ctrl-C and termination signals: a run ends between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """Ctrl-C or a termination signal: the run has saved a checkpoint, if it has a folder.

    Attributes:
        step: how many steps have been made.
        checkpoint: where.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        kept = "nothing was kept" if checkpoint is None else f"kept in {checkpoint}"
        super().__init__(f"stopped after step {step}, {kept}")
        self.step, self.checkpoint = step, checkpoint


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a termination signal came; a second one acts as it always does."""
    came = threading.Event()
    kinds = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = {kind: signal.getsignal(kind) for kind in kinds}
    owner = os.getpid()

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == owner:
            came.set()
            restore()
        elif number != signal.SIGINT:
            # A forked process that reads data: Ctrl-C is for the one that trains to act on.
            restore()
            os.kill(os.getpid(), number)

    for kind in kinds:
        signal.signal(kind, handle)
    try:
        yield came.is_set
    finally:
        restore()
