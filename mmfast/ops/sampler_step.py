"""One step of any sampler: guidance, prediction, clamp, update with history, noise and cast."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.schedule.layout import HISTORY, Layout, slots_of


def reference(
    x: Tensor,  # [B, ...]
    model_output: Tensor,  # [B, ...]
    unconditional: Tensor | None,  # [B, ...]
    guidance_scale: float,
    guidance: Tensor | None,  # [1 or B, 2]
    table: Tensor,  # [S, columns] float64
    step: Tensor,  # [] or [B] int64
    noise: Tensor | None,  # [B, ...]
    seed: Tensor | None,  # [] or [B] int64
    variance: Tensor | None,  # [B, ...]
    threshold: Tensor | None,  # [B]
    out: Tensor,  # [B, ...], may be x
    history: Tensor | None,  # [slots, B, ...]
    denoised: Tensor | None,  # [B, ...]
    model_input: Tensor | None,  # [B or 2 B, ...]
) -> None:
    """The specification, in float64."""
    batch = x.shape[0]
    layout = Layout(slots_of(table.shape[1]))
    rows = table.index_select(0, step.reshape(-1)).expand(batch, -1)  # [B, columns]
    lead = (batch, *[1] * (x.dim() - 1))

    def column(c: int) -> Tensor:
        return rows[:, c].view(lead)

    m = model_output.double()
    if unconditional is not None:
        if guidance is None:
            guidance = x.new_tensor([[guidance_scale, 1 - guidance_scale]], dtype=torch.float64)
        mix = guidance.double().expand(batch, 2)  # [B, 2]
        on = rows[:, Layout.GUIDANCE]
        conditional = (1 + on * (mix[:, 0] - 1)).view(lead)
        m = conditional * m + (on * mix[:, 1]).view(lead) * unconditional.double()
    n = None if noise is None else noise.double()
    if n is not None and variance is not None:
        bias, factor = column(Layout.LOG_SCALE), column(Layout.LOG_SCALE + 1)
        n = n * (bias + factor * variance.double()).exp()
    sources: list[Tensor | None] = [x.double(), m, n, None]
    sources += [] if history is None else list(history.double())

    def weighted(start: int, number: int) -> Tensor:
        total = torch.zeros_like(x, dtype=torch.float64)
        for i, source in enumerate(sources[:number]):
            weight = column(start + i)
            if source is not None:
                total = torch.where(weight == 0, total, total + weight * source)
        return total

    p = weighted(Layout.DENOISED, 3)
    if threshold is not None:
        t = threshold.double().view(lead)
        p = torch.maximum(torch.minimum(p, t), -t) / t
    p = torch.maximum(torch.minimum(p, column(Layout.HIGH)), column(Layout.LOW))
    sources[3] = p
    result = weighted(Layout.NEXT, layout.sources)
    slots = [weighted(layout.slot(s), layout.sources) for s in range(layout.slots)]
    for s, slot in enumerate(slots):
        assert history is not None
        unit = [float(i == HISTORY + s) for i in range(layout.sources)]
        stays = rows[:, layout.slot(s) : layout.slot(s) + layout.sources] == rows.new_tensor(unit)
        history[s].copy_(torch.where(stays.all(1).view(lead), history[s], slot.to(history.dtype)))
    out.copy_(result)
    if denoised is not None:
        denoised.copy_(p)
    if model_input is not None:
        scaled = result * column(Layout.INPUT_SCALE)
        model_input.copy_(torch.cat([scaled] * (model_input.shape[0] // batch)))
