"""Modules made of the ops."""

from mmfast.nn.losses import LossBreakdown
from mmfast.nn.vector_quantize import VectorQuantize

__all__ = ["LossBreakdown", "VectorQuantize"]
