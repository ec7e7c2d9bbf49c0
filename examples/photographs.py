"""Photographs: learned compression beside a codebook of patches, JPEG and WebP, at equal size.

    python examples/photographs.py             # minutes on two cores
    python examples/photographs.py --short     # seconds, to see that it runs

1.  A VQ-VAE whose quantiser has several stages learns on six of the photographs that scikit-image
    ships. The more stages a file keeps, the larger and the better it is.
2.  Codebooks of patches are made by k-means on the same photographs, as compress_image.py has them.
3.  Two photographs that neither has seen are compressed by both, and by Pillow's JPEG and WebP.

All sizes are those of whole files, headers included. The VQ-VAE and the codebooks are not part of
them: they are the same for all photographs, as JPEG's and WebP's programs are.

The model is left in the folder of --out, for `mmfast compress` and `mmfast decompress`.

Needs the packages of ``pip install '.[examples]'``.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import compress_image
import numpy as np
import torch
import torch.nn.functional as F
from command_line import make_folder
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmfast.data import ImageReader, to_float, to_uint8
from mmfast.data.bundled import photographs
from mmfast.data.progress import tracked
from mmfast.models import VQVAE, compress, decompress, save_model
from mmfast.quality import psnr
from mmfast.train import TrainConfig, about_data, fit
from mmfast.train.vqvae import VQVAETask

try:
    from matplotlib import pyplot as plt
    from PIL import Image
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install '.[examples]' brings it") from None

HELD_OUT = ("astronaut", "coffee")
SHOWN = ("astronaut", slice(30, 190), slice(150, 310))  # what the picture shows of which
SIDE = 64  # of the squares that the VQ-VAE learns on
LEARNED, PATCHES = "VQ-VAE", "patches"
MOST_BITS = 1.0  # per pixel, in the picture
CODECS = {"JPEG": {"optimize": True}, "WebP": {"method": 6}}


@dataclass(frozen=True)
class Effort:
    """How much is learned and tried, and on how many rows and columns of the photographs."""

    steps: int = 2000
    squares: int = 4096
    codes: int = 256
    stages: int = 6
    books: tuple[tuple[int, int], ...] = (
        (8, 64),
        (8, 256),
        (8, 1024),
        (4, 64),
        (4, 256),
        (4, 1024),
    )
    qualities: tuple[int, ...] = (*range(20), *range(20, 90, 5))
    side: int = 10_000


SHORT = Effort(6, 64, 16, 2, ((8, 16),), (1, 10, 50), 320)


class Point(NamedTuple):
    """A compressed file: its size in bytes, and the pixels that come back, (height, width, 3)."""

    size: int
    pixels: np.ndarray
    psnr: float


def squares(pictures: list[np.ndarray], count: int, seed: int) -> Tensor:
    """Parts of the pictures, whole or at half size, mirrored or not: ``(N, 3, SIDE, SIDE)``."""
    generator = np.random.default_rng(seed)
    whole = [to_float(pixels) for pixels in pictures]
    halves = [F.avg_pool2d(x, 2) for x in whole]
    made = []
    for _ in range(count):
        among = whole if generator.random() < 0.7 else halves
        x = among[generator.integers(len(among))]
        top, left = (generator.integers(size - SIDE + 1) for size in x.shape[1:])
        square = x[:, top : top + SIDE, left : left + SIDE]
        made.append(square.flip(2) if generator.random() < 0.5 else square)
    return torch.stack(made)


def learned_model(data: Tensor, effort: Effort, seed: int, out: Path) -> VQVAE:
    """A VQ-VAE of 8 x 8 pixels a vector, each of up to ``stages`` codes."""
    torch.manual_seed(seed)
    quantizer = {
        "type": "ResidualVQ",
        "dim": 32,
        "num_quantizers": effort.stages,
        "codebook_size": effort.codes,
        "decay": 0.95,
        "kmeans_init": True,
        "threshold_ema_dead_code": 1,
        "commitment_weight": 0.05,
        "quantize_dropout": True,  # files may then have fewer stages
    }
    options = {"widths": (64, 128), "num_blocks": 1, "patch_size": 4}
    model = VQVAE(quantizer, 32, shortcut=True, norm=None, **options)
    about = about_data("photographs of scikit-image", (3, SIDE, SIDE), ImageReader(SIDE))
    task = VQVAETask(model, about)  # begins with principal components and k-means
    config = TrainConfig(
        steps=effort.steps,
        batch_size=16,
        lr=2e-3,
        beta2=0.95,
        ema=0.99,
        weight_decay=0.01,
        precision="bfloat16",
        seed=seed,
    )
    model = fit(task, config, {"image": data}).model
    save_model(model, out / "photographs.safetensors", **task.about)
    return model


def by_vqvae(model: VQVAE, pixels: np.ndarray, stages: int) -> Point:
    """Compressed with the codes of so many stages."""
    data = compress(model, to_float(pixels), stages=stages)
    restored = to_uint8(decompress(model, data).x).permute(1, 2, 0).numpy()
    return point(len(data), restored, pixels)


def by_patches(book: compress_image.Codebook, pixels: np.ndarray) -> Point:
    """Compressed by compress_image.py with a shared codebook."""
    data = compress_image.compress(pixels, book, shared=True).data
    return point(len(data), compress_image.decompress(data, book), pixels)


def by_codec(name: str, quality: int, pixels: np.ndarray) -> Point:
    """Compressed by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, quality=quality, **CODECS[name])
    with Image.open(buffer) as image:
        return point(len(buffer.getvalue()), np.asarray(image.convert("RGB")), pixels)


def point(size: int, restored: np.ndarray, pixels: np.ndarray) -> Point:
    """What a file of so many bytes is worth."""
    return Point(size, restored, psnr(torch.tensor(restored), torch.tensor(pixels), peak=255))


def compressed(
    photos: dict[str, np.ndarray],
    model: VQVAE,
    books: list[compress_image.Codebook],
    effort: Effort,
) -> dict[str, dict[str, list[Point]]]:
    """For each method, the points of each photograph."""
    methods: dict[str, list[Callable[[np.ndarray], Point]]] = {
        LEARNED: [partial(by_vqvae, model, stages=q + 1) for q in range(effort.stages)],
        PATCHES: [partial(by_patches, book) for book in books],
        **{
            name: [partial(by_codec, name, quality) for quality in effort.qualities]
            for name in CODECS
        },
    }
    jobs = [(m, ways, name) for m, ways in methods.items() for name in photos]
    made: dict[str, dict[str, list[Point]]] = {method: {} for method in methods}
    for method, ways, name in tracked(jobs, "compressing", len(jobs)):
        made[method][name] = [way(photos[name]) for way in ways]
    return made


def best(points: list[Point], size: int) -> Point | None:
    """The best of those that are no larger."""
    return max((p for p in points if p.size <= size), key=lambda p: p.psnr, default=None)


def table_of(points: dict[str, dict[str, list[Point]]], photos: dict[str, np.ndarray]) -> Table:
    """PSNR at the sizes of the VQ-VAE's files."""
    table = Table(title="PSNR in dB, of files that are not larger than the VQ-VAE's")
    for column in ("photograph", "stages", "bytes", "bits per pixel", *points):
        table.add_column(column, justify="left" if column == "photograph" else "right")
    for name, pixels in photos.items():
        area = pixels.shape[0] * pixels.shape[1]
        for stages, own in enumerate(points[LEARNED][name], 1):
            found = [best(of[name], own.size) for of in points.values()]
            most = max(p.psnr for p in found if p)
            shown = ["-" if p is None else f"{p.psnr:.2f}" for p in found]
            marked = [
                f"[bold]{text}[/]" if p and p.psnr == most else text
                for text, p in zip(shown, found, strict=True)
            ]
            bits = f"{8 * own.size / area:.3f}"
            table.add_row(name, str(stages), str(own.size), bits, *marked)
        table.add_section()
    return table


def draw(
    points: dict[str, dict[str, list[Point]]], photos: dict[str, np.ndarray], path: Path
) -> None:
    """Rate and distortion of each photograph, and a part of one at equal size."""
    figure = plt.figure(figsize=(10, 6.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    curves = upper.subplots(1, len(photos))
    for axis, (name, pixels) in zip(curves, photos.items(), strict=True):
        area = pixels.shape[0] * pixels.shape[1]
        for (method, of), style in zip(points.items(), ("o-", "s", "--", ":"), strict=True):
            known = sorted((8 * p.size / area, p.psnr) for p in of[name])
            axis.plot(*zip(*known, strict=True), style, label=method, markersize=4)
        axis.set(title=name, xlabel="bits per pixel", ylabel="PSNR, dB", xlim=(0, MOST_BITS))
        axis.grid(alpha=0.3)
    curves[0].legend()
    name, rows, columns = SHOWN
    for own in points[LEARNED][name]:
        chosen = {method: best(of[name], own.size) for method, of in points.items()}
        if all(chosen.values()):
            break
    area = photos[name].shape[0] * photos[name].shape[1]
    views = {"original": photos[name]} | {
        f"{method}, {p.psnr:.1f} dB": p.pixels for method, p in chosen.items() if p
    }
    lower.suptitle(f"files of at most {own.size} bytes, {8 * own.size / area:.2f} bits per pixel")
    for axis, (title, pixels) in zip(lower.subplots(1, len(views)), views.items(), strict=True):
        axis.imshow(pixels[rows, columns])
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Learn, compress, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("examples/out/photographs"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds, to see that it runs")
    parsed = parser.parse_args(arguments)
    make_folder(parsed.out)
    start = time.process_time()
    console = Console()
    effort = SHORT if parsed.short else Effort()
    try:
        everything = {k: x[: effort.side, : effort.side] for k, x in photographs().items()}
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None
    photos = {name: everything.pop(name) for name in HELD_OUT}
    console.print("the VQ-VAE")
    data = squares(list(everything.values()), effort.squares, parsed.seed)
    model = learned_model(data, effort, parsed.seed, parsed.out)
    console.print("codebooks of patches, then the photographs that were held out")
    books = [
        compress_image.learn(list(everything.values()), codes, patch)
        for patch, codes in tracked(effort.books, "k-means", len(effort.books))
    ]
    points = compressed(photos, model, books, effort)
    console.print(table_of(points, photos))
    path = parsed.out / "photographs.png"
    draw(points, photos, path)
    console.print(f"wrote {path}, {time.process_time() - start:.0f} processor seconds")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
