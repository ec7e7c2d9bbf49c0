"""Whole models made of mmfast's modules."""

from mmfast.models.configured import Configured, describe_model, load_model, save_model
from mmfast.models.diffusion import Diffusion, Losses, Noised
from mmfast.models.dit import DiT
from mmfast.models.vqvae import VQVAE, Usage, VQVAEOutput, code_usage

__all__ = [
    "VQVAE",
    "Configured",
    "DiT",
    "Diffusion",
    "Losses",
    "Noised",
    "Usage",
    "VQVAEOutput",
    "code_usage",
    "describe_model",
    "load_model",
    "save_model",
]
