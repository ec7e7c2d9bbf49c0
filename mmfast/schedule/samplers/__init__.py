"""Samplers: each takes a grid and fills a table."""

from mmfast.schedule.samplers.consistency import lcm, tcd
from mmfast.schedule.samplers.ddim import ddim
from mmfast.schedule.samplers.ddpm import ddpm
from mmfast.schedule.samplers.deis import deis
from mmfast.schedule.samplers.dpm_solver import dpm_solver, dpm_solver_singlestep
from mmfast.schedule.samplers.edm import edm_dpm, edm_euler
from mmfast.schedule.samplers.euler import euler, euler_ancestral
from mmfast.schedule.samplers.flow import flow_euler, flow_heun
from mmfast.schedule.samplers.heun import heun
from mmfast.schedule.samplers.kdpm2 import kdpm2, kdpm2_ancestral
from mmfast.schedule.samplers.multistep import ipndm, lms, pndm
from mmfast.schedule.samplers.sa_solver import sa_solver
from mmfast.schedule.samplers.unipc import unipc

__all__ = [
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver",
    "dpm_solver_singlestep",
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
    "tcd",
    "unipc",
]
