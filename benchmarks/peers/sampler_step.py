"""Peers of sampler_step: the row's equation in plain PyTorch, and the memory traffic alone.

Whole samplers of other libraries are compared elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Peer, compiled
from mmfast.ops import sampler_step
from mmfast.schedule.layout import HISTORY, Layout, N, slots_of

_COMPILED_SLOTS = 2


def _plain(*arguments: Any) -> Callable[[], Any]:
    """What a user writes who has the coefficients as numbers; only terms with a weight."""
    x, m, u, scale, _, table, step, noise, seed, _, _, out, history, _, _ = arguments
    row = table[int(step)].tolist()
    layout = Layout(slots_of(len(row)))
    generator = torch.Generator(x.device)

    def run() -> Tensor:
        guided = m if u is None else u + (m - u) * scale
        n = noise
        if seed is not None:
            n = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        sources = [x, guided, n]

        def total(start: int, sources: list[Any]) -> Tensor:
            weighted = zip(row[start : start + len(sources)], sources, strict=True)
            return sum(weight * source for weight, source in weighted if weight)

        sources.append(total(Layout.DENOISED, sources))
        sources += [] if history is None else list(history)
        results = [total(layout.slot(s), sources) for s in range(layout.slots)]
        out.copy_(total(layout.NEXT, sources))
        for s, result in enumerate(results):
            if row[layout.slot(s) + HISTORY + s] != 1:
                history[s].copy_(result)
        return out

    return run


def _other_arguments(*arguments: Any) -> list[str]:
    _, _, _, _, guidance, _, step, _, _, variance, threshold, *_ = arguments
    if step.dim() or any(a is not None for a in (guidance, variance, threshold)):
        return ["written for one step of all samples, without variances and thresholds"]
    return []


def _draws(*arguments: Any) -> bool:
    table, step, seed = arguments[5], arguments[6], arguments[8]
    return seed is not None and bool((table[int(step), Layout.NEXT + N] != 0).any())


def _given(*arguments: Any) -> list[str]:
    return _other_arguments(*arguments) or (["draws other noise"] if _draws(*arguments) else [])


def _drawn(*arguments: Any) -> list[str]:
    return _other_arguments(*arguments) or ([] if _draws(*arguments) else ["draws no noise"])


def _traffic(*arguments: Any) -> Callable[[], Any]:
    """torch.add of tensors that are together as large as what has to be moved."""
    x = arguments[0]
    numbers = sampler_step.OP.cost(*arguments).bytes // x.element_size() // 3
    a, b, out = (torch.ones(numbers, dtype=x.dtype, device=x.device) for _ in range(3))
    return lambda: torch.add(a, b, out=out)


def _compiled(*arguments: Any) -> Callable[[], Any]:
    run: Callable[[], Any] = compiled(_plain(*arguments), None)
    return run


def _few(*arguments: Any) -> list[str]:
    """Compiling takes seconds: on the CPU two rows say enough."""
    if torch.cuda.is_available():
        return _given(*arguments)
    u, history = arguments[2], arguments[12]
    many = u is not None or (history is not None and len(history) > _COMPILED_SLOTS)
    return _given(*arguments) or (["other rows are compiled"] if many else [])


PEERS = {
    "plain torch": Peer(_plain, unsupported=_given, cut=False),
    "torch.compile": Peer(
        _compiled, unsupported=_few, cut=False, note="of the same; compiling is not timed"
    ),
    "plain torch, torch.randn": Peer(_plain, unsupported=_drawn, cut=False, random=True),
    "torch.add(out=)": Peer(
        _traffic, cut=False, floor=True, note="the same bytes, read twice and written once"
    ),
}
