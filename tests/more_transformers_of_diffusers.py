"""Other transformers of diffusers, tiny: by class, a configuration and inputs."""

from __future__ import annotations

from typing import Any

import torch
from cases import normal
from newest_transformers_of_diffusers import NEWEST
from torch import Tensor, nn

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 24}
_FRAMES = (2, 4, 3, 8, 8)  # (B, C, T, H, W)
_TEXT = (2, 7, 32)
_TIMES = torch.tensor([3, 700])
_MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
_GRID = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
_IMAGE_IDS = torch.cat([torch.zeros(16, 1), _GRID], 1)
_IMAGE_IDS_4 = torch.cat([_IMAGE_IDS, torch.zeros(16, 1)], 1)
_TEXT_IDS = torch.zeros(7, 3)
_TEXT_IDS_4 = torch.zeros(7, 4)


def _image(channels: int = 4) -> Tensor:
    return normal(2, channels, 8, 8)


def _video(channels: int = 4) -> Tensor:
    return normal(2, channels, 3, 8, 8)


def _tokens(channels: int = 4) -> Tensor:
    return normal(2, 16, channels)


def _text(seed: int = 1) -> Tensor:
    return normal(*_TEXT, seed=seed)


def _vector(width: int = 16, seed: int = 2) -> Tensor:
    return normal(2, width, seed=seed)


def _rotary(length: int, width: int) -> tuple[Tensor, Tensor]:
    angles = normal(length, width // 2, seed=9).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


_WAN = {
    **_HEADS,
    "patch_size": (1, 2, 2),
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
}
_FLUX = {
    **_HEADS,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 8, 8),
}
_HUNYUAN = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "rope_axes_dim": (8, 8, 8),
}


def _flux_inputs(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": _tokens(),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": _IMAGE_IDS,
        "txt_ids": _TEXT_IDS,
        **more,
    }


_COGVIEW = {
    **_HEADS,
    "in_channels": 4,
    "num_layers": 1,
    "out_channels": 4,
    "text_embed_dim": 32,
    "time_embed_dim": 16,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}


def _cogview_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(),
        "timestep": _TIMES,
        "original_size": torch.tensor([[8.0, 8]] * 2),
        "target_size": torch.tensor([[8.0, 8]] * 2),
        "crop_coords": torch.zeros(2, 2),
    }


def _wan_inputs(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": _video(),
        "encoder_hidden_states": _text(),
        "timestep": _TIMES,
        **more,
    }


# By class, and what is special where there are several of it: a configuration and inputs.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AuraFlowTransformer2DModel": (
        {
            **_HEADS,
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 32,
            "caption_projection_dim": 48,
            "pos_embed_max_size": 16,
        },
        {
            "hidden_states": _image(),
            "encoder_hidden_states": _text(),
            "timestep": torch.tensor([0.3, 0.7]),
        },
    ),
    "CogVideoXTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 7,
        },
        {
            "hidden_states": normal(2, 3, 4, 8, 8),
            "encoder_hidden_states": _text(),
            "timestep": _TIMES,
        },
    ),
    "CogVideoXTransformer3DModel, rotary": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 7,
            "use_rotary_positional_embeddings": True,
        },
        {
            "hidden_states": normal(2, 3, 4, 8, 8),
            "encoder_hidden_states": _text(),
            "timestep": _TIMES,
            "image_rotary_emb": _rotary(48, 24),
        },
    ),
    "HunyuanDiT2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 48,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 32,
            "text_len": 7,
            "text_len_t5": 5,
        },
        {
            "hidden_states": _image(),
            "timestep": _TIMES.float(),
            "encoder_hidden_states": _text(),
            "text_embedding_mask": _MASK,
            "encoder_hidden_states_t5": normal(2, 5, 32, seed=3),
            "text_embedding_mask_t5": _MASK[:, :5],
            "image_meta_size": torch.tensor([[8.0, 8, 8, 8, 0, 0]] * 2),
            "style": torch.tensor([0, 0]),
            "image_rotary_emb": _rotary(16, 24),
        },
    ),
    "LatteTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 48,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 32,
            "video_length": 3,
        },
        {
            "hidden_states": _video(),
            "timestep": _TIMES,
            "encoder_hidden_states": _text(),
        },
    ),
    "LuminaNextDiT2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 32,
        },
        {
            "hidden_states": _image(),
            "timestep": torch.tensor([0.3, 0.7]),
            "encoder_hidden_states": _text(),
            "encoder_mask": _MASK,
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 6), normal(8, 8, 6, seed=4)),
            "cross_attention_kwargs": {},
        },
    ),
    "PriorTransformer": (
        {
            **_HEADS,
            "num_layers": 1,
            "embedding_dim": 32,
            "num_embeddings": 7,
        },
        {
            "hidden_states": _vector(32),
            "timestep": _TIMES,
            "proj_embedding": _vector(32, seed=3),
            "encoder_hidden_states": _text(),
            "attention_mask": _MASK,
        },
    ),
    "SanaTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 24,
            "cross_attention_dim": 48,
            "caption_channels": 32,
            "sample_size": 8,
        },
        {
            "hidden_states": _image(),
            "encoder_hidden_states": _text(),
            "timestep": _TIMES,
            "encoder_attention_mask": _MASK,
        },
    ),
    "StableAudioDiTModel": (
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 1,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 24,
            "time_proj_dim": 16,
            "global_states_input_dim": 16,
            "cross_attention_input_dim": 32,
        },
        {
            "hidden_states": normal(2, 4, 8),
            "timestep": torch.tensor([0.3, 0.7]),
            "encoder_hidden_states": _text(),
            "global_hidden_states": normal(2, 1, 16, seed=2),
            "rotary_embedding": _rotary(9, 12),
            "encoder_attention_mask": _MASK.bool(),
        },
    ),
    "AllegroTransformer3DModel": (
        {
            **_HEADS,
            "num_layers": 1,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 3,
            "caption_channels": 32,
        },
        {
            "hidden_states": _video(),
            "encoder_hidden_states": _text(),
            "timestep": _TIMES,
            "attention_mask": torch.ones(2, 3, 8, 8),
            "encoder_attention_mask": _MASK,
            "image_rotary_emb": (
                [_rotary(48, 8)] * 3,
                [torch.arange(48)[None]] * 3,
            ),
        },
    ),
    "AnyFlowTransformer3DModel": (
        _WAN,
        {
            "hidden_states": normal(2, 3, 4, 8, 8),
            "timestep": _TIMES[:, None].expand(2, 3),
            "r_timestep": (_TIMES // 2)[:, None].expand(2, 3),
            "encoder_hidden_states": _text(),
        },
    ),
    "BriaTransformer2DModel": (
        {**_FLUX, "axes_dims_rope": [8, 8, 8]},
        _flux_inputs(timestep=_TIMES),
    ),
    "BriaFiboTransformer2DModel": (
        {**_FLUX, "axes_dims_rope": [8, 8, 8], "text_encoder_dim": 16},
        _flux_inputs(
            timestep=_TIMES, text_encoder_layers=[normal(2, 7, 16, seed=i) for i in (5, 6)]
        ),
    ),
    "ChromaTransformer2DModel": (
        {
            **_FLUX,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 48,
            "approximator_layers": 1,
        },
        _flux_inputs(),
    ),
    "ChromaTransformer2DModel, mask": (
        {
            **_FLUX,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 48,
            "approximator_layers": 1,
        },
        _flux_inputs(attention_mask=torch.cat([_MASK, torch.ones(2, 16)], 1).bool()),
    ),
    "ChronoEditTransformer3DModel": ({**_WAN, "rope_temporal_skip_len": 2}, _wan_inputs()),
    "CogView3PlusTransformer2DModel": (_COGVIEW, _cogview_inputs()),
    "CogView4Transformer2DModel": ({**_COGVIEW, "rope_axes_dim": (8, 8)}, _cogview_inputs()),
    "CosmosTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "text_embed_dim": 32,
            "adaln_lora_dim": 8,
            "max_size": (4, 8, 8),
            "concat_padding_mask": False,
            "extra_pos_embed_type": "learnable",
        },
        _wan_inputs(
            attention_mask=_MASK.bool(),
            fps=16,
        ),
    ),
    "EasyAnimateTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
        },
        _wan_inputs(),
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": 48,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 32,
            "rope_axes_dim": (8, 8, 8),
        },
        {
            "hidden_states": _image(),
            "timestep": torch.tensor([0.3, 0.7]),
            "text_bth": _text(),
            "text_lens": torch.tensor([7, 4]),
        },
    ),
    "Flux2Transformer2DModel": (
        {**_FLUX, "axes_dims_rope": (6, 6, 6, 6), "timestep_guidance_channels": 16},
        _flux_inputs(img_ids=_IMAGE_IDS_4, txt_ids=_TEXT_IDS_4, guidance=torch.tensor([3.0, 4.0])),
    ),
    "Flux3Transformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 32,
            "timestep_channels": 16,
            "axes_dims_rope": (6, 6, 6, 6),
        },
        _flux_inputs(img_ids=_IMAGE_IDS_4, txt_ids=_TEXT_IDS_4),
    ),
    "HeliosTransformer3DModel": ({**_WAN, "rope_dim": (8, 8, 8)}, _wan_inputs()),
    "HiDreamImageTransformer2DModel": (
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [32, 16],
            "text_emb_dim": 16,
            "axes_dims_rope": (8, 8, 8),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1],
            "force_inference_output": True,
        },
        {
            "hidden_states": _image(),
            "timesteps": _TIMES,
            "encoder_hidden_states_t5": _text(),
            "encoder_hidden_states_llama3": normal(2, 2, 7, 16, seed=5),
            "pooled_embeds": _vector(),
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        {**_HUNYUAN, "pooled_projection_dim": 16},
        _wan_inputs(
            encoder_attention_mask=_MASK,
            pooled_projections=_vector(),
            guidance=torch.tensor([3.0, 4.0]),
        ),
    ),
    "HunyuanVideo15Transformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "text_embed_2_dim": 16,
            "image_embed_dim": 8,
            "rope_axes_dim": (8, 8, 8),
            "target_size": 8,
        },
        _wan_inputs(
            timestep=_TIMES.float(),
            encoder_attention_mask=_MASK,
            encoder_hidden_states_2=normal(2, 5, 16, seed=3),
            encoder_attention_mask_2=_MASK[:, :5],
            image_embeds=normal(2, 3, 8, seed=4),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {
            **_HUNYUAN,
            "pooled_projection_dim": 16,
            "image_proj_dim": 8,
            "has_image_proj": True,
            "has_clean_x_embedder": True,
        },
        _wan_inputs(
            encoder_attention_mask=_MASK,
            pooled_projections=_vector(),
            guidance=torch.tensor([3.0, 4.0]),
            image_embeds=normal(2, 3, 8, seed=4),
            indices_latents=torch.arange(3),
            latents_clean=normal(2, 4, 1, 8, 8, seed=5),
            indices_latents_clean=torch.tensor([3]),
            latents_history_2x=normal(2, 4, 2, 8, 8, seed=6),
            indices_latents_history_2x=torch.tensor([4, 5]),
            latents_history_4x=normal(2, 4, 4, 8, 8, seed=7),
            indices_latents_history_4x=torch.tensor([6, 7, 8, 9]),
        ),
    ),
    "HunyuanImageTransformer2DModel": (
        {**_HUNYUAN, "patch_size": (2, 2), "rope_axes_dim": (12, 12)},
        {
            "hidden_states": _image(),
            "encoder_hidden_states": _text(),
            "timestep": _TIMES.float(),
            "encoder_attention_mask": _MASK,
        },
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "text_dim": 32,
            "num_layers": 1,
            "rope_dim_list": [8, 8, 8],
        },
        _wan_inputs(),
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_text_dim": 32,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 48,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (8, 8, 8),
        },
        {
            "hidden_states": normal(1, 3, 8, 8, 4),
            "encoder_hidden_states": normal(1, 7, 32, seed=1),
            "timestep": torch.tensor([3.0]),
            "pooled_projections": normal(1, 16, seed=2),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(7),
        },
    ),
    "Krea2Transformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "num_layers": 1,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 32,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 48,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (8, 8, 8),
        },
        {
            "hidden_states": _tokens(),
            "encoder_hidden_states": normal(2, 7, 2, 32, seed=1),
            "timestep": torch.tensor([0.3, 0.7]),
            "position_ids": torch.cat([_TEXT_IDS, _IMAGE_IDS]),
            "encoder_attention_mask": _MASK.bool(),
        },
    ),
    "LongCatImageTransformer2DModel": (
        {**_FLUX, "axes_dims_rope": [8, 8, 8], "pooled_projection_dim": 16},
        _flux_inputs(),
    ),
    "LTXVideoTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 48,
            "num_layers": 1,
            "caption_channels": 32,
        },
        {
            "hidden_states": normal(2, 12, 4),
            "encoder_hidden_states": _text(),
            "timestep": _TIMES,
            "encoder_attention_mask": _MASK,
            "num_frames": 3,
            "height": 2,
            "width": 2,
        },
    ),
    "LTX2VideoTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 48,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 12,
            "audio_cross_attention_dim": 24,
            "num_layers": 1,
            "caption_channels": 32,
        },
        {
            "hidden_states": normal(2, 12, 4),
            "audio_hidden_states": normal(2, 5, 4, seed=3),
            "encoder_hidden_states": _text(),
            "audio_encoder_hidden_states": _text(4),
            "timestep": _TIMES,
            "encoder_attention_mask": _MASK,
            "audio_encoder_attention_mask": _MASK,
            "num_frames": 3,
            "height": 2,
            "width": 2,
            "audio_num_frames": 5,
        },
    ),
    "MochiTransformer3DModel": (
        {
            **_HEADS,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "max_sequence_length": 7,
        },
        _wan_inputs(encoder_attention_mask=_MASK.bool()),
    ),
    "MotifVideoTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": 32,
            "rope_axes_dim": (8, 8, 8),
        },
        _wan_inputs(encoder_attention_mask=_MASK),
    ),
    "OvisImageTransformer2DModel": ({**_FLUX, "out_channels": 4}, _flux_inputs()),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "context_in_dim": 32,
            "hidden_size": 48,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [12, 12],
        },
        {
            "hidden_states": _image(),
            "timestep": torch.tensor([0.3, 0.7]),
            "encoder_hidden_states": _text(),
            "attention_mask": _MASK.bool(),
        },
    ),
    "QwenImageTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 8, 8),
        },
        {
            "hidden_states": _tokens(),
            "encoder_hidden_states": _text(),
            "encoder_hidden_states_mask": _MASK,
            "timestep": torch.tensor([0.3, 0.7]),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
    ),
    "SanaVideoTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 24,
            "cross_attention_dim": 48,
            "caption_channels": 32,
            "sample_size": 8,
        },
        _wan_inputs(encoder_attention_mask=_MASK),
    ),
    "SkyReelsV2Transformer3DModel": (_WAN, _wan_inputs()),
    "TransformerTemporalModel": (
        {
            **_HEADS,
            "in_channels": 32,
            "positional_embeddings": "sinusoidal",
            "num_positional_embeddings": 3,
        },
        {"hidden_states": normal(6, 32, 4, 4), "num_frames": 3},
    ),
    "Transformer2DModel": (
        {**_HEADS, "in_channels": 32, "cross_attention_dim": 32},
        {"hidden_states": normal(2, 32, 4, 4), "encoder_hidden_states": _text()},
    ),
    "WanTransformer3DModel, image": (
        {**_WAN, "image_dim": 16, "added_kv_proj_dim": 48},
        _wan_inputs(
            encoder_hidden_states=normal(2, 512, 32, seed=1),
            encoder_hidden_states_image=normal(2, 5, 16, seed=3),
        ),
    ),
    "WanTransformer3DModel, a time for each token": (
        _WAN,
        _wan_inputs(timestep=torch.arange(96).reshape(2, 48) * 7),
    ),
    "WanVACETransformer3DModel": (
        {**_WAN, "vace_layers": [0], "vace_in_channels": 4},
        _wan_inputs(
            control_hidden_states=normal(2, 4, 3, 8, 8, seed=3),
            control_hidden_states_scale=torch.ones(1),
        ),
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [8, 8, 8],
            "axes_lens": [64, 16, 16],
        },
        {
            "x": [normal(4, 1, 8, 8), normal(4, 1, 8, 8, seed=1)],
            "t": torch.tensor([0.3, 0.7]),
            "cap_feats": [normal(7, 32, seed=2), normal(5, 32, seed=3)],
        },
    ),
}
OTHERS |= NEWEST


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and inputs for it."""
    import diffusers

    config, inputs = OTHERS[name]
    return getattr(diffusers, name.partition(",")[0])(**config), inputs
