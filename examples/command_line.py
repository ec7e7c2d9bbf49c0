"""What the examples' command lines share: options, a run for each seed, a table of all of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from mmfast.data.bundled import has_espeak
from mmfast.files import check_writable

Effort = TypeVar("Effort")
Run = Callable[[int, Effort, Path, Console], dict[str, str]]


def seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers."""
    return [int(part) for part in text.split(",")]


def make_folder(path: Path) -> None:
    """Make a folder that files can be written to.

    Raises:
        SystemExit: that is not possible; one line says why.
    """
    try:
        check_writable(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: {error}") from None


def run_spoken_example(
    name: str,
    about: str | None,
    run: Run[Effort],
    effort: Effort,
    short: Effort,
    arguments: Sequence[str] | None = None,
) -> int:
    """:func:`run_example` of what needs espeak-ng; where it is missing, this says so and ends."""
    if not has_espeak():
        print("skipped: espeak-ng is not installed (apt-get install espeak-ng)")
        return 0
    return run_example(name, about, run, effort, short, arguments)


def run_example(
    name: str,
    about: str | None,
    run: Run[Effort],
    effort: Effort,
    short: Effort,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run once for each seed, and print a table.

    Args:
        name: of the example, and of its folder in ``examples/out``.
        about: the help's text.
        run: called with a seed, an effort, the folder for files, and a console; what it returns is
            a column of the table.
        effort: as a rule.
        short: with ``--short``.
        arguments: of the command line.

    Raises:
        SystemExit: the command line is wrong, or a package is missing; one line says so.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("examples/out", name))
    parser.add_argument("--seeds", type=seeds, default=[0], help="such as 0,1,2")
    parser.add_argument("--short", action="store_true", help="seconds, to see that it runs")
    parsed = parser.parse_args(arguments)
    make_folder(parsed.out)
    console = Console()
    columns = []
    for seed in parsed.seeds:
        start = time.process_time()
        try:
            reached = run(seed, short if parsed.short else effort, parsed.out, console)
        except ImportError as error:
            raise SystemExit(f"error: {error}") from None
        columns.append({**reached, "processor seconds": f"{time.process_time() - start:.0f}"})
    table = Table(title=name)
    for column in ("", *(f"seed {seed}" for seed in parsed.seeds)):
        table.add_column(column, justify="right" if column else "left")
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    console.print(table)
    return 0
