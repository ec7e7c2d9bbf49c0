"""DiT: class-conditional diffusion transformers for signals, images and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.models.patches import PatchTransformer, xavier
from mmfast.models.repeating import repeatable
from mmfast.nn.adaptive_norm import zero
from mmfast.nn.dit_block import DiTBlock
from mmfast.nn.embedders import LabelEmbedder, sincos_positions
from mmfast.nn.weights import dit_from_diffusers, dit_to_diffusers

SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


class DiT(PatchTransformer):
    """A diffusion transformer with adaLN-Zero blocks, conditioned on timesteps and class labels.

    Its parameters have the names of facebookresearch/DiT; :meth:`load_state_dict` also takes the
    weights of diffusers' ``DiTTransformer2DModel``.

    Args:
        input_size: of an image's sides; or the sizes of 1, 2 or 3 dimensions.
        patch_size: one number, or one for each dimension.
        in_channels: of the images.
        hidden_size: C, of the tokens.
        depth: number of blocks.
        num_heads: H.
        mlp_ratio: of the MLPs' hidden size to C.
        class_dropout_prob: of a label in training, for classifier-free guidance.
        num_classes: of the labels.
        learn_sigma: twice ``in_channels`` come out: the prediction and the variance's.
        mlp_eps: of the norms before the MLPs; 1e-5 in diffusers' DiT.
        downscale_freq_shift: of :func:`mmfast.timestep_embedding`; 1 in diffusers' DiT.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023).
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 32,
        patch_size: int | Sequence[int] = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        mlp_eps: float = 1e-6,
        downscale_freq_shift: float = 0.0,
    ) -> None:
        super().__init__(
            input_size,
            patch_size,
            in_channels,
            hidden_size,
            learn_sigma,
            downscale_freq_shift=downscale_freq_shift,
        )
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, mlp_eps=mlp_eps) for _ in range(depth)
        )
        xavier(*self.blocks)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            zero(block.adaLN_modulation)

    @classmethod
    def named(cls, name: str, **options: Any) -> DiT:
        """``"DiT-XL/2"`` and the like: S, B, L or XL, and any patch size.

        Raises:
            ValueError: there is no such size.
        """
        size, _, patch = name.removeprefix("DiT-").partition("/")
        if size not in SIZES or not patch.isdigit():
            raise ValueError(f"name must be DiT-S/2, one of {', '.join(SIZES)}, got {name!r}")
        return cls(**{"patch_size": int(patch), **SIZES[size], **options})

    @classmethod
    def from_diffusers(cls, model: Any) -> DiT:
        """The same model as diffusers' ``DiTTransformer2DModel``, with its weights.

        Raises:
            ValueError: it has options that DiT has not.
        """
        given = model.config
        for option, value in (
            ("activation_fn", "gelu-approximate"),
            ("norm_elementwise_affine", False),
            ("attention_bias", True),
        ):
            if given[option] != value:
                raise ValueError(f"{option} must be {value!r}, got {given[option]!r}")
        channels = given["in_channels"]
        out = given["out_channels"] or channels
        if out not in (channels, 2 * channels):
            raise ValueError(f"out_channels must be in_channels or twice as many, got {out}")
        made = cls(
            given["sample_size"],
            given["patch_size"],
            channels,
            given["num_attention_heads"] * given["attention_head_dim"],
            given["num_layers"],
            given["num_attention_heads"],
            num_classes=given["num_embeds_ada_norm"],
            learn_sigma=out == 2 * channels,
            mlp_eps=given["norm_eps"],
            downscale_freq_shift=1.0,
        )
        parameter = next(model.parameters())
        made.to(parameter.device, parameter.dtype)
        made.load_state_dict(model.state_dict())
        return made

    def to_diffusers(self) -> Any:
        """The inverse of :meth:`from_diffusers`: a ``DiTTransformer2DModel`` with these weights.

        Raises:
            ValueError: diffusers' model cannot do the same.
        """
        import diffusers

        first = self.blocks[0] if len(self.blocks) else None
        if not isinstance(first, DiTBlock):
            raise ValueError("diffusers' DiT needs at least one block")
        dim, hidden = first.attn.dim, first.mlp.fc1.out_features
        for what, got, wanted in (
            ("dimensions of equal sizes", self.input_size, self.input_size[:1] * 2),
            ("patches of equal sides", self.patch_size, self.patch_size[:1] * 2),
            ("an MLP's hidden size", hidden, 4 * dim),
            ("downscale_freq_shift", self.t_embedder.downscale_freq_shift, 1.0),
            ("labels that are dropped", self.y_embedder.dropout_prob > 0, True),
        ):
            if got != wanted:
                raise ValueError(f"diffusers' DiT has {what}: {wanted}, got {got}")
        placed = sincos_positions(self.grid, dim).to(self.pos_embed)
        if not torch.allclose(self.pos_embed[0], placed, atol=1e-3):
            raise ValueError("diffusers' DiT has sines and cosines as pos_embed, this one others")
        made: Any = diffusers.DiTTransformer2DModel(
            num_attention_heads=first.attn.num_heads,
            attention_head_dim=dim // first.attn.num_heads,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            num_layers=len(self.blocks),
            sample_size=self.input_size[0],
            patch_size=self.patch_size[0],
            num_embeds_ada_norm=self.y_embedder.num_classes,
            norm_eps=first.mlp_eps,
        )
        made.to(self.pos_embed.device, self.pos_embed.dtype).train(self.training)
        made.load_state_dict(self.diffusers_state_dict())
        return made

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As every module has it; the names may be diffusers', which do not hold ``pos_embed``."""
        if any(name.startswith("transformer_blocks.") for name in state_dict):
            state_dict = {"pos_embed": self.pos_embed.data, **dit_from_diffusers(state_dict)}
        return super().load_state_dict(state_dict, strict, assign)

    def diffusers_state_dict(self) -> dict[str, Tensor]:
        """The weights by the names of diffusers' ``DiTTransformer2DModel``."""
        return dit_to_diffusers(self.state_dict())

    def for_guidance(self, y: Tensor) -> dict[str, Tensor]:
        """What ``forward`` takes for a batch twice as long, whose first half is of no class.

        Args:
            y: labels, ``(B,)``.

        Raises:
            ValueError: the model was built without ``class_dropout_prob``.
        """
        self._check_null()
        return {"y": torch.cat([torch.full_like(y, self.y_embedder.num_classes), y])}

    def _check_null(self) -> None:
        if self.y_embedder.dropout_prob <= 0:
            raise ValueError("the label of no class needs class_dropout_prob above 0, got 0")

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, drop: Tensor | None = None
    ) -> Tensor:
        """The prediction.

        Args:
            x: noisy samples, ``(B, in_channels, *input_size)``.
            t: timesteps, ``(B,)``, whole or not.
            y: labels, ``(B,)``, int64; all of no class where None.
            drop: which labels to drop, ``(B,)``, bool; drawn in training by default.

        Returns:
            ``(B, in_channels, *input_size)``, twice the channels with ``learn_sigma``.

        Raises:
            TypeError: y are no integers.
            ValueError: x, t or y have another shape, or a label on the CPU is none.
        """
        if y is None:
            self._check_null()
            y = t.new_full((len(t),), self.y_embedder.num_classes, dtype=torch.int64)
        for name, given in (("t", t), ("y", y)):
            if given.shape != x.shape[:1]:
                raise ValueError(f"{name} must be (B,) = ({x.shape[0]},), got {tuple(given.shape)}")
        c = self.t_embedder(t) + self.y_embedder(y, drop)
        tokens, pending = self.tokens(x), None
        for block in self.blocks:
            run = repeatable(block, self.gradient_checkpointing)
            tokens, pending = run(tokens, c, pending, defer=True)
        return self.untokened(self.final_layer(tokens, c, pending))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """The prediction with classifier-free guidance, of all channels as in diffusers.

        facebookresearch/DiT guides the first three alone.

        Args:
            x, t, y: of a batch whose second half has the labels ``num_classes``; of x, the first
                half is taken for both.
            cfg_scale: 1 is none.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        prediction, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        conditional, unconditional = prediction.chunk(2)
        guided = torch.lerp(unconditional, conditional, cfg_scale)
        return torch.cat([torch.cat([guided, guided]), rest], 1)
