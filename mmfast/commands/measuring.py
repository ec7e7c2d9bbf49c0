"""What ``mmfast evaluate`` measures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.commands.drawing import Drawer
from mmfast.commands.media import extent
from mmfast.data import Reader
from mmfast.models import VQVAE, count_codes, usage_of_counts
from mmfast.models.compression import padded
from mmfast.quality import psnr, ssim
from mmfast.train.dit import latents_of

Batches = Iterable[Mapping[str, Tensor]]

_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it are spread evenly between whole numbers


@torch.no_grad()
def measure_vqvae(model: VQVAE, batches: Batches, reader: Reader) -> dict[str, Any]:
    """Of the reconstructions of samples.

    Args:
        model: in evaluation mode.
        batches: of samples, by modality.
        reader: that prepared them.

    Returns:
        ``samples``; ``psnr`` in dB and ``ssim`` (None for what are no images, and without
        scikit-image), means over samples; ``reconstruction_loss``, the model's; ``stages`` of the
        quantiser, each with its ``codes``, how many are ``used``, and ``perplexity``; ``bits`` for
        each ``unit`` of a sample, in codes of ``fixed`` length and as their ``entropy`` allows.
    """
    device = next(model.parameters()).device
    ratios, similarities, counts, losses = [], [], None, []
    size, unit = 0.0, ""
    for batch in batches:
        x = batch[reader.modality].to(device)
        indices = model.encode(padded(x, model.downsampling))
        cut = tuple(slice(side) for side in x.shape[2:])
        y = model.decode(indices).float()[(slice(None), slice(None), *cut)]
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
    written = [float(count.sum()) for count in counts]
    measured = [value for value in similarities if value is not None]
    return {
        "samples": len(ratios),
        "psnr": _mean(ratios),
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
def measure_loss(drawer: Drawer, batches: Batches, modality: str, parts: int) -> dict[str, Any]:
    """The loss of a DiT in ``parts`` equal ranges of the schedule.

    Noise, and the places within the ranges, are the same in every run.

    Returns:
        ``samples``, the mean ``loss``, and ``parts``: each with its ``timesteps``, from and to, and
        the ``loss``.
    """
    diffusion, steps = drawer.diffusion, drawer.diffusion.num_steps
    edges = [steps * i // parts for i in range(parts + 1)]
    sums, count = [0.0] * parts, 0
    ranges = [[math.inf, -math.inf] for _ in range(parts)]
    for batch in batches:
        x0 = batch[modality].to(drawer.device)
        if drawer.vqvae is not None:
            x0 = latents_of(drawer.vqvae, x0)
        seeds = torch.arange(count, count + len(x0), device=drawer.device)
        share = (seeds.double() * _GOLDEN).frac()
        for i, (low, high) in enumerate(itertools.pairwise(edges)):
            losses = diffusion.losses(
                drawer.dit,
                x0,
                seed=seeds,
                offset=i,
                rows=low + (share * (high - low)).long(),
                condition={"y": drawer.labels(batch)},
            )
            sums[i] += float(losses.squared.double().sum())
            ranges[i][0] = min(ranges[i][0], float(losses.timesteps.min()))
            ranges[i][1] = max(ranges[i][1], float(losses.timesteps.max()))
        count += len(x0)
    means = [total / count for total in sums]
    return {
        "samples": count,
        "loss": _mean(means),
        "parts": [
            {"timesteps": between, "loss": loss}
            for between, loss in zip(ranges, means, strict=True)
        ],
    }
