"""Modules made of the ops."""

from mmfast.nn.grouped_residual_vq import GroupedResidualVQ
from mmfast.nn.losses import LossBreakdown
from mmfast.nn.random_projection_quantizer import RandomProjectionQuantizer
from mmfast.nn.residual_sim_vq import ResidualSimVQ
from mmfast.nn.residual_vq import ResidualVQ
from mmfast.nn.sim_vq import SimVQ
from mmfast.nn.vector_quantize import VectorQuantize

__all__ = [
    "GroupedResidualVQ",
    "LossBreakdown",
    "RandomProjectionQuantizer",
    "ResidualSimVQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
]
