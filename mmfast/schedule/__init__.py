"""Noise schedules and samplers: they fill tables in float64, and one kernel runs them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfast.schedule import betas, sigmas, spacings, weights
    from mmfast.schedule.edm_schedule import EDMSchedule
    from mmfast.schedule.flow_schedule import FlowSchedule
    from mmfast.schedule.grid import Grid
    from mmfast.schedule.noise_schedule import NoiseSchedule
    from mmfast.schedule.predictions import PREDICTIONS
    from mmfast.schedule.samplers import (
        ddim,
        ddpm,
        deis,
        dpm_solver,
        dpm_solver_singlestep,
        edm_dpm,
        edm_euler,
        euler,
        euler_ancestral,
        flow_euler,
        flow_heun,
        heun,
        ipndm,
        kdpm2,
        kdpm2_ancestral,
        lcm,
        lms,
        pndm,
        sa_solver,
        tcd,
        unipc,
    )
    from mmfast.schedule.samplers.steps import Steps
    from mmfast.schedule.sampling import SampleLoop, sample
    from mmfast.schedule.sigmas import dynamic_mu
    from mmfast.schedule.table import Linear, SamplerTable, TableBuilder
    from mmfast.schedule.threshold import dynamic_threshold

_FROM = {
    "edm_schedule": ("EDMSchedule",),
    "flow_schedule": ("FlowSchedule",),
    "grid": ("Grid",),
    "noise_schedule": ("NoiseSchedule",),
    "predictions": ("PREDICTIONS",),
    "sampling": ("SampleLoop", "sample"),
    "samplers.steps": ("Steps",),
    "sigmas": ("dynamic_mu",),
    "table": ("Linear", "SamplerTable", "TableBuilder"),
    "threshold": ("dynamic_threshold",),
}
# All others are samplers.
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}
_MODULES = ("betas", "samplers", "spacings", "weights", *_FROM)


def __getattr__(name: str) -> Any:
    """Modules are imported once something of them is asked for: the ops need two of them only."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, 'samplers')}")
    found = globals()[name] = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "PREDICTIONS",
    "EDMSchedule",
    "FlowSchedule",
    "Grid",
    "Linear",
    "NoiseSchedule",
    "SampleLoop",
    "SamplerTable",
    "Steps",
    "TableBuilder",
    "betas",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver",
    "dpm_solver_singlestep",
    "dynamic_mu",
    "dynamic_threshold",
    "edm_dpm",
    "edm_euler",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "heun",
    "ipndm",
    "kdpm2",
    "kdpm2_ancestral",
    "lcm",
    "lms",
    "pndm",
    "sa_solver",
    "sample",
    "sigmas",
    "spacings",
    "tcd",
    "unipc",
    "weights",
]
