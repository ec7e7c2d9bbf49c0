"""Noise schedules and samplers: they fill tables in float64, and one kernel runs them."""

from mmfast.schedule import betas, sigmas, spacings, weights
from mmfast.schedule.edm_schedule import EDMSchedule
from mmfast.schedule.flow_schedule import FlowSchedule
from mmfast.schedule.grid import Grid
from mmfast.schedule.noise_schedule import NoiseSchedule
from mmfast.schedule.predictions import PREDICTIONS
from mmfast.schedule.sample import SampleLoop, sample
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
from mmfast.schedule.sigmas import dynamic_mu
from mmfast.schedule.table import Linear, SamplerTable, TableBuilder
from mmfast.schedule.threshold import dynamic_threshold

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
