"""``mmfast decompress``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from mmfast.commands import CommandError
from mmfast.commands.media import check_format, check_out, read_bytes, reader_of, told, whole
from mmfast.commands.options import add_device, add_tile, device_of, open_model
from mmfast.data.video import VideoReader
from mmfast.models import VQVAE, decompress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``decompress``."""
    parser.add_argument("model", type=Path, help="the model that the file was compressed with")
    parser.add_argument("file", type=Path, metavar="file.mmv", help="the compressed file")
    parser.add_argument("out", type=Path, help="what to write, in the format that it ends in")
    add_tile(parser)
    add_device(parser)


def run(given: argparse.Namespace) -> int:
    """Write what the codes in a file say."""
    check_out(given.out)
    model, about = open_model(given.model, VQVAE, device_of(given))
    reader = whole(reader_of(about, model))
    check_format(reader, given.out)
    data = read_bytes(given.file)
    try:
        with Console(stderr=True).status("decompressing"):
            x, _, note = decompress(model, data, tile=given.tile)
    except (ImportError, ValueError) as error:
        raise CommandError(f"{given.file}: {error}") from None
    if isinstance(reader, VideoReader):
        reader = dataclasses.replace(reader, fps=note.get("fps"), stride=None)
    try:
        with told():
            reader.write(x.cpu(), given.out)
    except ValueError as error:
        raise CommandError(str(error)) from None
    print(f"{given.out}: {' x '.join(map(str, x.shape[1:]))}")
    return 0
