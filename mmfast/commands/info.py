"""``mmfast info``."""

from __future__ import annotations

import argparse
import json

from mmfast import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``info``."""
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports")


def run(given: argparse.Namespace) -> int:
    """Print what runs where."""
    facts = info.collect()
    if given.json:
        print(json.dumps(facts, indent=2))
    else:
        info.show(facts)
    return 0
