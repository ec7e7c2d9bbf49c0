"""The block and the final layer of DiT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor, nn

from mmfast.nn.adaptive_norm import Pending, conditioned, modulation, next_branch, settled, zero
from mmfast.nn.attention import SelfAttention, Tables
from mmfast.nn.layers import is_plain
from mmfast.nn.mlp import GATED, MLP
from mmfast.nn.whole_block import whole_block


class DiTBlock(nn.Module):
    """Self-attention and an MLP, with norms and gates that the condition sets (adaLN-Zero).

    Its parameters have the names of facebookresearch/DiT: ``attn.qkv``, ``attn.proj``, ``mlp.fc1``,
    ``mlp.fc2``, ``adaLN_modulation.1``. The residual is read and written once between two branches.
    Where nothing else hangs on to its parts, the block is a single op.

    Args:
        hidden_size: C, of tokens and condition.
        num_heads: H.
        mlp_ratio: of the MLP's hidden size to C.
        activation, gate: of :class:`MLP`.
        qk_norm, qk_norm_eps, rotation, qkv_bias: of :class:`SelfAttention`.
        eps: of the norm before the attention.
        mlp_eps: of that before the MLP; ``eps`` by default. diffusers' DiT has 1e-5 there.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), fig. 3.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        activation: str = "gelu_tanh",
        gate: str = "last",
        qk_norm: str = "none",
        qk_norm_eps: float = 1e-6,
        rotation: str = "interleaved",
        qkv_bias: bool = True,
        eps: float = 1e-6,
        mlp_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.mlp_eps = eps, eps if mlp_eps is None else mlp_eps
        self.attn = SelfAttention(
            hidden_size,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            rotation=rotation,
        )
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio), activation=activation, gate=gate)
        self.adaLN_modulation = modulation(hidden_size, 6)
        zero(self.adaLN_modulation)

    @overload
    def forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None = ...,
        *,
        defer: Literal[False] = ...,
        tables: Tables | None = ...,
        attn_mask: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None = ...,
        *,
        defer: Literal[True],
        tables: Tables | None = ...,
        attn_mask: Tensor | None = ...,
    ) -> tuple[Tensor, Pending | None]: ...
    def forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None = None,
        *,
        defer: bool = False,
        tables: Tables | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Pending | None]:
        """Tokens ``(B, L, C)`` to tokens.

        Args:
            x: the tokens, the residual.
            c: the condition, ``(B, C)``, or one for each of F frames, ``(B, F, C)``.
            pending: what the block before has deferred.
            defer: return x without the MLP's branch, and that branch, for the next block's
                ``pending``: they are then added in the same pass that normalises for it. None
                where nothing is pending, as after a block that is a single op.
            tables: cos and sin of :func:`mmfast.rotary_tables`, for queries and keys.
            attn_mask: of :func:`mmfast.scaled_dot_product_attention`.
        """
        modulation = conditioned(self.adaLN_modulation, c)
        if pending is None and tables is None and attn_mask is None:
            made = self._whole(x, modulation)
            if made is not None:
                return (made, None) if defer else made
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, -1)
        x, branch = next_branch(x, pending, shift, scale, eps=self.eps)
        attended = self.attn(branch, tables=tables, attn_mask=attn_mask)
        x, branch = next_branch(x, (gate, attended), mlp_shift, mlp_scale, eps=self.mlp_eps)
        left = mlp_gate, self.mlp(branch)
        return (x, left) if defer else settled(x, left)

    def _whole(self, x: Tensor, modulation: Tensor) -> Tensor | None:
        """The block as a single op, if it is nothing but the parts that it was made of."""
        attn, mlp = self.attn, self.mlp
        if attn.q_norm is not None or attn.k_norm is not None or mlp.activation in GATED:
            return None
        if not (is_plain(attn, SelfAttention) and is_plain(mlp, MLP)):
            return None
        return whole_block(
            x,
            modulation,
            (attn.qkv, attn.proj, mlp.fc1, mlp.fc2),
            num_heads=attn.num_heads,
            scale=(attn.dim // attn.num_heads) ** -0.5,
            eps=self.eps,
            mlp_eps=self.mlp_eps,
            activation=mlp.activation,
        )


class FinalLayer(nn.Module):
    """An adaptive norm and a linear layer from tokens to patches; DiT's names of parameters.

    Args:
        hidden_size: C.
        patch_size: of each spatial dimension; one number is for two dimensions.
        out_channels: of the patches, which are the last of a token's dimensions:
            ``order="channels_last"`` of :func:`mmfast.unpatchify`.
        eps: of the norm.
    """

    def __init__(
        self,
        hidden_size: int,
        patch_size: int | Sequence[int],
        out_channels: int,
        *,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.eps = eps
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.linear = nn.Linear(hidden_size, math.prod(patch) * out_channels)
        self.adaLN_modulation = modulation(hidden_size, 2)
        zero(self.linear, self.adaLN_modulation)

    def forward(self, x: Tensor, c: Tensor, pending: Pending | None = None) -> Tensor:
        """Tokens ``(B, L, C)`` and the condition to ``(B, L, prod(patch_size) out_channels)``."""
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(next_branch(x, pending, shift, scale, eps=self.eps)[1])
