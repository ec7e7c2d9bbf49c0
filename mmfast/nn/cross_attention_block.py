"""The block of PixArt and Wan: self-attention, cross-attention to a text, and an MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.nn.adaptive_norm import Pending, next_branch, settled
from mmfast.nn.attention import CrossAttention, SelfAttention, Tables
from mmfast.nn.mlp import MLP


class CrossAttentionBlock(nn.Module):
    """Self-attention, cross-attention and an MLP; adaLN-single: a table is added to the condition.

    Weights of diffusers' PixArt blocks and of ``WanTransformerBlock`` can be converted:
    :func:`mmfast.nn.weights.cross_attention_block_from_diffusers`.

    Args:
        hidden_size: C.
        num_heads: H.
        hidden_dim: of the MLP; 4 C by default.
        context_dim: of the text's tokens; C by default.
        qk_norm, rotation: of :class:`SelfAttention`; ``"rms_across_heads"`` in Wan.
        cross_norm: whether a norm with weights stands before the cross-attention, as in Wan.
        eps: of the norms.

    Source: Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic
    Text-to-Image Synthesis" (2023), sec. 2.3; Wan team, "Wan: Open and Advanced Large-Scale Video
    Generative Models" (2025), sec. 4.
    """

    norm: nn.LayerNorm | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        hidden_dim: int | None = None,
        *,
        context_dim: int | None = None,
        qk_norm: str = "none",
        rotation: str = "interleaved",
        cross_norm: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm=qk_norm, rotation=rotation)
        self.cross_attn = CrossAttention(
            hidden_size, num_heads, context_dim=context_dim, qk_norm=qk_norm
        )
        self.norm = nn.LayerNorm(hidden_size, eps) if cross_norm else None
        self.mlp = MLP(hidden_size, hidden_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        c: Tensor,
        *,
        tables: Tables | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``(B, L, C)`` to tokens.

        Args:
            x: the tokens.
            context: the text's, ``(B, S, context_dim)``.
            c: the condition of all blocks, ``(B, 6, C)``, or one for each of F frames or tokens,
                ``(B, F, 6, C)``. What it is added to has the wider of the two dtypes.
            tables: cos and sin of :func:`mmfast.rotary_tables`.
            context_mask: ``(B, S)``, bool, True for tokens of the text; or any mask of
                :func:`mmfast.scaled_dot_product_attention`.
        """
        parts = self.scale_shift_table + c  # [B, 6, C] or [B, F, 6, C]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts.unbind(-2)
        _, branch = next_branch(x, None, shift, scale, eps=self.eps)
        pending: Pending = gate, self.attn(branch, tables=tables)
        if self.norm is None:
            x = branch = settled(x, pending)
        else:
            x, branch = next_branch(x, pending, None, None, eps=self.eps, norm=self.norm)
        pending = None, self.cross_attn(branch, context, context_mask)
        x, branch = next_branch(x, pending, mlp_shift, mlp_scale, eps=self.eps)
        return settled(x, (mlp_gate, self.mlp(branch)))
