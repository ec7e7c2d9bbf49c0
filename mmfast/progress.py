"""Progress bars on standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def progress_bar(
    what: str, *, said: bool = False, console: Console | None = None, disable: bool = False
) -> Progress:
    """A bar with counts and the time left; rich is imported only now.

    Args:
        what: is being done, in a word or two.
        said: tasks have a field of that name, a text beside the counts.
        console: to show it on; one on standard error by default.
        disable: show nothing.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        *([TextColumn("{task.fields[said]}")] if said else []),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        disable=disable,
    )
