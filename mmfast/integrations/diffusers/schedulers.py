"""Schedulers of diffusers, by their own names, on tables.

Each has the arguments, attributes and configuration of the library's class, which it derives from.
What differs comes from a mixin: the signature of ``step``, and the function that makes the table.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers

from mmfast.integrations.diffusers.consistency import LCM, TCD
from mmfast.integrations.diffusers.ddpm import DDIM, DDPM
from mmfast.integrations.diffusers.edm import EDMDPM, EDMEuler
from mmfast.integrations.diffusers.flow_matching import FlowEuler, FlowHeun
from mmfast.integrations.diffusers.k_diffusion import (
    KDPM2,
    LMS,
    Euler,
    EulerAncestral,
    Heun,
    KDPM2Ancestral,
)
from mmfast.integrations.diffusers.multistep import (
    DEIS,
    DPMMultistep,
    DPMSinglestep,
    SASolver,
    UniPC,
)
from mmfast.integrations.diffusers.pndm import IPNDM, PNDM
from mmfast.integrations.diffusers.tabled import Tabled


def objections(scheduler: Any) -> list[str]:
    """Options of a scheduler of the library that its class here has not; empty when all is well."""
    name, config = type(scheduler).__name__, scheduler.config
    return [
        f"{name}: {key}={config[key]} is not supported: it can be 1 to {highest}"
        for key, highest in _HIGHEST.get(name, {}).items()
        if not 1 <= config[key] <= highest
    ]


_HIGHEST = {
    "SASolverScheduler": {"predictor_order": 12, "corrector_order": 12},
}


_MIXINS: dict[str, type[Tabled]] = {
    "DDPMScheduler": DDPM,
    "DDIMScheduler": DDIM,
    "EulerDiscreteScheduler": Euler,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "HeunDiscreteScheduler": Heun,
    "KDPM2DiscreteScheduler": KDPM2,
    "KDPM2AncestralDiscreteScheduler": KDPM2Ancestral,
    "LMSDiscreteScheduler": LMS,
    "PNDMScheduler": PNDM,
    "IPNDMScheduler": IPNDM,
    "DEISMultistepScheduler": DEIS,
    "DPMSolverMultistepScheduler": DPMMultistep,
    "DPMSolverSinglestepScheduler": DPMSinglestep,
    "UniPCMultistepScheduler": UniPC,
    "SASolverScheduler": SASolver,
    "LCMScheduler": LCM,
    "TCDScheduler": TCD,
    "FlowMatchEulerDiscreteScheduler": FlowEuler,
    "FlowMatchHeunDiscreteScheduler": FlowHeun,
    "EDMEulerScheduler": EDMEuler,
    "EDMDPMSolverMultistepScheduler": EDMDPM,
}


def on_tables(theirs: type) -> type:
    """The class ``theirs`` of the library with its steps by tables."""

    made: Any = theirs.__init__  # type: ignore[misc]

    @functools.wraps(made)  # its signature is what configurations are read by
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        reasons = objections(self)
        if reasons:
            raise ValueError("; ".join(reasons))

    given: Any = theirs.set_timesteps  # type: ignore[attr-defined]

    @functools.wraps(given)  # pipelines ask its signature for what it takes
    def set_timesteps(self: Any, *args: Any, **options: Any) -> None:
        given(self, *args, **options)
        self._prepare()

    mixin = _MIXINS[theirs.__name__]
    members: dict[str, Any] = {
        "__init__": __init__,
        "__doc__": f"diffusers' {theirs.__name__} with its steps by tables.",
        # Pipelines are saved with the module of their scheduler: they stay readable without mmfast.
        "__module__": theirs.__module__,
        "__reduce_ex__": _reduced,
        "set_timesteps": set_timesteps,
    }
    for method, by_table in (("add_noise", Tabled._noised), ("scale_model_input", Tabled._scale)):
        if hasattr(theirs, method):
            members[method] = by_table
    return type(theirs.__name__, (mixin, theirs), members)


def _reduced(scheduler: Any, protocol: int) -> Any:
    name = type(scheduler).__name__
    if type(scheduler) is not CLASSES.get(name):
        return object.__reduce_ex__(scheduler, protocol)
    return _blank, (name,), vars(scheduler).copy()


def _blank(name: str) -> Any:
    return object.__new__(CLASSES[name])


CLASSES: dict[str, type] = {
    name: on_tables(getattr(diffusers, name)) for name in _MIXINS if hasattr(diffusers, name)
}
