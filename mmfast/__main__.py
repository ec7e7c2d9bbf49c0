"""``mmfast`` and ``python -m mmfast``: dispatch to :mod:`mmfast.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mmfast.commands import COMMANDS, INTERRUPTED, CommandError
from mmfast.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; without one, print the help.

    Args:
        arguments: the command line after the program's name, ``sys.argv[1:]`` where None.

    Returns:
        The exit status: 1 for failures that the user can mend, told in one line;
        130 after Ctrl-C.

    Raises:
        SystemExit: the command line is wrong (status 2), or asked for help or the version.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="mmfast", description="Exact, fused kernels for VQ-VAEs and diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"mmfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    module = None
    for name, described in COMMANDS.items():
        command = commands.add_parser(name, help=described, description=described)
        if words[:1] == [name]:
            module = importlib.import_module(f"mmfast.commands.{name}")
            module.add_arguments(command)
    given = parser.parse_args(words)
    if module is None:
        parser.print_help()
        return 0
    try:
        status: int = module.run(given)
    except CommandError as error:
        print(f"mmfast {given.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


if __name__ == "__main__":
    raise SystemExit(main())
