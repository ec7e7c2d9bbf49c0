"""mmfast: exact, fused kernels for VQ-VAEs and diffusion transformers, as torch ops."""

from mmfast.backends import BackendError, extension, use_backend
from mmfast.ops import dit_block as _dit_block  # noqa: F401  (registers what modules call)
from mmfast.ops.add_noise import AddedNoise, add_noise
from mmfast.ops.code_statistics import code_statistics
from mmfast.ops.dynamic_threshold import dynamic_threshold
from mmfast.ops.ema_update import ema_update_, ema_update_from_statistics_
from mmfast.ops.finite_scalar_quantize import FiniteScalarQuantized, finite_scalar_quantize
from mmfast.ops.gated_activation import gated_activation, geglu, swiglu
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.gated_residual_modulate import GatedResidualModulated, gated_residual_modulate
from mmfast.ops.guidance_factors import guidance_factors, projected_guidance_factors
from mmfast.ops.joint_attention import JointAttention, joint_attention
from mmfast.ops.kmeans import KMeansResult, kmeans
from mmfast.ops.layer_norm_modulate import layer_norm_modulate
from mmfast.ops.linear import linear
from mmfast.ops.lookup_free_quantize import LookupFreeQuantized, lookup_free_quantize
from mmfast.ops.nearest_code import nearest_code
from mmfast.ops.pack_indices import pack_indices, unpack_indices
from mmfast.ops.patchify import patchify, unpatchify
from mmfast.ops.qk_norm_rope import qk_norm_rope
from mmfast.ops.randn import randn
from mmfast.ops.residual_quantize import ResidualQuantized, residual_quantize
from mmfast.ops.rotary_tables import rotary_tables
from mmfast.ops.sample_code import sample_code
from mmfast.ops.sampler_step import sampler_step
from mmfast.ops.scaled_dot_product_attention import scaled_dot_product_attention
from mmfast.ops.soft_assignment_statistics import (
    SoftAssignmentStatistics,
    soft_assignment_statistics,
)
from mmfast.ops.timestep_embedding import timestep_embedding
from mmfast.ops.varlen_attention import varlen_attention
from mmfast.ops.vector_quantize import VectorQuantized, vector_quantize
from mmfast.order import sums_in_any_order
from mmfast.version import __version__

extension()

__all__ = [
    "AddedNoise",
    "BackendError",
    "FiniteScalarQuantized",
    "GatedResidualModulated",
    "JointAttention",
    "KMeansResult",
    "LookupFreeQuantized",
    "ResidualQuantized",
    "SoftAssignmentStatistics",
    "VectorQuantized",
    "__version__",
    "add_noise",
    "code_statistics",
    "dynamic_threshold",
    "ema_update_",
    "ema_update_from_statistics_",
    "finite_scalar_quantize",
    "gated_activation",
    "gated_residual",
    "gated_residual_modulate",
    "geglu",
    "guidance_factors",
    "joint_attention",
    "kmeans",
    "layer_norm_modulate",
    "linear",
    "lookup_free_quantize",
    "nearest_code",
    "pack_indices",
    "patchify",
    "projected_guidance_factors",
    "qk_norm_rope",
    "randn",
    "residual_quantize",
    "rotary_tables",
    "sample_code",
    "sampler_step",
    "scaled_dot_product_attention",
    "soft_assignment_statistics",
    "sums_in_any_order",
    "swiglu",
    "timestep_embedding",
    "unpack_indices",
    "unpatchify",
    "use_backend",
    "varlen_attention",
    "vector_quantize",
]
