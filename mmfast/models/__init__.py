"""Whole models made of mmfast's modules."""

from mmfast.models.conditional_dit import ConditionalDiT
from mmfast.models.configured import Configured, describe_model, load_model, save_model
from mmfast.models.diffusion import Diffusion, Losses
from mmfast.models.dit import DiT
from mmfast.models.multimodal import MultimodalDiT
from mmfast.models.multimodal_diffusion import MultimodalDiffusion
from mmfast.models.noising import Noised, Noising
from mmfast.models.vqvae import VQVAE, Usage, VQVAEOutput, code_usage

__all__ = [
    "VQVAE",
    "ConditionalDiT",
    "Configured",
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
    "describe_model",
    "load_model",
    "save_model",
]
