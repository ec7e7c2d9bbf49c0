"""DiT conditioned on a sequence: a text's tokens, another modality's codes or latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.checks import INDEX, check_choice, check_dtype, check_floating
from mmfast.models.patches import PatchTransformer, places, xavier
from mmfast.models.repeating import repeatable
from mmfast.nn.adaptive_norm import modulation, zero
from mmfast.nn.cross_attention_block import CrossAttentionBlock
from mmfast.nn.joint_block import JointTransformerBlock
from mmfast.nn.mlp import MLP

CONDITIONING = ("cross", "joint")


class ConditionalDiT(PatchTransformer):
    """A diffusion transformer conditioned on timesteps and a context of any length.

    The context is seen by attention, and its mean by the adaptive norms. A context of length 0 is
    none at all, which is what guidance compares with.

    Args:
        input_size, patch_size, in_channels: as of :class:`mmfast.models.DiT`.
        hidden_size: C, of the tokens.
        depth: number of blocks.
        num_heads: H.
        mlp_ratio: of the MLPs' hidden size to C.
        conditioning: ``"cross"``: attention to the context in every block (PixArt);
            ``"joint"``: image and context attend to each other (SD3).
        context_codes: K, for contexts of ids: characters, tokens of a text, codes of a VQ-VAE.
        context_dim: for contexts of vectors, in its place.
        context_size: the longest context, or the sizes of a grid of 1 to 3 dimensions, whose
            places it keeps: ``(8, 8)`` for the codes of an image.
        context_dropout_prob: of a context in training, for guidance.
        learn_sigma: twice ``in_channels`` come out: the prediction and the variance's.
        qk_norm: of :class:`mmfast.nn.SelfAttention`: ``"none"`` or ``"rms"``.

    Raises:
        ValueError: not one of ``context_codes`` and ``context_dim`` was given, or sizes do not fit.

    Source: Chen et al., "PixArt-alpha" (2023), sec. 2.3; Esser et al., "Scaling Rectified Flow
    Transformers for High-Resolution Image Synthesis" (2024), sec. 4, also for the mean.
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 32,
        patch_size: int | Sequence[int] = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        *,
        conditioning: str = "cross",
        context_codes: int | None = None,
        context_dim: int | None = None,
        context_size: int | Sequence[int] = 77,
        context_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        qk_norm: str = "none",
    ) -> None:
        check_choice("conditioning", conditioning, CONDITIONING)
        if (context_codes is None) == (context_dim is None):
            raise ValueError("one of context_codes and context_dim must be given")
        super().__init__(input_size, patch_size, in_channels, hidden_size, learn_sigma)
        self.context_size = (
            (context_size,) if isinstance(context_size, int) else tuple(context_size)
        )
        self.context_dim, self.context_dropout_prob = context_dim, context_dropout_prob
        self.context_pos_embed = places(self.context_size, hidden_size)
        self.context_embedder: nn.Module
        if context_codes is not None:
            self.context_embedder = nn.Embedding(context_codes, hidden_size)
            nn.init.normal_(self.context_embedder.weight, std=1.0)
        else:
            assert context_dim is not None
            self.context_embedder = nn.Linear(context_dim, hidden_size)
        self.pooled_embedder = MLP(hidden_size, hidden_size, activation="silu")
        self.joint = conditioning == "joint"
        self.blocks = nn.ModuleList()
        for i in range(depth):
            if self.joint:
                self._add_joint(hidden_size, num_heads, mlp_ratio, qk_norm, i == depth - 1)
            else:
                self._add_cross(hidden_size, num_heads, mlp_ratio, qk_norm)
        if not self.joint:
            self.t_block = modulation(hidden_size, 6)  # adaLN-single: of all blocks
            zero(self.t_block)

    def _add_joint(self, dim: int, heads: int, ratio: float, qk_norm: str, last: bool) -> None:
        block = JointTransformerBlock(dim, heads, ratio, qk_norm=qk_norm, text_ends=last)
        xavier(block)
        zero(block.image.adaLN_modulation, block.text.adaLN_modulation)
        self.blocks.append(block)

    def _add_cross(self, dim: int, heads: int, ratio: float, qk_norm: str) -> None:
        block = CrossAttentionBlock(dim, heads, int(dim * ratio), qk_norm=qk_norm)
        xavier(block)
        zero(block.cross_attn.proj)
        nn.init.zeros_(block.scale_shift_table)
        self.blocks.append(block)

    def for_guidance(self, context: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """What ``forward`` takes for a batch twice as long, whose first half has no context."""
        lengths = self._lengths(context, lengths)
        return {
            "context": torch.cat([context, context]),
            "lengths": torch.cat([torch.zeros_like(lengths), lengths]),
        }

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        lengths: Tensor | None = None,
        *,
        drop: Tensor | None = None,
    ) -> Tensor:
        """The prediction.

        Args:
            x: noisy samples, ``(B, in_channels, *input_size)``.
            t: timesteps, ``(B,)``, whole or not.
            context: ids ``(B, S)``, int64, or vectors ``(B, S, context_dim)``; of a grid, with its
                dimensions in S's place. S is at most the length of ``context_size``.
            lengths: ``(B,)``, int64: of the contexts; what is behind is not attended to, but must
                be finite. All S where None.
            drop: ``(B,)``, bool: which contexts to drop; drawn in training by default.

        Returns:
            ``(B, in_channels, *input_size)``, twice the channels with ``learn_sigma``.

        Raises:
            TypeError: a tensor has another dtype.
            ValueError: x, context or lengths have another shape.
        """
        lengths = self._lengths(context, lengths)
        probability = self.context_dropout_prob
        if drop is None and self.training and probability > 0:
            drop = torch.rand(lengths.shape, device=lengths.device) < probability
        if drop is not None:
            lengths = torch.where(drop, 0, lengths)
        text = self._embedded(context)
        there = torch.arange(text.shape[1], device=text.device) < lengths[:, None]  # [B, S]
        shares = there.to(text.dtype) / lengths.clamp(min=1)[:, None]
        pooled = (shares[:, :, None] * text).sum(1)
        c = self.t_embedder(t) + self.pooled_embedder(pooled)
        tokens = self.tokens(x)
        if self.joint:
            for block in self.blocks:
                run = repeatable(block, self.gradient_checkpointing)
                tokens, text = run(tokens, text, c, text_lengths=lengths)
        else:
            parts = self.t_block(c).unflatten(-1, (6, -1))
            for block in self.blocks:
                run = repeatable(block, self.gradient_checkpointing)
                tokens = run(tokens, text, parts, context_mask=there)
        return self.untokened(self.final_layer(tokens, c))

    def _lengths(self, context: Tensor, lengths: Tensor | None) -> Tensor:
        """Checked; those of all the context if not given."""
        if self.context_dim is None:
            check_dtype("context", context, INDEX)
        else:
            check_floating("context", context)
        batch, sizes = context.shape[0], context.shape[1:]
        if self.context_dim is not None:
            sizes = sizes[:-1]
        many, expected = len(self.context_size) > 1, self.context_size
        fits = tuple(sizes) == expected if many else len(sizes) == 1 and sizes[0] <= expected[0]
        if not fits or (self.context_dim is not None and context.shape[-1] != self.context_dim):
            dims = ["B", *map(str, expected)] if many else ["B", f"S <= {expected[0]}"]
            dims += [] if self.context_dim is None else [str(self.context_dim)]
            raise ValueError(f"context must be ({', '.join(dims)}), got {tuple(context.shape)}")
        if lengths is None:
            return torch.full((batch,), math.prod(sizes), dtype=torch.int64, device=context.device)
        check_dtype("lengths", lengths, INDEX)
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must be (B,) = ({batch},), got {tuple(lengths.shape)}")
        return lengths

    def _embedded(self, context: Tensor) -> Tensor:
        """``(B, S, C)``."""
        vectors = self.context_embedder(context.flatten(1, len(self.context_size)))
        return vectors + self.context_pos_embed[:, : vectors.shape[1]]
