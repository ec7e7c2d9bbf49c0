"""diffusers: transformer blocks with their gates, residuals, norms and modulation in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations.binding import Library, Method, Swap, loaded_class
from mmfast.integrations.norms import kind_of, modulated, next_branch
from mmfast.integrations.residuals import add

_HALF = 65504.0  # the largest number of float16


def _fed(block: Any, feed_forward: nn.Module, x: Tensor) -> Tensor:
    """What a feed-forward makes of x, in chunks where the block was told so."""
    size = getattr(block, "_chunk_size", None)
    if size is None:
        return feed_forward(x)
    dim = block._chunk_dim
    if x.shape[dim] % size:
        raise ValueError(
            f"dimension {dim} of the hidden states, {x.shape[dim]}, must be a multiple of the "
            f"chunk size {size}; unset it by set_chunk_feed_forward(None)"
        )
    return torch.cat([feed_forward(part) for part in x.split(size, dim)], dim=dim)


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-_HALF, _HALF) if x.dtype == torch.float16 else x


class BasicTransformerBlock:
    """With adaLN-Zero, as DiT has it, or adaLN-single, as PixArt has it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Tokens (B, L, C)."""
        given = dict(cross_attention_kwargs or {})
        if "gligen" in given or hidden_states.ndim != 3:
            return type(self).forward(
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        x = hidden_states
        if self.norm_type == "ada_norm_zero":
            normed, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(
                x, timestep, class_labels, hidden_dtype=x.dtype
            )
        else:
            assert timestep is not None
            table = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
            normed = modulated(self.norm1, x, shift, scale)
        if self.pos_embed is not None:
            normed = self.pos_embed(normed)
        y = self.attn1(
            normed,
            encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
            attention_mask=attention_mask,
            **given,
        )
        last = self.norm3 if self.norm_type == "ada_norm_zero" else self.norm2
        if self.attn2 is None:
            x, normed = next_branch(last, x, gate, y, shift_mlp, scale_mlp)
        else:
            x = add(x, gate, y)
            query = x if self.norm_type == "ada_norm_single" else self.norm2(x)
            if self.pos_embed is not None and self.norm_type != "ada_norm_single":
                query = self.pos_embed(query)
            x = x + self.attn2(
                query,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **given,
            )
            normed = modulated(last, x, shift_mlp, scale_mlp)
        return add(x, gate_mlp, _fed(self, self.ff, normed))


class JointTransformerBlock:
    """Of Stable Diffusion 3."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Text tokens, None after the last block, and image tokens (B, L, C)."""
        given = joint_attention_kwargs or {}
        x, text = hidden_states, encoder_hidden_states
        normed, gate, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(x, emb=temb)
        if self.context_pre_only:
            normed_text = self.norm1_context(text, temb)
        else:
            normed_text, *of_text = self.norm1_context(text, emb=temb)
        y, text_y = self.attn(hidden_states=normed, encoder_hidden_states=normed_text, **given)
        if self.use_dual_attention:
            normed2, gate2 = second
            x = add(x, gate, y)
            gate, y = gate2, self.attn2(hidden_states=normed2, **given)
        x, normed = next_branch(self.norm2, x, gate, y, shift_mlp, scale_mlp)
        x = add(x, gate_mlp, _fed(self, self.ff, normed))
        if self.context_pre_only:
            return None, x
        gate, shift_mlp, scale_mlp, gate_mlp = of_text
        text, normed = next_branch(self.norm2_context, text, gate, text_y, shift_mlp, scale_mlp)
        return add(text, gate_mlp, _fed(self, self.ff_context, normed)), x


class FluxTransformerBlock:
    """Of Flux, with two streams."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text tokens and image tokens (B, L, C)."""
        x, text = hidden_states, encoder_hidden_states
        normed, *of_image = self.norm1(x, emb=temb)
        normed_text, *of_text = self.norm1_context(text, emb=temb)
        y, text_y, *adapter = self.attn(
            hidden_states=normed,
            encoder_hidden_states=normed_text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        gate, shift_mlp, scale_mlp, gate_mlp = of_image
        x, normed = next_branch(self.norm2, x, gate, y, shift_mlp, scale_mlp)
        x = add(x, gate_mlp, self.ff(normed))
        if adapter:
            x = x + adapter[0]
        gate, shift_mlp, scale_mlp, gate_mlp = of_text
        text, normed = next_branch(self.norm2_context, text, gate, text_y, shift_mlp, scale_mlp)
        text = add(text, gate_mlp, self.ff_context(normed))
        return _clipped(text), x


class FluxSingleTransformerBlock:
    """Of Flux, with one stream."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text tokens and image tokens (B, L, C)."""
        length = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(x, emb=temb)
        hidden = self.act_mlp(self.proj_mlp(normed))
        y = self.attn(
            hidden_states=normed,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x = add(x, gate, self.proj_out(torch.cat([y, hidden], dim=2)))
        x = _clipped(x)
        return x[:, :length], x[:, length:]


class WanTransformerBlock:
    """Of Wan: modulation in float32, per sample or per token."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
    ) -> Tensor:
        """Tokens (B, L, C)."""
        x = hidden_states
        per_token = temb.ndim == 4
        table = self.scale_shift_table.unsqueeze(0) if per_token else self.scale_shift_table
        parts = (table + temb.float()).chunk(6, dim=2 if per_token else 1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            part.squeeze(2) if per_token else part for part in parts
        )
        y = self.attn1(modulated(self.norm1, x, shift, scale), None, None, rotary_emb)
        if isinstance(self.norm2, nn.Identity):
            x = normed = add(x, gate, y)
        else:
            x, normed = next_branch(self.norm2, x, gate, y)
        x = x + self.attn2(normed, encoder_hidden_states, None, None)
        normed = modulated(self.norm3, x, shift_mlp, scale_mlp)
        return add(x, gate_mlp, self.ffn(normed))


# Class: the library's file, what takes the place of its forward, and the norms that this computes.
_BLOCKS: dict[str, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    "BasicTransformerBlock": ("attention", BasicTransformerBlock.forward, ("norm1", "norm3")),
    "JointTransformerBlock": (
        "attention",
        JointTransformerBlock.forward,
        ("norm2", "norm2_context"),
    ),
    "FluxTransformerBlock": (
        "transformers.transformer_flux",
        FluxTransformerBlock.forward,
        ("norm2", "norm2_context"),
    ),
    "FluxSingleTransformerBlock": (
        "transformers.transformer_flux",
        FluxSingleTransformerBlock.forward,
        (),
    ),
    "WanTransformerBlock": (
        "transformers.transformer_wan",
        WanTransformerBlock.forward,
        ("norm1", "norm3"),
    ),
}
_TYPES = ("ada_norm_zero", "ada_norm_single")  # of BasicTransformerBlock


def _match(module: nn.Module) -> tuple[Method, tuple[str, ...]] | None:
    for name, (file, function, norms) in _BLOCKS.items():
        theirs = loaded_class(f"diffusers.models.{file}", name)
        if isinstance(module, theirs):
            return Method(module, theirs, function), norms
    return None


def _norms(module: Any, names: tuple[str, ...]) -> list[nn.Module]:
    """The norms of a block that its forward computes by itself."""
    if getattr(module, "norm_type", None) == "ada_norm_single":
        names = ("norm1", "norm2")
    elif getattr(module, "norm_type", None) == "ada_norm_zero":
        names = ("norm3",)
    found = [getattr(module, name, None) for name in names]
    return [norm for norm in found if norm is not None]


def matches(module: nn.Module) -> bool:
    return _match(module) is not None


def swap(module: nn.Module) -> Swap:
    match = _match(module)
    assert match is not None  # it matched
    method, names = match
    kind = getattr(module, "norm_type", None)
    if type(module).__name__ == "BasicTransformerBlock" and kind not in _TYPES:
        return Swap(left=f"its norm_type is {kind!r}; {' and '.join(_TYPES)} are swapped")
    strange = [type(n).__name__ for n in _norms(module, names) if kind_of(n) is None]
    if strange:
        return Swap(left=f"its norms are {', '.join(strange)}")
    return Swap((method,), done="gates, residuals, norms and modulation")


LIBRARY = Library("diffusers", tuple(_BLOCKS), matches, swap)
