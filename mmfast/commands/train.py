"""``mmfast train``."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmfast.commands import INTERRUPTED, CommandError
from mmfast.commands.media import check_folder
from mmfast.data import FileError
from mmfast.models import VQVAE, Diffusion
from mmfast.train import NonFiniteError, Stopped, distributed, fit
from mmfast.train.conditional import ConditionalTask
from mmfast.train.dit import DiTTask
from mmfast.train.multimodal import MultimodalTask
from mmfast.train.multimodal_settings import MultimodalData, MultimodalRun
from mmfast.train.run_folder import CONFIG, LOG, MODEL, check_free, holds_run
from mmfast.train.settings import DiTRun, Prepared, VQVAERun
from mmfast.train.sources import Data
from mmfast.train.typed import SettingError, add_flags, build, given_flags, read_settings

Run = VQVAERun | DiTRun | MultimodalRun
KINDS: dict[str, type[VQVAERun] | type[DiTRun] | type[MultimodalRun]] = {
    "vqvae": VQVAERun,
    "dit": DiTRun,
    "multimodal": MultimodalRun,
}
_ABOUT = {
    "vqvae": "Train a VQ-VAE: images, videos or sound as grids of codes, and back.",
    "dit": "Train a diffusion transformer, on data or on a VQ-VAE's latents, conditioned on a "
    "class, a text or another modality's codes.",
    "multimodal": "Train a diffusion transformer that makes any of several modalities from any "
    "of the others.",
}
_GROUPS = {
    "data": "data",
    "text": "texts",
    "model": "model",
    "objective": "what it learns",
    "train": "training",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``train``."""
    kinds = parser.add_subparsers(dest="kind", metavar="|".join(KINDS), required=True)
    for kind, cls in KINDS.items():
        one = kinds.add_parser(
            kind,
            help=_ABOUT[kind],
            description=f"{_ABOUT[kind]} What is in parentheses is the default. docs/training.md "
            "says what lies in the run's folder, and how several processes train.",
        )
        run_ = one.add_argument_group("run")
        run_.add_argument("--out", type=Path, required=True, help="folder of the run")
        run_.add_argument("--resume", action="store_true", help="go on with the run in --out")
        run_.add_argument("--config", type=Path, help=".toml or .json file; flags override it")
        for name, section in _sections(cls).items():
            add_flags(one.add_argument_group(_GROUPS[name]), section)


def _sections(cls: type) -> dict[str, type]:
    """The settings' sections by name."""
    return typing.get_type_hints(cls)


def settings_of(given: argparse.Namespace) -> Run:
    """Settings of a file, or of the run that is resumed, and flags.

    Raises:
        SettingError: one is unknown or does not fit.
    """
    cls = KINDS[given.kind]
    source = given.config
    if given.resume and source is None and (given.out / CONFIG).exists():
        source = given.out / CONFIG
    values: dict[str, Any] = {} if source is None else read_settings(source)
    values.pop("mmfast", None)
    kind = values.pop("kind", given.kind)
    if kind != given.kind:
        raise SettingError(f"{source}: are settings of mmfast train {kind}, not {given.kind}")
    for name, section in _sections(cls).items():
        flags = given_flags(given, section)
        if flags:
            before = values.get(name, {})
            values[name] = {**(before if isinstance(before, Mapping) else {}), **flags}
    return build(cls, values, "settings" if source is None else str(source))


def run(given: argparse.Namespace) -> int:
    """Train, and say where the results are."""
    try:
        settings = settings_of(given)
        check_free(given.out, given.resume)
        check_folder(given.out)
        if given.resume and not settings.data.data and not holds_run(given.out):
            raise CommandError(f"{given.out}: holds no run to resume; give --data to start one")
        device = distributed.device_named(settings.train.device)
        distributed.join_processes(device)
        data = settings.open()
        prepared = settings.prepare(data, device)  # type: ignore[arg-type]
        _show(_plan(given.kind, settings, data, prepared, device, given.out))
        described = {"kind": given.kind, **dataclasses.asdict(settings)}
        result = fit(
            prepared.task,
            settings.train,
            prepared.samples,
            out=given.out,
            resume=given.resume,
            described=described,
        )
    except Stopped as stopped:
        if distributed.rank() == 0:
            again = f"mmfast train {given.kind} --out {given.out} --resume"
            print(f"{stopped}\ngo on with: {again}")
        return INTERRUPTED
    except (FileError, ImportError, NonFiniteError, OSError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    _show(_results(result.row, given.out))
    return 0


def _plan(
    kind: str,
    settings: Run,
    data: Data | MultimodalData,
    prepared: Prepared,
    device: torch.device,
    out: Path,
) -> dict[str, str]:
    """What is going to happen."""
    config, model = settings.train, prepared.task.model
    if isinstance(data, MultimodalData):
        classes = len(data.classes)
        shape = ", ".join(f"{n} {_size(reader.shape)}" for n, reader in data.readers.items())
    else:
        classes, shape = data.classes, _size(data.shape)
    labels = f", {classes} classes" if classes else ""
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = {
        "data": f"{settings.data.data}: {len(data.train)} samples of {shape}{labels}, "
        f"{len(data.test)} held out",
        "model": f"{type(model).__name__}, {weights / 1e6:.2f} M weights",
    }
    if isinstance(model, VQVAE) and isinstance(data, Data):
        grid = [size // model.downsampling for size in data.shape[1:]]
        codes = model.quantizer.codebook_size
        plan["codes"] = f"{_size(grid)} of {codes}"
    if isinstance(prepared.task, DiTTask):
        latents = prepared.task.about["latents"]
        space = "latents of a VQ-VAE" if latents else "the data itself"
        plan["space"] = f"{space}, {prepared.task.model.num_tokens} tokens"
        plan["learns"] = _learns(prepared.task.diffusion)
    if isinstance(prepared.task, ConditionalTask) and isinstance(data, Data) and data.context:
        told = data.context
        kind_of = "texts" if told.vqvae is None else f"codes of {told.modality}"
        plan["given"] = f"{kind_of}, {_size(told.size)} of {told.num_codes}"
    if isinstance(prepared.task, MultimodalTask):
        lengths = [f"{n} {m.length}" for n, m in prepared.task.model.modalities.items()]
        plan["tokens"] = ", ".join(lengths)
        plan["learns"] = _learns(prepared.task.diffusion.diffusion)
    epochs = config.steps * config.batch_size / len(data.train)
    count = distributed.world_size()
    several = f", {count} processes ({config.distributed})" if count > 1 else ""
    return {
        f"train {kind}": str(out),
        **plan,
        "steps": f"{config.steps} of {config.batch_size} samples, {epochs:.1f} times the data",
        "on": f"{device}, {config.precision}{several}",
    }


def _size(sizes: Iterable[object]) -> str:
    return " x ".join(map(str, sizes))


def _learns(diffusion: Diffusion) -> str:
    return f"{diffusion.prediction} of schedule {diffusion.schedule}"


def _results(row: Mapping[str, float], out: Path) -> dict[str, str]:
    """The last row of the log, and where the files are."""
    numbers = {name: f"{value:.4g}" for name, value in row.items()}
    places = (MODEL, LOG, "samples", "checkpoints")
    return {**numbers, **{name: str(out / name) for name in places if (out / name).exists()}}


def _show(lines: Mapping[str, str]) -> None:
    """Names and what belongs to them, on the first process."""
    if distributed.rank() == 0:
        width = max(map(len, lines))
        print("".join(f"{name:<{width}}  {value}\n" for name, value in lines.items()), flush=True)
