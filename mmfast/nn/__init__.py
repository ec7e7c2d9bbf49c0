"""Modules built on the ops; drop-ins for those of the libraries that models use."""

from mmfast.nn.fsq import FSQ
from mmfast.nn.lfq import LFQ
from mmfast.nn.residual_fsq import GroupedResidualFSQ, ResidualFSQ
from mmfast.nn.residual_lfq import GroupedResidualLFQ, ResidualLFQ

__all__ = [
    "FSQ",
    "LFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "ResidualFSQ",
    "ResidualLFQ",
]
