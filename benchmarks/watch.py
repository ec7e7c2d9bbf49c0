"""A run in a process of its own, which is ended where it hangs and followed by one that goes on.

A kernel may never end, or end its process, and no exception says so. The process tells what it is
about to do, and how long that may take; who watches it knows what it was that did not come back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

_PIPE = "MMFAST_WATCHED"  # the environment variable with a number of a file
BEGIN = 120.0  # seconds until the process says something
_LOOK = 0.5  # seconds between looks at whether it is there
_ENDING = 10.0  # seconds that it may take to end when it is interrupted
_DIES_WITH_PARENT = 1  # of prctl
_HUNG, _ENDED = LOST = "hung", "ended the process"  # how an ``End`` that is not good begins


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        status: of the process, negative for a signal; None: it was ended because it took too long.
        what: it was doing, as it said.
        seconds: that this might take.
    """

    status: int | None
    what: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether it came to its end, with an error or without."""
        return self.status is not None and 0 <= self.status <= 2

    def __str__(self) -> str:
        if self.status is None:
            return f"{_HUNG}: not done after {self.seconds:.0f} s"
        if self.status < 0:
            return f"{_ENDED} by {signal.Signals(-self.status).name}"
        return f"{_ENDED} with status {self.status}"


def watched() -> bool:
    """Whether somebody watches this process."""
    return _PIPE in os.environ


def say(what: str, seconds: float) -> None:
    """Tell who watches, if anybody does, what is next and how many seconds it may take."""
    if watched():
        os.write(int(os.environ[_PIPE]), f"{seconds} {what}\n".encode())


def follow() -> None:
    """End when the process that watches this one does, where the system can do that."""
    if watched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, int(signal.SIGKILL))


def run(command: Sequence[str]) -> End:
    """Run ``command``, and end it when it takes longer than it said."""
    read, write = os.pipe()
    environment = {**os.environ, _PIPE: str(write)}
    process = subprocess.Popen(command, pass_fds=[write], env=environment)
    os.close(write)
    what, seconds, rest = "", BEGIN, b""
    since = time.monotonic()
    try:
        while True:
            left = since + seconds - time.monotonic()
            if left < 0:
                return End(None, what, seconds)
            # Others may have the file open when the process is gone.
            if not select.select([read], [], [], min(left, _LOOK))[0]:
                if process.poll() is None:
                    continue
                return End(process.returncode, what, seconds)
            came = os.read(read, 1 << 16)
            if not came:
                return End(process.wait(), what, seconds)
            *lines, rest = (rest + came).split(b"\n")
            if lines:
                first, _, what = lines[-1].decode().partition(" ")
                seconds, since = float(first), time.monotonic()
    except KeyboardInterrupt:
        # It ends the processes that it has started, for which it needs a moment.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING)
        raise
    finally:
        process.kill()
        process.wait()
        os.close(read)
