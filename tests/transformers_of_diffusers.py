"""Small transformers of diffusers, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import normal
from torch import Tensor, nn


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew: those that begin at zero would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
    return model.eval()


def dit() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": normal(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([1, 7]),
    }
    return model, inputs


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=48,
        caption_channels=32,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 7, 32, seed=1),
        "timestep": torch.tensor([3, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
    }
    return model, inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=48,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 7, 32, seed=1),
        "pooled_projections": normal(2, 16, seed=2),
        "timestep": torch.tensor([3.0, 700.0]),
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(8, 8, 8),
        guidance_embeds=False,
    )
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    inputs = {
        "hidden_states": normal(2, 16, 4),
        "encoder_hidden_states": normal(2, 7, 32, seed=1),
        "pooled_projections": normal(2, 16, seed=2),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.cat([torch.zeros(16, 1), grid], 1),
        "txt_ids": torch.zeros(7, 3),
    }
    return model, inputs


def wan() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )
    inputs = {
        "hidden_states": normal(2, 4, 3, 8, 8),
        "encoder_hidden_states": normal(2, 7, 32, seed=1),
        "timestep": torch.tensor([3, 700]),
    }
    return model, inputs


def lumina2() -> tuple[nn.Module, dict[str, Any]]:
    """Not rewritten: only its attention is."""
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cap_feat_dim=32,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(30, 20, 20),
    )
    inputs = {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 7, 32, seed=1),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool(),
    }
    return model, inputs


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "DiT": dit,
    "PixArt": pixart,
    "SD3": sd3,
    "Flux": flux,
    "Wan": wan,
    "Lumina2": lumina2,
}


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What a model of diffusers returns."""
    return model(**inputs, return_dict=False)[0]
