"""What ``mmfast evaluate`` measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.commands.drawing import Drawer
from mmfast.commands.media import extent
from mmfast.commands.ranges import Ranges
from mmfast.data import Reader
from mmfast.models import VQVAE, count_codes, usage_of_counts
from mmfast.models.compression import padded
from mmfast.models.tiling import decode_in_tiles, encode_in_tiles
from mmfast.quality import psnr, ssim
from mmfast.train.dit import dropout_of
from mmfast.train.latents import latents_of

Batches = Iterable[Mapping[str, Tensor]]


@torch.no_grad()
def measure_vqvae(model: VQVAE, batches: Batches, reader: Reader) -> dict[str, Any]:
    """Of the reconstructions of samples.

    Args:
        model: in evaluation mode.
        batches: of samples, by modality.
        reader: that prepared them.

    Returns:
        ``samples``; ``psnr`` in dB, the mean over samples but those that are ``lossless``, whose
        is infinite: so many, None if all; ``ssim``, the mean (None for what are no images, and
        without scikit-image); ``reconstruction_loss``, the model's; ``stages`` of the
        quantiser, each with its ``codes``, how many are ``used``, and ``perplexity``; ``bits`` for
        each ``unit`` of a sample, in codes of ``fixed`` length and as their ``entropy`` allows.
    """
    device = next(model.parameters()).device
    ratios, similarities, counts, losses = [], [], None, []
    size, unit = 0.0, ""
    for batch in batches:
        x = batch[reader.modality].to(device)
        indices = encode_in_tiles(model, padded(x, model.downsampling))
        cut = tuple(slice(side) for side in x.shape[2:])
        y = decode_in_tiles(model, indices)[(slice(None), slice(None), *cut)]
        ratios += [psnr(*pair) for pair in zip(x, y, strict=True)]
        if reader.modality == "image":
            similarities += [_ssim(*pair) for pair in zip(x, y.clamp(-1, 1), strict=True)]
        losses.append(float(model.reconstruction_loss(y, x)) * len(x))
        found = count_codes(model, indices)
        counts = found if counts is None else [a + b for a, b in zip(counts, found, strict=True)]
        amount, unit = extent(reader, x[0])
        size += len(x) * amount
    assert counts is not None
    stages = [
        {
            "codes": len(count),
            "used": int((count > 0).sum()),
            "perplexity": float(usage_of_counts(count).perplexity),
        }
        for count in counts
    ]
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    written = [float(count.sum()) for count in counts]
    measured = [value for value in similarities if value is not None]
    return {
        "samples": len(ratios),
        "psnr": _mean(finite) if finite else None,
        "lossless": len(ratios) - len(finite),
        "ssim": _mean(measured) if measured else None,
        "reconstruction_loss": sum(losses) / len(ratios),
        "stages": stages,
        "bits": {
            "unit": unit,
            "fixed": _bits(written, [stage["codes"] for stage in stages]) / size,
            "entropy": _bits(written, [stage["perplexity"] for stage in stages]) / size,
        },
    }


def _bits(counts: Sequence[float], choices: Sequence[float]) -> float:
    """Of so many codes of each stage, each of them one of so many."""
    return sum(n * math.log2(k) for n, k in zip(counts, choices, strict=True))


def _ssim(x: Tensor, y: Tensor) -> float | None:
    try:
        return ssim(x, y)
    except ImportError:
        return None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def measure_loss(
    drawer: Drawer, batches: Batches, modality: str, parts: int, samples: int
) -> dict[str, Any]:
    """The loss of a DiT in ``parts`` equal ranges of the schedule.

    Noise, and the places within the ranges, are the same in every run.

    Args:
        drawer: of the model.
        batches: of ``samples`` samples.
        modality: by which they have what the model makes.
        parts: ranges.
        samples: N.

    Returns:
        ``samples``, the mean ``loss``, and ``parts``: each with its ``timesteps``, from and to, and
        the ``loss``. Of a model of texts or codes also ``loss_without_condition``, if it was
        trained for that.
    """
    ranges = Ranges(drawer.diffusion, parts, samples)
    without = drawer.context is not None and dropout_of(drawer.dit) > 0
    sums, alone, count = [0.0] * parts, 0.0, 0
    for batch in batches:
        x0 = batch[modality].to(drawer.device)
        if drawer.vqvae is not None:
            x0 = latents_of(drawer.vqvae, x0)
        seeds = torch.arange(count, count + len(x0), device=drawer.device)
        condition = drawer.condition(batch)

        for part in range(parts):
            rows = ranges.rows(part, count, len(x0)).to(drawer.device)
            options = {"seed": seeds, "offset": part, "rows": rows}
            sums[part] += _squared(drawer, x0, condition, options)
            if without:
                dropped = {**condition, "drop": seeds >= 0}
                alone += _squared(drawer, x0, dropped, options)
        count += len(x0)
    made = {"samples": count, **ranges.table(sums, count)}
    if without:
        made["loss_without_condition"] = alone / count / parts
    return made


def _squared(
    drawer: Drawer, x0: Tensor, condition: Mapping[str, Any], options: Mapping[str, Any]
) -> float:
    losses = drawer.diffusion.losses(drawer.dit, x0, condition=condition, **options)
    return float(losses.squared.double().sum())
