"""``mmfast`` and ``python -m mmfast``: dispatch to :mod:`mmfast.commands`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from mmfast.commands import COMMANDS, INTERRUPTED, CommandError
from mmfast.version import __version__


class _Parser(argparse.ArgumentParser):
    """Says which command or option was meant, if one is wrong."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; but what is unknown is refused by the parser of the command, which knows
        the others."""
        self._words = list(args or ())
        given, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return given, left

    def error(self, message: str) -> NoReturn:
        """As argparse's, with the nearest name."""
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong is not None:
            known = [str(choice) for action in self._actions for choice in action.choices or ()]
            message += _nearest(wrong[1], known)
        else:
            known = list(self._option_string_actions)
            options = [word.partition("=")[0] for word in self._words if word.startswith("--")]
            for option in options:
                if not any(name.startswith(option) for name in known):
                    message += _nearest(option, known)
        super().error(message)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; {name}: did you mean {near[0]}?" if near else ""


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
    parser = _Parser(
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
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        said, *_ = str(error).splitlines() or [type(error).__name__]
        hint = "out of memory; take fewer samples at a time, or a smaller model"
        print(f"mmfast {given.command}: {hint} ({said})", file=sys.stderr)
        return 1
    return status


def _is_memory(error: Exception) -> bool:
    """Whether there was too little memory, as PyTorch says on a CPU or GPU."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or "can't allocate memory" in said
        or type(error).__name__ == "OutOfMemoryError"
    )


if __name__ == "__main__":
    raise SystemExit(main())
