"""Modules made of the ops; drop-ins for those of the libraries that models use."""

from mmfast.nn.fsq import FSQ
from mmfast.nn.grouped_residual_vq import GroupedResidualVQ
from mmfast.nn.lfq import LFQ
from mmfast.nn.losses import LossBreakdown
from mmfast.nn.random_projection_quantizer import RandomProjectionQuantizer
from mmfast.nn.residual_fsq import GroupedResidualFSQ, ResidualFSQ
from mmfast.nn.residual_lfq import GroupedResidualLFQ, ResidualLFQ
from mmfast.nn.residual_sim_vq import ResidualSimVQ
from mmfast.nn.residual_vq import ResidualVQ
from mmfast.nn.sharded_look_up import nearest_code_sharded
from mmfast.nn.sharded_vector_quantize import ShardedVectorQuantize
from mmfast.nn.sim_vq import SimVQ
from mmfast.nn.vector_quantize import VectorQuantize

__all__ = [
    "FSQ",
    "LFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "LossBreakdown",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "ShardedVectorQuantize",
    "SimVQ",
    "VectorQuantize",
    "nearest_code_sharded",
]
