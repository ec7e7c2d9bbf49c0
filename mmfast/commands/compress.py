"""``mmfast compress``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from mmfast.commands import CommandError
from mmfast.commands.media import check_out, extent, reader_of, timed, told, whole
from mmfast.commands.options import add_device, add_tile, device_of, open_model
from mmfast.files import write_whole
from mmfast.models import VQVAE, compress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``compress``."""
    parser.add_argument("model", type=Path, help="file of a VQVAE, or the folder of its run")
    parser.add_argument("file", type=Path, help="a picture, video or sound, of any size")
    parser.add_argument("out", type=Path, metavar="out.mmv", help="the compressed file to write")
    add_tile(parser)
    add_device(parser)


def run(given: argparse.Namespace) -> int:
    """Write the codes of a file."""
    check_out(given.out)
    model, about = open_model(given.model, VQVAE, device_of(given))
    reader = whole(reader_of(about, model))
    with told(), Console(stderr=True).status("compressing"):
        if given.out.resolve() == given.file.resolve():
            raise CommandError(f"{given.out}: would replace the file that is to be compressed")
        x = reader.load(given.file)
        rate = getattr(timed(reader, given.file), "fps", None)
        note = {} if rate is None else {"fps": rate}
        data = compress(model, x.to(next(model.parameters()).device), tile=given.tile, **note)
        write_whole(given.out, data)
    amount, unit = extent(reader, x)
    per = f"{8 * len(data) / amount:.3f} bits per {unit}"
    print(f"{given.out}: {len(data)} bytes, {per}, {given.file.stat().st_size} before")
    return 0
