"""Finding the modules in a model, patching them, and taking the patch back."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from mmfast.integrations import (
    diffusers,
    dit,
    taming,
    torch_attention,
    transformers,
    vector_quantize,
)
from mmfast.integrations.binding import Exchange, Library, Method, Swap, bound_names, is_bound
from mmfast.integrations.diffusers.attention import restored_processor
from mmfast.integrations.diffusers.swapping import restored, schedulers_in, swapped
from mmfast.integrations.report import Entry, PatchReport

LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        vector_quantize.LIBRARY,
        diffusers.LIBRARY,
        transformers.LIBRARY,
        taming.LIBRARY,
        dit.LIBRARY,
        torch_attention.LIBRARY,
    )
}


def patch(model: Any, *, libraries: Iterable[str] | None = None) -> PatchReport:
    """Make other libraries' quantisers, attention and blocks inside ``model`` run on mmfast.

    Modules stay where they are, with their class, parameters, buffers, hooks and state-dict
    keys; the methods that mmfast has something faster for are replaced on each instance. Outputs
    keep their types and shapes, in training and evaluation. Values and gradients are the same to
    rounding, and the indices too, except where the library's arithmetic did not find the nearest
    code: mmfast's indices are exact. ``docs/integrations.md`` lists what each library's modules
    gain.

    The patch moves with ``model.to(...)`` and ``copy.deepcopy(model)``, and works under
    ``torch.compile``. Patching twice changes nothing more.

    Of a pipeline of diffusers, the schedulers are swapped too: see
    :func:`mmfast.integrations.diffusers.patch`.

    Args:
        model: any module; it and all its submodules are looked at. Or a pipeline of diffusers, or a
            scheduler of it.
        libraries: names out of ``LIBRARIES``; by default all of them.

    Returns:
        A :class:`PatchReport`: which modules, what was done, what was left and why. Its
        ``undo()``, or the end of a ``with`` block on it, takes the patch back.

    Raises:
        TypeError: ``model`` is none of these.
        ValueError: a name in ``libraries`` is unknown, or no module could be swapped; says what
            was looked for and what was found.
    """
    modules, schedulers = _parts(model)
    if modules is None:
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; a pipeline or a "
            "scheduler of diffusers can be given too"
        )
    chosen = _chosen(libraries)
    entries: list[Entry] = []
    methods: list[Method] = []
    exchanges: list[Exchange] = []
    for name, module in modules:
        library = next((library for library in chosen if library.matches(module)), None)
        if library is None:
            continue
        swap = library.swap(module)
        objections = [reason for method in swap.methods for reason in method.objections()]
        if objections:
            swap = Swap(left="; ".join(objections))
        for method in swap.methods:
            if not is_bound(method.owner, method.name):
                method.bind()
                methods.append(method)
        for exchange in swap.exchanges:
            exchange.make()
            exchanges.append(exchange)
        entries.append(Entry(name, library.name, type(module).__name__, swap.done, swap.left))
    for name, scheduler in schedulers if diffusers.LIBRARY in chosen else []:
        entry, change = swapped(name, scheduler)
        entries.append(entry)
        if change is not None:
            change.make()
            exchanges.append(change)
    noun = "modules and schedulers" if schedulers else "modules"
    report = PatchReport(tuple(entries), tuple(methods), tuple(exchanges), noun)
    if not report.swapped:
        raise ValueError(_nothing(model, chosen, report))
    return report


def _parts(model: Any) -> tuple[list[tuple[str, nn.Module]] | None, list[tuple[str, Any]]]:
    """Modules and schedulers of a model, a pipeline or a scheduler, with dotted names."""
    if isinstance(model, nn.Module):
        return list(model.named_modules()), []
    schedulers = list(schedulers_in(model))
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        return ([] if schedulers else None), schedulers
    modules = [
        (f"{component}.{name}" if name else component, module)
        for component, part in components.items()
        if isinstance(part, nn.Module)
        for name, module in part.named_modules()
    ]
    return modules, schedulers


def unpatch(model: Any) -> None:
    """Take back every patch in ``model``, whichever report or copy it came from.

    Raises:
        ValueError: nothing in it is patched.
    """
    modules, schedulers = _parts(model)
    found = [(module, name) for _, module in modules or () for name in bound_names(module)]
    for module, name in found:
        delattr(module, name)
    exchanged = sum(restored(scheduler) for _, scheduler in schedulers)
    exchanged += sum(restored_processor(module) for _, module in modules or ())
    exchanged += sum(transformers.restored(module) for _, module in modules or ())
    if not exchanged + len(found):
        raise ValueError(f"nothing in {type(model).__name__} is patched")


def _chosen(names: Iterable[str] | None) -> list[Library]:
    if names is None:
        return list(LIBRARIES.values())
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in LIBRARIES]
    if unknown:
        known = ", ".join(LIBRARIES)
        raise ValueError(f"libraries must be among {known}, got {', '.join(map(repr, unknown))}")
    return [LIBRARIES[name] for name in names]


def _nothing(model: nn.Module, chosen: list[Library], report: PatchReport) -> str:
    """The message for a model without anything to swap."""
    lines = [f"nothing in {type(model).__name__} can be swapped. Looked for:"]
    for library in chosen:
        imported = "" if library.name in sys.modules else " (not imported)"
        lines.append(f"  {library.name}{imported}: {', '.join(library.classes)}")
    if report.left:
        lines.append("Found, but left:")
        lines += [f"  {e.name or '(the model)'} ({e.class_name}): {e.left}" for e in report.left]
    return "\n".join(lines)
