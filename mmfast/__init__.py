"""mmfast: exact, fused kernels for VQ-VAEs and diffusion transformers, as torch ops."""

from mmfast.backends import BackendError, extension, use_backend
from mmfast.ops.code_statistics import code_statistics
from mmfast.ops.ema_update import ema_update_, ema_update_from_statistics_
from mmfast.ops.kmeans import KMeansResult, kmeans
from mmfast.ops.nearest_code import nearest_code
from mmfast.ops.residual_quantize import ResidualQuantized, residual_quantize
from mmfast.ops.vector_quantize import VectorQuantized, vector_quantize
from mmfast.version import __version__

extension()

__all__ = [
    "BackendError",
    "KMeansResult",
    "ResidualQuantized",
    "VectorQuantized",
    "__version__",
    "code_statistics",
    "ema_update_",
    "ema_update_from_statistics_",
    "kmeans",
    "nearest_code",
    "residual_quantize",
    "use_backend",
    "vector_quantize",
]
