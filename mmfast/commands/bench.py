"""``mmfast bench``."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmfast
from mmfast import comparison
from mmfast.commands import CommandError
from mmfast.commands.options import add_device, device_of

_CHECKOUT = Path(mmfast.__file__).parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``bench``."""
    add_device(parser)
    parser.add_argument("--seconds", type=_seconds, default=1.5, help="for each op (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--all",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="run the benchmarks of mmfast's repository instead, every op against every peer, "
        "with what follows as their options, such as --all --quick; needs a checkout",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def run(given: argparse.Namespace) -> int:
    """Compare a few ops with plain PyTorch, or run the repository's benchmarks.

    Returns:
        1 if a result of mmfast was wrong.
    """
    if given.all is not None:
        return _all(given.all)
    device = device_of(given)
    found = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("answers checked, then timed", total=comparison.COUNT)
        for case in comparison.cases(device):
            found.append(comparison.measure(case, given.seconds))
            progress.advance(task)
    if given.json:
        print(json.dumps([measured._asdict() for measured in found], indent=2))
    else:
        _show(found, device)
    return int(any(measured.own_match for measured in found))


def _all(options: list[str]) -> int:
    if not (_CHECKOUT / "benchmarks" / "__main__.py").is_file():
        raise CommandError(
            "the benchmarks are not part of an installed mmfast: in a checkout of its repository "
            "run python -m benchmarks; without --all a few ops are compared here and now"
        )
    return subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=_CHECKOUT).returncode


def _show(found: list[comparison.Measured], device: torch.device) -> None:
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    table = Table(title=f"Beside plain PyTorch {torch.__version__}, float32, {where}")
    for heading in ("op", "mmfast", "PyTorch", "faster", "Match", "theirs"):
        right = heading in ("mmfast", "PyTorch", "faster")
        table.add_column(
            heading, justify="right" if right else "left", overflow="fold", no_wrap=heading == "op"
        )
    for m in found:
        times = _milliseconds(m.own), _milliseconds(m.plain), f"{m.plain / m.own:.1f}x"
        op = f"{m.op}\n  {m.shape}"
        table.add_row(op, *times, m.own_match or "yes", m.plain_match or "yes")
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        "Match: with the result in float64 (indices equal, numbers within 1e-5 of the largest).\n"
        "Every op against its peers: mmfast bench --all, in a checkout of the repository."
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
