"""``mmfast sample``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmfast.commands import CommandError
from mmfast.commands.drawing import (
    Drawer,
    check_guidance,
    drawer_of,
    labels_of,
    seeds_of,
    seeds_of_numbers,
)
from mmfast.commands.given import add_given, read_given
from mmfast.commands.media import (
    SUFFIXES,
    check_folder,
    check_out,
    check_samples,
    reader_of,
    told,
    write_samples,
)
from mmfast.commands.multimodal import Maker, maker_of
from mmfast.commands.options import add_device, device_of, open_model, within
from mmfast.models import Configured, MultimodalDiT
from mmfast.models.diffusion import SAMPLERS
from mmfast.train.run_folder import model_file

MOST_SEED = 1 << 31


def add_sampling(parser: argparse._ActionsContainer) -> None:
    """How samples are drawn."""
    parser.add_argument(
        "--sampler", choices=SAMPLERS, metavar="NAME", help=f"one of {', '.join(SAMPLERS)}"
    )
    parser.add_argument("--steps", type=within(1, 10000), default=50, help="(%(default)s)")
    parser.add_argument(
        "--guidance", type=float, help="scale from 0; 1 is none (2 if the model can, but of texts)"
    )
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


def draw(
    drawer: Drawer,
    given: argparse.Namespace,
    condition: Mapping[str, Tensor],
    seeds: Tensor,
) -> Tensor:
    """Samples of what the model is told ``(N, ...)``, drawn as :func:`add_sampling` asks."""
    return drawer.draw(
        condition,
        seeds,
        guidance=drawer.guidance(given.guidance),
        sampler=given.sampler,
        steps=given.steps,
        batch=given.batch,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``sample``."""
    parser.add_argument("model", type=Path, help="file of a transformer, or the folder of its run")
    parser.add_argument(
        "--out", type=Path, help="picture of all, such as out.png; of one sound, video or text too"
    )
    parser.add_argument(
        "--count", type=within(1, 1 << 16), help="samples (8 of each class, 1 of what is given)"
    )
    parser.add_argument("--each", type=Path, metavar="FOLDER", help="write each to a file")
    classes = parser.add_argument_group("of a DiT of classes")
    classes.add_argument("--classes", help="names or numbers, such as 0,1,7 (all)")
    given = parser.add_argument_group("of a DiT of texts or codes, or a multimodal one")
    add_given(given)
    given.add_argument("--want", nargs="+", metavar="NAME", help="modalities to make (all others)")
    add_sampling(parser.add_argument_group("sampling"))
    add_device(parser)


def run(given: argparse.Namespace) -> int:
    """Draw samples and write them: a row for each class, or for eight where there is one."""
    if given.out is None and given.each is None:
        raise CommandError("nowhere to write to: give --out FILE or --each FOLDER")
    if given.out is not None:
        check_out(given.out)
    if given.each is not None:
        check_folder(given.each)
    model, about = open_model(given.model, Configured, device_of(given))
    file = model_file(given.model)
    if isinstance(model, MultimodalDiT):
        return _multimodal(given, maker_of(file, model, about))
    drawer = drawer_of(file, model, about)
    check_sampling(drawer, given)
    if given.want is not None:
        raise CommandError("--want is of multimodal models, this one makes one modality")
    return _of_classes(given, drawer) if drawer.context is None else _of_context(given, drawer)


def _of_classes(given: argparse.Namespace, drawer: Drawer) -> int:
    if given.given or given.text is not None:
        raise CommandError("this model is told a class: give --classes, not --given or --text")
    chosen, count = torch.tensor(labels_of(given.classes, drawer.classes)), given.count or 8
    labels = chosen.repeat_interleave(count)
    numbers = torch.arange(count).repeat(len(chosen))
    _check_out(given, drawer, len(labels))
    drawn = draw(drawer, given, {"y": labels}, seeds_of(given.seed, labels, numbers))
    columns = count if len(chosen) > 1 else min(count, 8)
    names = [f"{drawer.classes[int(c)]}-{int(n)}" for c, n in zip(labels, numbers, strict=True)]
    return _write(given, drawer, drawn, columns, names)


def _of_context(given: argparse.Namespace, drawer: Drawer) -> int:
    if given.classes is not None:
        raise CommandError("--classes is of models of classes: give --given or --text")
    assert drawer.context is not None
    name, count = drawer.context.modality, given.count or 1
    batch = read_given(given, {name: drawer.context.reader})
    if not batch:
        what = "--text" if name == "text" else f"--given {name}=FILE"
        raise CommandError(f"the model makes samples from {name}: give {what}")
    one = drawer.condition(batch)
    condition = {n: v.expand(count, *v.shape[1:]) for n, v in one.items() if v is not None}
    _check_out(given, drawer, count)
    drawn = draw(drawer, given, condition, seeds_of_numbers(given.seed, count))
    return _write(given, drawer, drawn, min(count, 8), [str(i) for i in range(count)])


def _check_out(given: argparse.Namespace, drawer: Drawer, count: int) -> None:
    if given.out is not None:
        check_samples(lambda: reader_of(drawer.about, drawer.vqvae), given.out, count)


def _write(
    given: argparse.Namespace, drawer: Drawer, drawn: Tensor, columns: int, names: Sequence[str]
) -> int:
    said = []
    if given.out is not None:
        with told():
            write_samples(lambda: reader_of(drawer.about, drawer.vqvae), drawn, given.out, columns)
        said.append(f"{given.out}: {_number(len(drawn))}")
    if given.each is not None:
        reader = reader_of(drawer.about, drawer.vqvae)
        with told():
            given.each.mkdir(parents=True, exist_ok=True)
            for x, name in zip(drawn, names, strict=True):
                file = f"{name}{SUFFIXES[reader.modality]}".replace("/", "_")
                reader.write(x, given.each / file)
        said.append(f"each in {given.each}")
    print(", ".join(said))
    return 0


def _multimodal(given: argparse.Namespace, maker: Maker) -> int:
    if given.classes is not None:
        raise CommandError("--classes is of models of classes: give --given label=CLASS")
    check_guidance(given.guidance)
    maker.check(given.sampler, given.steps)
    one, count = read_given(given, maker.readers, maker.classes), given.count or 1
    want = maker.wanted(given.want, one)
    maker.guidance(given.guidance, want, one)
    if given.out is not None:
        if len(want) > 1:
            raise CommandError(
                f"--out is one modality's, {', '.join(want)} are wanted: give --each FOLDER"
            )
        maker.check_file(want[0], given.out, count)
    drawn = maker.draw(
        want,
        {name: value.expand(count, *value.shape[1:]) for name, value in one.items()},
        seeds_of_numbers(given.seed, count),
        guidance=given.guidance,
        sampler=given.sampler,
        steps=given.steps,
        batch=given.batch,
    )
    said = []
    with told():
        if given.out is not None:
            maker.write(want[0], drawn[want[0]], given.out)
            said.append(f"{given.out}: {_number(count)} of {want[0]}")
        if given.each is not None:
            maker.write_each(drawn, given.each)
            said.append(f"{given.each}: {_number(count)} of {', '.join(want)}")
    print(", ".join(said))
    return 0


def _number(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"
