"""Schedulers of diffusers that are there already, swapped for those on tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmfast.integrations.binding import ClassSwap
from mmfast.integrations.report import Entry, PatchReport

SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "IPNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
)


# Attributes of a scheduler that has our class.
_ADDED = ("_tabled", "_philox", "_by_library", "_first")


@dataclass(frozen=True)
class SchedulerSwap(ClassSwap):
    """A scheduler with one of our classes; a run that is under way goes on in either."""

    added: tuple[str, ...] = _ADDED

    def undo(self) -> bool:
        """Give it its own class back, and the memory of its steps."""
        if type(self.owner) is self.after:
            self.owner._land()  # type: ignore[attr-defined]
        return super().undo()


def patch(pipeline_or_scheduler: Any) -> PatchReport:
    """Make the schedulers of a pipeline, or one scheduler, take their steps by tables.

    The object stays, with its configuration, timesteps and attributes; its class becomes the one of
    the same name here. A run that is under way goes on, after a patch and after an undo.

    Args:
        pipeline_or_scheduler: a scheduler of diffusers, or a pipeline with one or several.

    Returns:
        A :class:`mmfast.integrations.PatchReport`; its ``undo()``, or the end of a ``with`` block
        on it, takes the patch back.

    Raises:
        ValueError: there is no scheduler, its class is not supported, or one of its options: says
            which.
    """
    entries, swaps = [], []
    for name, scheduler in schedulers_in(pipeline_or_scheduler):
        entry, swap = swapped(name, scheduler)
        entries.append(entry)
        if swap is not None:
            swap.make()
            swaps.append(swap)
    report = PatchReport(tuple(entries), exchanges=tuple(swaps), noun="schedulers")
    if not report.swapped:
        what = type(pipeline_or_scheduler).__name__
        reasons = [f"{entry.class_name}: {entry.left}" for entry in report.left]
        raise ValueError(
            f"no scheduler of {what} can be swapped: "
            + ("; ".join(reasons) if reasons else "it is none of diffusers', and holds none")
        )
    return report


def schedulers_in(owner: Any) -> Iterator[tuple[str, Any]]:
    """The schedulers of diffusers in a pipeline, or the scheduler itself, with their names."""
    module = sys.modules.get("diffusers.schedulers.scheduling_utils")
    if module is None:
        return
    if isinstance(owner, module.SchedulerMixin):
        yield "", owner
        return
    components = getattr(owner, "components", None)
    if isinstance(components, dict):
        for name, component in components.items():
            if isinstance(component, module.SchedulerMixin):
                yield name, component


def swapped(name: str, scheduler: Any) -> tuple[Entry, ClassSwap | None]:
    """What is to be done with a scheduler: for the report, and to be made."""
    from mmfast.integrations.diffusers import schedulers

    theirs = type(scheduler)
    class_name = theirs.__name__
    ours = schedulers.CLASSES.get(class_name)
    if theirs is ours:
        return Entry(name, "diffusers", class_name, "step, add_noise", ""), None
    reasons = []
    if ours is None:
        reasons = [f"the class is not supported; those that are: {', '.join(schedulers.CLASSES)}"]
    elif theirs not in ours.__bases__:
        reasons = ["it is a class of its own, derived from or named like diffusers'"]
    else:
        reasons = schedulers.objections(scheduler)
    if ours is None or reasons:
        return Entry(name, "diffusers", class_name, "", "; ".join(reasons)), None
    return (
        Entry(name, "diffusers", class_name, "step, add_noise", ""),
        SchedulerSwap(scheduler, theirs, ours),
    )


def restored(scheduler: Any) -> bool:
    """Give a scheduler the library's class back; whether it had ours."""
    from mmfast.integrations.diffusers import schedulers

    ours = type(scheduler)
    if schedulers.CLASSES.get(ours.__name__) is not ours:
        return False
    return SchedulerSwap(scheduler, ours.__bases__[1], ours).undo()
