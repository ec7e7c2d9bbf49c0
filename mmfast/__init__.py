"""mmfast: exact, fused kernels for VQ-VAEs and diffusion transformers, as torch ops."""

from mmfast.backends import BackendError, extension, use_backend
from mmfast.ops.code_statistics import code_statistics
from mmfast.ops.kmeans import KMeansResult, kmeans
from mmfast.ops.nearest_code import nearest_code
from mmfast.version import __version__

extension()

__all__ = [
    "BackendError",
    "KMeansResult",
    "__version__",
    "code_statistics",
    "kmeans",
    "nearest_code",
    "use_backend",
]
