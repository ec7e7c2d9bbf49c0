"""``mmfast reconstruct``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmfast.commands import CommandError
from mmfast.commands.media import (
    SUFFIXES,
    check_folder,
    extent,
    reader_of,
    timed,
    told,
    whole,
)
from mmfast.commands.options import add_device, add_tile, device_of, open_model
from mmfast.data import FileError, Reader, write_image
from mmfast.data.progress import tracked
from mmfast.models import VQVAE, compress, count_codes, decompress, usage_of_counts
from mmfast.quality import psnr
from mmfast.train.grids import as_images, grid


class Reconstructed(NamedTuple):
    """A row of the table.

    Attributes:
        file: that was read.
        size: of the sample.
        psnr: in dB, of values in [-1, 1]; None if nothing is lost.
        bits: of the compressed file, for each ``unit``.
        unit: pixel or second.
        used: how many different codes occur, in the mean of the stages.
        perplexity: likewise.
        written: files.
    """

    file: str
    size: list[int]
    psnr: float | None
    bits: float
    unit: str
    used: float
    perplexity: float
    written: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``reconstruct``."""
    parser.add_argument("model", type=Path, help="file of a VQVAE, or the folder of its run")
    parser.add_argument("files", type=Path, nargs="+", help="pictures, videos or sounds")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--cut", action="store_true", help="scale and cut to the size that the model was trained on"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_tile(parser)
    add_device(parser)


def run(given: argparse.Namespace) -> int:
    """Write original and reconstruction of each file side by side; broken ones are left out.

    Returns:
        1 if a file was left out.
    """
    check_folder(given.out)
    model, about = open_model(given.model, VQVAE, device_of(given))
    reader = reader_of(about, model)
    if not given.cut:
        reader = whole(reader)
    with told():
        given.out.mkdir(parents=True, exist_ok=True)
    named = list(zip(given.files, _names(given.files), strict=True))
    _check_kept(reader, given.out, named)
    rows = []
    for path, name in tracked(named, "reconstructing", len(named)):
        try:
            x = reader.read(path)
        except FileError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        except ImportError as error:
            raise CommandError(str(error)) from None
        with told():
            rows.append(
                _reconstruct(model, timed(reader, path), path, x, given.out / name, given.tile)
            )
    if given.json:
        print(json.dumps([row._asdict() for row in rows], indent=2, allow_nan=False))
    elif rows:
        _show(rows)
    return int(len(rows) < len(given.files))


def _names(files: Sequence[Path]) -> list[str]:
    """Names to write to, without an ending: those of the files, numbered where two are alike."""
    names: list[str] = []
    for path in files:
        name, number = path.stem, 1
        while name in names:
            number += 1
            name = f"{path.stem}-{number}"
        names.append(name)
    return names


def _check_kept(reader: Reader, out: Path, named: Sequence[tuple[Path, str]]) -> None:
    """No file that is to be reconstructed is written over, else CommandError."""
    read = {path.resolve() for path, _ in named}
    for _, name in named:
        for path in _written(reader, out / name):
            if path.resolve() in read:
                raise CommandError(f"{path}: would be replaced; give another folder with --out")


def _reconstruct(
    model: VQVAE, reader: Reader, path: Path, x: Tensor, out: Path, tile: int | None
) -> Reconstructed:
    data = compress(model, x.to(next(model.parameters()).device), tile=tile)
    y, indices, _ = decompress(model, data, tile=tile)
    y = y.cpu()
    counts = count_codes(model, indices[None])
    amount, unit = extent(reader, x)
    ratio = psnr(x, y)
    return Reconstructed(
        str(path),
        list(x.shape[1:]),
        ratio if math.isfinite(ratio) else None,
        8 * len(data) / amount,
        unit,
        _mean([float((c > 0).sum()) for c in counts]),
        _mean([float(usage_of_counts(c).perplexity) for c in counts]),
        [str(written) for written in _write(reader, x, y, out)],
    )


def _written(reader: Reader, out: Path) -> list[Path]:
    """The files that are written for one, whose name without an ending is ``out``."""
    endings = dict.fromkeys((".png", SUFFIXES[reader.modality]))
    return [out.parent / (out.name + ending) for ending in endings]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _write(reader: Reader, x: Tensor, y: Tensor, out: Path) -> list[Path]:
    """A picture of both, and what can be watched or listened to."""
    picture, *others = _written(reader, out)
    pair = torch.stack([x, y.clamp(-1, 1)])
    # Wide ones, of videos and sounds, one below the other.
    columns = 2 if reader.modality == "image" else 1
    write_image(grid(as_images(pair), columns=columns), picture)
    for other in others:
        reader.write(torch.cat([x, y], dim=-1) if reader.modality == "video" else y, other)
    return [picture, *others]


def _show(rows: Sequence[Reconstructed]) -> None:
    table = Table()
    headings = "file", "size", "PSNR", f"bits per {rows[0].unit}", "codes", "perplexity"
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "file" else "right", overflow="fold")
    for row in rows:
        size = " x ".join(map(str, row.size))
        numbers = (
            "infinite" if row.psnr is None else f"{row.psnr:.2f} dB",
            f"{row.bits:.3f}",
            f"{row.used:.0f}",
            f"{row.perplexity:.1f}",
        )
        table.add_row(row.file, size, *numbers)
    console = Console(markup=False, highlight=False)
    console.print(table)
    for row in rows:
        for path in row.written:
            console.print(f"wrote {path}", soft_wrap=True)
