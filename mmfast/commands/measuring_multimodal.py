"""What ``mmfast evaluate`` measures of a MultimodalDiT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast.commands.multimodal import Maker
from mmfast.commands.ranges import Ranges
from mmfast.models import MultimodalDiT, Noised
from mmfast.models.modalities import Tokens
from mmfast.train.multimodal import modalities_of


@torch.no_grad()
def measure_multimodal(
    maker: Maker,
    batches: Iterable[Mapping[str, Tensor]],
    parts: int,
    samples: int,
    **sampling: Any,
) -> dict[str, Any]:
    """The loss of each modality of a MultimodalDiT, from all others and from nothing.

    Args:
        maker: of the model.
        batches: of ``samples`` samples.
        parts: equal ranges of the schedule.
        samples: N.
        sampling: how texts and labels are made, for :meth:`Maker.draw`.

    Returns:
        ``samples``, and ``modalities``: by name how many ``samples`` have it, the mean ``loss``
        with all others given, and ``parts`` of that as of
        :func:`mmfast.commands.measuring.measure_loss`; the ``loss_without_condition``, of models
        that were trained for that; and of texts and labels the share that is ``exact`` if made from
        all others.
    """
    model, noising = maker.model, maker.diffusion.diffusion
    ranges = Ranges(noising, parts, samples)
    names = list(model.modalities)
    sums = {name: [0.0] * parts for name in names}
    alone, have, exact = (dict.fromkeys(names, 0.0) for _ in range(3))
    count = 0
    for batch in batches:
        moved = {name: value.to(maker.device) for name, value in batch.items()}
        data, there = modalities_of(model, moved, maker.latents)
        clean = {name: model.modality(name).numbers(values) for name, values in data.items()}
        size = len(next(iter(clean.values())))
        seeds = torch.arange(count, count + size, device=maker.device)
        lengths = {name: there[name].long() * model.modality(name).length for name in there}
        for name in names:
            has = there.get(name, seeds >= 0)
            have[name] += float(has.sum())
            for part in range(parts):
                rows = ranges.rows(part, count, size).to(maker.device)
                noised = noising.noised(clean[name], seed=seeds, offset=part, rows=rows)
                given, nothing = (
                    _losses(model, name, data, clean, noised, lengths if told else None)
                    for told in (True, False)
                )
                sums[name][part] += float(torch.where(has, given, 0).double().sum())
                alone[name] += float(torch.where(has, nothing, 0).double().sum())
            if isinstance(model.modality(name), Tokens):
                others = {n: v for n, v in batch.items() if n != name}
                drawn = maker.draw(
                    [name], others, seeds.cpu(), batch=size, progress=False, **sampling
                )[name]
                right = (drawn == data[name].cpu()).all(1) & has.cpu()
                exact[name] += float(right.sum())
        count += size
    found = {}
    for name in names:
        if not have[name]:
            continue
        made = {"samples": int(have[name]), **ranges.table(sums[name], have[name])}
        if maker.diffusion.drop > 0:
            made["loss_without_condition"] = alone[name] / have[name] / parts
        if isinstance(model.modality(name), Tokens):
            made["exact"] = exact[name] / have[name]
        found[name] = made
    return {"samples": count, "modalities": found}


def _losses(
    model: MultimodalDiT,
    name: str,
    data: Mapping[str, Tensor],
    clean: Mapping[str, Tensor],
    noised: Noised,
    lengths: Mapping[str, Tensor] | None,
) -> Tensor:
    """Of a modality, ``(B,)``, with the others given that are there: none if ``lengths`` is
    None."""
    times = {n: torch.zeros_like(noised.timesteps).float() for n in clean}
    times[name] = noised.timesteps.float()
    none = torch.zeros_like(noised.rows)
    seen = dict.fromkeys(clean, none) if lengths is None else dict(lengths)
    seen[name] = torch.full_like(none, model.modality(name).length)
    output = model({**clean, name: noised.noisy}, times, seen, wanted=[name])[name]
    return model.modality(name).losses(output, data[name], noised, None)
