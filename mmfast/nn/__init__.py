"""Modules made of the ops; drop-ins for those of the libraries that models use."""

from mmfast.nn.attention import CrossAttention, SelfAttention
from mmfast.nn.cross_attention_block import CrossAttentionBlock
from mmfast.nn.dit_block import DiTBlock, FinalLayer
from mmfast.nn.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_positions
from mmfast.nn.fsq import FSQ
from mmfast.nn.grouped_residual_vq import GroupedResidualVQ
from mmfast.nn.joint_block import JointTransformerBlock
from mmfast.nn.lfq import LFQ
from mmfast.nn.losses import LossBreakdown
from mmfast.nn.mlp import MLP
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
    "MLP",
    "CrossAttention",
    "CrossAttentionBlock",
    "DiTBlock",
    "FinalLayer",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "JointTransformerBlock",
    "LabelEmbedder",
    "LossBreakdown",
    "PatchEmbed",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "SelfAttention",
    "ShardedVectorQuantize",
    "SimVQ",
    "TimestepEmbedder",
    "VectorQuantize",
    "nearest_code_sharded",
    "sincos_positions",
]
