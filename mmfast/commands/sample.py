"""``mmfast sample``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mmfast.commands.drawing import Drawer, labels_of, open_dit, seeds_of
from mmfast.commands.media import check_picture, reader_of, told
from mmfast.commands.options import add_device, device_of, within
from mmfast.data import write_image
from mmfast.models.diffusion import SAMPLERS
from mmfast.train.grids import as_images, grid

_SUFFIXES = {"image": ".png", "video": ".mp4", "waveform": ".wav", "mel": ".wav"}
MOST_SEED = 1 << 31


def add_sampling(parser: argparse._ActionsContainer) -> None:
    """How samples are drawn."""
    parser.add_argument(
        "--sampler", choices=SAMPLERS, metavar="NAME", help=f"one of {', '.join(SAMPLERS)}"
    )
    parser.add_argument("--steps", type=within(1, 10000), default=50, help="(%(default)s)")
    parser.add_argument("--guidance", type=float, help="scale; 1 is none (2 if the model can)")
    parser.add_argument("--seed", type=within(0, MOST_SEED - 1), default=0, help="(%(default)s)")
    parser.add_argument(
        "--batch", type=within(1, 1 << 20), default=64, help="samples at a time (%(default)s)"
    )


def check_sampling(drawer: Drawer, given: argparse.Namespace) -> None:
    """Whether the model can be sampled as :func:`add_sampling` asks.

    Raises:
        CommandError: it cannot.
    """
    drawer.guidance(given.guidance)
    drawer.check(given.sampler, given.steps)


def draw(drawer: Drawer, given: argparse.Namespace, labels: Tensor, numbers: Tensor) -> Tensor:
    """Samples of classes ``labels`` (N,), which are the ``numbers``-th (N,) of each, drawn as
    :func:`add_sampling` asks."""
    return drawer.draw(
        labels,
        seeds_of(given.seed, labels, numbers),
        guidance=drawer.guidance(given.guidance),
        sampler=given.sampler,
        steps=given.steps,
        batch=given.batch,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``sample``."""
    parser.add_argument("model", type=Path, help="file of a DiT, or the folder of its run")
    parser.add_argument("--out", type=Path, required=True, help="picture of all, such as out.png")
    parser.add_argument("--classes", help="names or numbers, such as 0,1,7 (all)")
    parser.add_argument(
        "--count", type=within(1, 1 << 16), default=8, help="samples of each class (%(default)s)"
    )
    parser.add_argument("--each", type=Path, metavar="FOLDER", help="also write each to a file")
    add_sampling(parser)
    add_device(parser)


def run(given: argparse.Namespace) -> int:
    """Draw samples and write them: a row for each class, or for eight where there is one."""
    check_picture(given.out)
    drawer = open_dit(given.model, device_of(given))
    check_sampling(drawer, given)
    chosen = torch.tensor(labels_of(given.classes, drawer.classes))
    labels = chosen.repeat_interleave(given.count)
    numbers = torch.arange(given.count).repeat(len(chosen))
    drawn = draw(drawer, given, labels, numbers)
    columns = given.count if len(chosen) > 1 else min(given.count, 8)
    with told():
        write_image(grid(as_images(drawn), columns=columns), given.out)
    written = f"{given.out}: {len(drawn)} samples"
    if given.each is not None:
        reader = reader_of(drawer.about, drawer.vqvae)
        with told():
            given.each.mkdir(parents=True, exist_ok=True)
            for x, label, number in zip(drawn, labels, numbers, strict=True):
                name = f"{drawer.classes[int(label)]}-{int(number)}{_SUFFIXES[reader.modality]}"
                reader.write(x, given.each / name.replace("/", "_"))
        written += f", each in {given.each}"
    print(written)
    return 0
