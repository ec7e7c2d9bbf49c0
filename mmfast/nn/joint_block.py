"""The block of SD3 and Flux in which image and text tokens attend to each other."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.nn.adaptive_norm import Pending, modulation, next_branch, settled, zero
from mmfast.nn.attention import SelfAttention, Tables
from mmfast.nn.mlp import MLP
from mmfast.ops.joint_attention import joint_attention


class _Stream(nn.Module):
    """One kind of tokens: its attention's layers, its MLP and their modulation."""

    mlp: MLP | None

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: str, whole: bool
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm=qk_norm)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio)) if whole else None
        if not whole:
            self.attn.proj = nn.Identity()  # type: ignore[assignment]
        self.adaLN_modulation = modulation(hidden_size, 6 if whole else 2)
        zero(self.adaLN_modulation)


class JointTransformerBlock(nn.Module):
    """Attention of image and text together, each with its own weights (MMDiT's double stream).

    Each stream, ``image`` and ``text``, has the parameters of :class:`DiTBlock`. Weights of
    diffusers' ``JointTransformerBlock`` and ``FluxTransformerBlock`` can be converted:
    :func:`mmfast.nn.weights.joint_block_from_diffusers`.

    Args:
        hidden_size: C.
        num_heads: H.
        mlp_ratio: of the MLPs' hidden size to C.
        qk_norm: ``"none"`` (SD3) or ``"rms"`` (SD3.5, Flux).
        text_ends: the last block of SD3: the text's tokens are only attended to.
        eps: of the norms.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis" (2024), fig. 2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: str = "none",
        text_ends: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.image = _Stream(hidden_size, num_heads, mlp_ratio, qk_norm, True)
        self.text = _Stream(hidden_size, num_heads, mlp_ratio, qk_norm, not text_ends)

    def _after(self, stream: _Stream, x: Tensor, parts: list[Tensor], heads: Tensor) -> Tensor:
        """What comes behind the attention."""
        assert stream.mlp is not None
        gate, shift, scale, mlp_gate = parts
        pending: Pending = gate, stream.attn.merge(heads)
        x, branch = next_branch(x, pending, shift, scale, eps=self.eps)
        return settled(x, (mlp_gate, stream.mlp(branch)))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        c: Tensor,
        *,
        image_tables: Tables | None = None,
        text_tables: Tables | None = None,
        text_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Both kinds of tokens to both; None for the text's if it ends here.

        Args:
            image: ``(B, L, C)``.
            text: ``(B, T, C)``.
            c: the condition, ``(B, C)``.
            image_tables, text_tables: cos and sin of :func:`mmfast.rotary_tables`.
            text_lengths: ``(B,)``, of :func:`mmfast.joint_attention`.
        """
        image_shift, image_scale, *image_parts = self.image.adaLN_modulation(c).chunk(6, -1)
        parts = 2 if self.text.mlp is None else 6
        text_shift, text_scale, *text_parts = self.text.adaLN_modulation(c).chunk(parts, -1)
        _, image_in = next_branch(image, None, image_shift, image_scale, eps=self.eps)
        _, text_in = next_branch(text, None, text_shift, text_scale, eps=self.eps)
        heads = joint_attention(
            *self.image.attn.heads(image_in, image_tables),
            *self.text.attn.heads(text_in, text_tables),
            text_lengths=text_lengths,
        )
        image = self._after(self.image, image, image_parts, heads.image)
        if self.text.mlp is None:
            return image, None
        return image, self._after(self.text, text, text_parts, heads.text)
