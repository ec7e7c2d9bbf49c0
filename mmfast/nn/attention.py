"""Attention of tokens to each other, and to those of a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.checks import check_choice
from mmfast.nn.layers import linear
from mmfast.ops.qk_norm_rope import qk_norm_rope
from mmfast.ops.scaled_dot_product_attention import scaled_dot_product_attention

QK_NORMS = ("none", "rms", "rms_across_heads", "layer")

Tables = tuple[Tensor, Tensor]  # cos and sin, of mmfast.rotary_tables


class QKNorm(nn.Module):
    """The norm of queries or keys; its parameters are for :func:`mmfast.qk_norm_rope`."""

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None


class _Heads(nn.Module):
    """What attentions share: heads, and their normalisation and rotation."""

    q_norm: QKNorm | None
    k_norm: QKNorm | None

    def __init__(
        self, dim: int, num_heads: int, qk_norm: str, qk_norm_eps: float, rotation: str
    ) -> None:
        super().__init__()
        check_choice("qk_norm", qk_norm, QK_NORMS)
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {num_heads}, got {dim}")
        self.dim, self.num_heads = dim, num_heads
        self.qk_norm, self.qk_norm_eps, self.rotation = qk_norm, qk_norm_eps, rotation
        self.q_norm = self.k_norm = None
        if qk_norm != "none":
            width = dim if qk_norm == "rms_across_heads" else dim // num_heads
            self.q_norm, self.k_norm = (QKNorm(width, bias=qk_norm == "layer") for _ in range(2))

    def extra_repr(self) -> str:
        """The options."""
        return f"{self.dim}, num_heads={self.num_heads}, qk_norm={self.qk_norm}"

    def normalised(self, q: Tensor, k: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor]:
        """q and k ``(B, L, H, E)``, normalised and rotated if there is anything to do."""
        cos, sin = (None, None) if tables is None else tables
        if self.q_norm is None or self.k_norm is None:
            if tables is None:
                return q, k
            q, rotated = qk_norm_rope(
                q, k, None, None, cos, sin, norm="none", rotation=self.rotation
            )
        else:
            q, rotated = qk_norm_rope(
                q, k, self.q_norm.weight, self.k_norm.weight, cos, sin,
                norm="layer" if self.qk_norm == "layer" else "rms",
                across_heads=self.qk_norm == "rms_across_heads", bias_q=self.q_norm.bias,
                bias_k=self.k_norm.bias, eps=self.qk_norm_eps, rotation=self.rotation,
            )  # fmt: skip
        assert rotated is not None
        return q, rotated


class SelfAttention(_Heads):
    """Multi-head self-attention; ``qkv``, ``proj``, ``q_norm`` and ``k_norm``, as in timm.

    Queries, keys and values are read from the packed projection where they are.

    Args:
        dim: of the tokens.
        num_heads: H, of which ``dim`` is a multiple.
        qkv_bias, proj_bias: whether the layers have one.
        qk_norm: ``"none"``, ``"rms"`` (Flux, SD3.5), ``"rms_across_heads"`` (Wan) or ``"layer"``
            (CogVideoX).
        qk_norm_eps: of these norms.
        rotation: ``"interleaved"`` or ``"half"``, for the tables that ``forward`` gets.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: str = "none",
        qk_norm_eps: float = 1e-6,
        rotation: str = "interleaved",
    ) -> None:
        super().__init__(dim, num_heads, qk_norm, qk_norm_eps, rotation)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def heads(self, x: Tensor, tables: Tables | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens ``(B, L, dim)``, each ``(B, H, L, E)``."""
        qkv = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))  # [B, L, 3, H, E]
        q, k, v = qkv.unbind(2)
        q, k = self.normalised(q, k, tables)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def merge(self, heads: Tensor) -> Tensor:
        """``(B, H, L, E)`` to the output ``(B, L, dim)``."""
        return linear(self.proj, heads.transpose(1, 2).flatten(2))

    def forward(
        self, x: Tensor, *, tables: Tables | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """``(B, L, dim)`` to ``(B, L, dim)``.

        Args:
            x: the tokens.
            tables: cos and sin of :func:`mmfast.rotary_tables`.
            attn_mask: of :func:`mmfast.scaled_dot_product_attention`.
        """
        return self.merge(scaled_dot_product_attention(*self.heads(x, tables), attn_mask))


class CrossAttention(_Heads):
    """Multi-head attention of tokens to those of a text; ``q``, ``kv``, ``proj``.

    Args:
        dim: of the tokens.
        context_dim: of the text's tokens; ``dim`` by default.
        num_heads, qkv_bias, proj_bias, qk_norm, qk_norm_eps: as :class:`SelfAttention` has them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: str = "none",
        qk_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, num_heads, qk_norm, qk_norm_eps, "interleaved")
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim if context_dim is None else context_dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, context: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """``(B, L, dim)`` and the text ``(B, S, context_dim)`` to ``(B, L, dim)``.

        Args:
            x: the tokens.
            context: the text's.
            attn_mask: of :func:`mmfast.scaled_dot_product_attention`; ``(B, S)`` is of keys.
        """
        q = linear(self.q, x).unflatten(-1, (self.num_heads, -1))  # [B, L, H, E]
        k, v = (
            linear(self.kv, context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        )  # [B, S, H, E]
        q, k = self.normalised(q, k, None)
        if attn_mask is not None and attn_mask.dim() == 2:
            attn_mask = attn_mask[:, None, None, :]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, ..., E]
        heads = scaled_dot_product_attention(q, k, v, attn_mask)
        return linear(self.proj, heads.transpose(1, 2).flatten(2))
