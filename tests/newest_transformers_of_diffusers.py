"""The newest transformers of diffusers, tiny: by class, a configuration and inputs.

Not here: ``AnyFlowFARTransformer3DModel`` and ``Kandinsky6SRTransformer3DModel``, whose
FlexAttention has no backward on a CPU; ``SanaWMTransformer3DModel`` and
``WanAnimate2Transformer3DModel``, which take what only their pipelines make.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import normal

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 24}
_MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
_TIMES = torch.tensor([3, 700])
_PARTS = torch.tensor([0.3, 0.7])  # times from 0 to 1
_TEXT = normal(2, 7, 32, seed=1)
_TOKENS, _IMAGE = normal(2, 16, 4), normal(2, 4, 8, 8)
_CONSISID: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 7,
}
_CONSISID_INPUTS = {
    "hidden_states": normal(2, 3, 4, 8, 8),
    "encoder_hidden_states": _TEXT,
    "timestep": _TIMES,
}


def _rotary(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = normal(length, width // 2, seed=9).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


NEWEST: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
        },
        {
            "hidden_states": normal(2, 16, 4),
            "timestep": _PARTS,
            "timestep_r": _PARTS,
            "encoder_hidden_states": normal(2, 7, 48, seed=1),
            "context_latents": normal(2, 16, 8, seed=2),
        },
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 48,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 32,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (8, 8, 8),
            "axes_lens": (64, 32, 32),
        },
        {
            "hidden_states": _IMAGE,
            "timestep": _PARTS,
            "encoder_hidden_states": normal(2, 2, 7, 32, seed=1),
            "encoder_attention_mask": _MASK.bool(),
        },
    ),
    "ConsisIDTransformer3DModel": (_CONSISID, _CONSISID_INPUTS),
    "ConsisIDTransformer3DModel, faces": (
        {
            **_CONSISID,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 16,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 32,
            "LFE_num_scale": 5,
        },
        {
            **_CONSISID_INPUTS,
            "id_cond": normal(2, 8, seed=2),
            "id_vit_hidden": [normal(2, 6, 16, seed=i) for i in range(5)],
        },
    ),
    "DreamLiteTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 48,
            "norm_num_groups": 4,
            "cross_attention_dim": 32,
            "num_layers": 2,
        },
        {"hidden_states": normal(2, 48, 8, 8), "encoder_hidden_states": _TEXT},
    ),
    "GlmImageTransformer2DModel": (
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 32,
        },
        {
            "hidden_states": _IMAGE,
            "encoder_hidden_states": _TEXT,
            "prior_token_id": torch.arange(32).view(2, 16),
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
            "timestep": _TIMES,
            "target_size": torch.full((2, 2), 64.0),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    "Ideogram4Transformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 32,
            "mrope_section": (4, 4, 4),
        },
        {
            "hidden_states": normal(2, 23, 4),
            "timestep": _PARTS,
            "encoder_hidden_states": normal(2, 23, 32, seed=1),
            "position_ids": torch.arange(23)[None, :, None].expand(2, 23, 3),
            "segment_ids": torch.ones(2, 23, dtype=torch.int64),
            "indicator": torch.tensor([3] * 7 + [2] * 16).expand(2, 23),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "text_dim": 32,
            "num_layers": 2,
            "rope_dim_list": [8, 8, 8],
        },
        {
            "hidden_states": normal(2, 16, 4, 1, 2, 2),
            "timestep": _TIMES,
            "encoder_hidden_states": _TEXT,
            "encoder_hidden_states_mask": _MASK,
            "shape_list": [[(1, 4, 4)]] * 2,
        },
    ),
    "Kandinsky6Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 32,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 48,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (8, 8, 8),
            "visual_cond": False,
        },
        {
            "hidden_states": normal(1, 3, 8, 8, 4),
            "encoder_hidden_states": normal(1, 7, 32, seed=1),
            "pooled_projections": normal(1, 16, seed=2),
            "timestep": torch.tensor([300.0]),
        },
    ),
    "MiniMaxH3Transformer3DModel": (
        {
            **_HEADS,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 64,
            "in_channels": 2,
            "audio_in_channels": 4,
            "text_dim": 32,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 4,
        },
        {
            "hidden_states": normal(1, 12, 8),
            "audio_hidden_states": normal(1, 5, 4, seed=1),
            "encoder_hidden_states": normal(1, 7, 32, seed=2),
            "timestep": _PARTS,
            "timestep_indices": torch.arange(24) % 2,
            "token_tags": torch.tensor([1] * 7 + [0] * 12 + [2] * 5),
            "position_ids": torch.arange(24.0)[:, None].expand(24, 3),
            "text_indices": torch.arange(7),
            "video_indices": torch.arange(7, 19),
            "audio_indices": torch.arange(19, 24),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "condition_dim": 32,
            "num_layers": 2,
            "ff_inner_dim": 64,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        {
            "hidden_states": normal(2, 4, 16),
            "timestep": _PARTS,
            "encoder_hidden_states": normal(2, 16, 32, seed=1),
        },
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            **_HEADS,
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 5,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 8, 8),
            "num_experts": 2,
            "moe_intermediate_dim": 16,
            "capacity_factors": 1.0,
        },
        {
            "hidden_states": _TOKENS,
            "img_shapes": [(1, 4, 4)] * 2,
            "encoder_hidden_states": _TEXT,
            "encoder_hidden_states_mask": _MASK,
            "timestep": _PARTS,
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 50,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 12, "short_factor": [1.0] * 12},
        },
        {
            "hidden_states": _IMAGE,
            "timestep": _PARTS,
            "input_ids": torch.arange(14).view(2, 7),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(2, 24, 24),
            "position_ids": torch.arange(24).expand(2, 24),
        },
    ),
    "QwenImage21Transformer2DModel": (
        {
            **_HEADS,
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "context_in_dim": 32,
            "axes_dims_rope": (8, 8, 8),
        },
        {
            "hidden_states": _TOKENS,
            "encoder_hidden_states": _TEXT,
            "timestep": _PARTS,
            "img_shapes": [[(1, 4, 4)]] * 2,
            "img_mask": torch.tensor([False] * 7 + [True] * 4).expand(2, 11),
            "encoder_hidden_states_mask": _MASK.bool(),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 48,
            "num_layers": 2,
            "caption_channels": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 12,
            "audio_cross_attention_dim": 24,
        },
        {
            "hidden_states": normal(1, 12, 4),
            "encoder_hidden_states": normal(1, 7, 32, seed=1),
            "timestep": torch.full((1, 12), 300.0),
            "video_rotary_emb": _rotary(12, 48),
        },
    ),
    "WanAnimateTransformer3DModel": (
        {
            **_HEADS,
            "patch_size": (1, 2, 2),
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 16,
            "ffn_dim": 64,
            "num_layers": 2,
            "image_dim": 8,
            "rope_max_seq_len": 32,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        {
            "hidden_states": normal(1, 12, 3, 8, 8),
            "timestep": torch.tensor([300]),
            "encoder_hidden_states": normal(1, 7, 32, seed=1),
            "encoder_hidden_states_image": normal(1, 5, 8, seed=2),
            "pose_hidden_states": normal(1, 4, 2, 8, 8, seed=3),
            "face_pixel_values": normal(1, 3, 5, 16, 16, seed=4),
        },
    ),
}
