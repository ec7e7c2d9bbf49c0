"""``mmfast evaluate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmfast.commands import CommandError
from mmfast.commands.drawing import Drawer, check_guidance, drawer_of, seeds_of
from mmfast.commands.held_out import open_held_out
from mmfast.commands.judging import judge, read_classifier, train_classifier
from mmfast.commands.measuring import measure_loss, measure_vqvae
from mmfast.commands.measuring_multimodal import measure_multimodal
from mmfast.commands.media import check_out, reader_of, told
from mmfast.commands.multimodal import Maker, maker_of
from mmfast.commands.options import add_device, device_of, open_model, within
from mmfast.commands.sample import add_sampling, check_sampling, draw
from mmfast.models import VQVAE, Configured, MultimodalDiT, save_model
from mmfast.train.run_folder import model_file

_TRAIN = "train"  # a classifier, instead of reading one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``evaluate``."""
    parser.add_argument("model", type=Path, help="file of a model, or the folder of its run")
    parser.add_argument(
        "--data", help="mnist, photographs, a folder or a manifest (what the model was trained on)"
    )
    parser.add_argument(
        "--limit", type=within(1, 1 << 31), default=1000, help="samples at most (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    dit = parser.add_argument_group("of a transformer")
    dit.add_argument(
        "--parts", type=within(1, 1000), default=10, help="ranges of timesteps (%(default)s)"
    )
    dit.add_argument(
        "--classifier",
        help="file of a classifier that is to read samples of each class; "
        f"{_TRAIN}: train one on the data",
    )
    dit.add_argument("--keep", type=Path, metavar="FILE", help="write the trained classifier there")
    dit.add_argument(
        "--train-steps", type=within(1, 1 << 31), default=600, help="of it (%(default)s)"
    )
    dit.add_argument(
        "--count", type=within(1, 1 << 16), default=20, help="samples of each class (%(default)s)"
    )
    add_sampling(dit)
    add_device(parser)


def run(given: argparse.Namespace) -> int:
    """Measure a model on what it was not trained on."""
    if given.keep is not None:
        if given.classifier != _TRAIN:
            raise CommandError(f"--keep is of a classifier that is trained: --classifier {_TRAIN}")
        check_out(given.keep)
    device = device_of(given)
    model, about = open_model(given.model, Configured, device)
    file = model_file(given.model)
    if isinstance(model, VQVAE):
        if given.classifier is not None:
            raise CommandError("--classifier reads samples of a DiT, this is a VQVAE")
        found = _vqvae(given, model, about)
    elif isinstance(model, MultimodalDiT):
        found = _multimodal(given, maker_of(file, model, about))
    else:
        found = _dit(given, drawer_of(file, model, about))
    if given.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        _show(found)
    return 0


def _vqvae(given: argparse.Namespace, model: VQVAE, about: dict[str, Any]) -> dict[str, Any]:
    reader = reader_of(about, model)
    data = open_held_out(given.data, about, [reader], given.batch, labelled=False)
    found = measure_vqvae(model, data.batches(given.limit), reader)
    return {"model": "VQVAE", "data": data.name, **found}


def _dit(given: argparse.Namespace, drawer: Drawer) -> dict[str, Any]:
    check_sampling(drawer, given)
    reader = reader_of(drawer.about, drawer.vqvae)
    if drawer.context is not None and given.classifier is not None:
        raise CommandError("--classifier reads samples of classes, this model is told no class")
    told_too = [] if drawer.context is None else [drawer.context.reader]
    data = open_held_out(
        given.data,
        drawer.about,
        [reader, *told_too],
        given.batch,
        labelled=drawer.context is None,
        split=given.classifier == _TRAIN,
    )
    classifier = None
    if given.classifier == _TRAIN:
        classifier = train_classifier(drawer, data, given.train_steps)
        if given.keep is not None:
            with told():
                save_model(classifier, given.keep, data=drawer.about["data"])
    elif given.classifier is not None:
        classifier = read_classifier(Path(given.classifier), drawer)
    count = data.count(given.limit)
    found = measure_loss(drawer, data.batches(given.limit), data.modality, given.parts, count)
    made = {"model": type(drawer.dit).__name__, "data": data.name, **found}
    if classifier is None:
        return made
    labels, numbers = torch.cartesian_prod(
        torch.arange(len(drawer.classes)), torch.arange(given.count)
    ).unbind(1)
    drawn = draw(drawer, given, {"y": labels}, seeds_of(given.seed, labels, numbers))
    real = data.batches(given.limit)
    made["read_as_class"] = judge(classifier, drawn, labels, drawer.classes, real, data.modality)
    return made


def _multimodal(given: argparse.Namespace, maker: Maker) -> dict[str, Any]:
    if given.classifier is not None:
        raise CommandError("--classifier reads samples of classes, this is a multimodal model")
    check_guidance(given.guidance)
    maker.check(given.sampler, given.steps)
    readers = list(maker.readers.values())
    data = open_held_out(given.data, maker.about, readers, given.batch, partial=True)
    count = data.count(given.limit)
    sampling = {name: getattr(given, name) for name in ("sampler", "steps", "guidance")}
    found = measure_multimodal(maker, data.batches(given.limit), given.parts, count, **sampling)
    return {"model": "MultimodalDiT", "data": data.name, **found}


def _show(found: dict[str, Any]) -> None:
    console = Console(markup=False, highlight=False)
    console.print(f"{found['model']} on {found['data']}, {found['samples']} samples")
    tables = {"VQVAE": _vqvae_tables, "MultimodalDiT": _multimodal_tables}
    for table in tables.get(found["model"], _dit_tables)(found):
        console.print(table)


def _table(*headings: str) -> Table:
    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table


def _vqvae_tables(found: dict[str, Any]) -> Iterator[Table]:
    table = _table("", "mean")
    table.add_row("PSNR", "infinite" if found["psnr"] is None else f"{found['psnr']:.2f} dB")
    if found["lossless"]:
        table.add_row("without any loss, left out of PSNR", f"{found['lossless']} samples")
    if found["ssim"] is not None:
        table.add_row("SSIM", f"{found['ssim']:.4f}")
    table.add_row("reconstruction loss", f"{found['reconstruction_loss']:.5g}")
    bits = found["bits"]
    table.add_row(f"bits per {bits['unit']}, fixed length", f"{bits['fixed']:.4f}")
    table.add_row("as their entropy allows", f"{bits['entropy']:.4f}")
    yield table
    table = _table("stage", "codes", "used", "perplexity")
    for i, stage in enumerate(found["stages"]):
        used = f"{stage['used']} ({stage['used'] / stage['codes']:.0%})"
        table.add_row(str(i), str(stage["codes"]), used, f"{stage['perplexity']:.1f}")
    yield table


def _losses_table(found: dict[str, Any], title: str | None = None) -> Table:
    table = _table("timesteps", "loss")
    table.title = title
    for part in found["parts"]:
        low, high = part["timesteps"]
        table.add_row(f"{low:g} to {high:g}", f"{part['loss']:.5f}")
    table.add_section()
    table.add_row("all", f"{found['loss']:.5f}")
    if "loss_without_condition" in found:
        table.add_row("all, without a condition", f"{found['loss_without_condition']:.5f}")
    return table


def _multimodal_tables(found: dict[str, Any]) -> Iterator[Table]:
    for name, one in found["modalities"].items():
        table = _losses_table(one, f"{name}, of {one['samples']} samples, from all others")
        if "exact" in one:
            table.add_section()
            table.add_row("made exactly", f"{one['exact']:.1%}")
        yield table


def _dit_tables(found: dict[str, Any]) -> Iterator[Table]:
    yield _losses_table(found)
    read = found.get("read_as_class")
    if read is None:
        return
    table = _table("class", "read as it")
    for name, share in read["classes"].items():
        table.add_row(name, f"{share:.1%}")
    table.add_section()
    table.add_row(f"all {read['samples']} samples", f"{read['share']:.1%}")
    if read["of_real_samples"] is not None:
        table.add_row("real samples", f"{read['of_real_samples']:.1%}")
    yield table
