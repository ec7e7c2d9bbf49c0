"""``python -m mmfast``: commands about this installation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from mmfast import info
from mmfast.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; without one, print the help.

    Args:
        arguments: the command line after the program's name, ``sys.argv[1:]`` where None.

    Returns:
        The exit status.

    Raises:
        SystemExit: the command line is wrong (status 2), or asked for help or the version.
    """
    parser = argparse.ArgumentParser(
        prog="mmfast", description="Exact, fused kernels for VQ-VAEs and diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"mmfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    described = "show versions, devices, and which backend runs each op here and why"
    inform = commands.add_parser("info", help=described, description=described)
    inform.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    facts = info.collect()
    if given.json:
        print(json.dumps(facts, indent=2))
    else:
        info.show(facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
