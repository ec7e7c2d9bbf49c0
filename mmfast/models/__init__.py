"""Whole models made of mmfast's modules."""

from mmfast.models.classifier import Classifier
from mmfast.models.codes import codebook_sizes, count_codes
from mmfast.models.compression import (
    Decompressed,
    compress,
    decompress,
    model_digest,
)
from mmfast.models.conditional_dit import ConditionalDiT
from mmfast.models.configured import Configured, describe_model, load_model, save_model
from mmfast.models.diffusion import Diffusion, Losses
from mmfast.models.dit import DiT
from mmfast.models.multimodal import MultimodalDiT
from mmfast.models.multimodal_diffusion import MultimodalDiffusion
from mmfast.models.noising import Noised, Noising
from mmfast.models.vqvae import VQVAE, Usage, VQVAEOutput, code_usage, usage_of_counts

__all__ = [
    "VQVAE",
    "Classifier",
    "ConditionalDiT",
    "Configured",
    "Decompressed",
    "DiT",
    "Diffusion",
    "Losses",
    "MultimodalDiT",
    "MultimodalDiffusion",
    "Noised",
    "Noising",
    "Usage",
    "VQVAEOutput",
    "code_usage",
    "codebook_sizes",
    "compress",
    "count_codes",
    "decompress",
    "describe_model",
    "load_model",
    "model_digest",
    "save_model",
    "usage_of_counts",
]
