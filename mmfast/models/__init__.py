"""Whole models made of mmfast's modules."""

from mmfast.models.dit import DiT
from mmfast.models.vqvae import VQVAE, Usage, VQVAEOutput, code_usage

__all__ = ["VQVAE", "DiT", "Usage", "VQVAEOutput", "code_usage"]
