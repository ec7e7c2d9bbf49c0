"""diffusers: calls of attention processors that norm, rotate and attend without concatenations.

Each function takes the processor's call, which serves what ours does not, and returns ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import mmfast
from mmfast.integrations.attention import objections, scaled_dot_product_attention
from mmfast.integrations.norms import is_computed, kind_of, options
from mmfast.regions import autocast_dtype

Call = Callable[..., Any]


def _ours(processor: Any, attn: Any, *tokens: Tensor | None) -> bool:
    """Whether a call is one that these functions were written for."""
    module = sys.modules.get("diffusers.models.attention_dispatch")
    if module is not None and hasattr(processor, "_attention_backend"):
        native = module.AttentionBackendName.NATIVE
        chosen = processor._attention_backend
        if chosen is None:
            chosen = module._AttentionBackendRegistry.get_active_backend()[0]
        if chosen != native or processor._parallel_config is not None:
            return False
    x = tokens[0]
    assert x is not None
    if autocast_dtype(x.device.type) is not None or objections(x, x, x):
        return False
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    norms = [getattr(attn, name, None) for name in names]
    return all(n is None or is_computed(n) for n in norms)


def _normed(
    q: Tensor,
    k: Tensor,
    norm_q: nn.Module | None,
    norm_k: nn.Module | None,
    rotary: tuple[Tensor, Tensor] | None,
    across_heads: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, L, H, E) after their norms and their rotation."""
    cos, sin = (None, None) if rotary is None else rotary
    if norm_q is None or norm_k is None:
        if rotary is None:
            return q, k
        out_q, out_k = mmfast.qk_norm_rope(q, k, cos=cos, sin=sin, norm="none")
    else:
        of_q, of_k = options(norm_q, q), options(norm_k, k)
        out_q, out_k = mmfast.qk_norm_rope(
            q,
            k,
            of_q["weight"],
            of_k["weight"],
            cos,
            sin,
            norm=of_q["norm"],
            bias_q=of_q["bias"],
            bias_k=of_k["bias"],
            eps=of_q["eps"],
            across_heads=across_heads,
        )
    assert out_k is not None  # k was given
    return out_q, out_k


def _alike(*norms: Any) -> bool:
    """Whether norms of queries and of keys can be computed together."""
    first = norms[0]
    if any(norm is None for norm in norms):
        return all(norm is None for norm in norms)
    return all((kind_of(n), n.eps) == (kind_of(first), first.eps) for n in norms)


def _attended(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention of (B, L, H, E) tokens: (B, L, H E)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2, 3)


def _joined(
    image: tuple[Tensor, Tensor, Tensor], text: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Joint attention of (B, L, H, E) tokens: (B, L, H E) of the image, and of the text."""
    heads = [t.transpose(1, 2) for t in (*image, *text)]
    outputs = mmfast.joint_attention(*heads)
    of_image, of_text = (out.transpose(1, 2).flatten(2, 3) for out in outputs)
    return of_image, of_text


def flux(call: Call) -> Call:
    """Of ``FluxAttnProcessor``."""

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        text = encoder_hidden_states
        joint = text is not None
        if (
            attention_mask is not None
            or joint != (attn.added_kv_proj_dim is not None)
            or not _ours(self, attn, hidden_states, text)
            or not _alike(attn.norm_q, attn.norm_k)
        ):
            return call(self, attn, hidden_states, text, attention_mask, image_rotary_emb)
        if attn.fused_projections:
            parts = list(attn.to_qkv(hidden_states).chunk(3, dim=-1))
        else:
            parts = [attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)]
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
        if text is None:
            q, k = _normed(q, k, attn.norm_q, attn.norm_k, image_rotary_emb)
            return _attended(q, k, v)
        if attn.fused_projections:
            parts = list(attn.to_added_qkv(text).chunk(3, dim=-1))
        else:
            parts = [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)]
        text_q, text_k, text_v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
        first: tuple[Tensor, Tensor] | None = None
        rest: tuple[Tensor, Tensor] | None = None
        if image_rotary_emb is not None:
            length = text.shape[1]
            cos, sin = image_rotary_emb
            first, rest = (cos[:length], sin[:length]), (cos[length:], sin[length:])
        q, k = _normed(q, k, attn.norm_q, attn.norm_k, rest)
        text_q, text_k = _normed(text_q, text_k, attn.norm_added_q, attn.norm_added_k, first)
        image, text_out = _joined((q, k, v), (text_q, text_k, text_v))
        image = attn.to_out[1](attn.to_out[0](image))
        return image, attn.to_add_out(text_out)

    return __call__


def joint(call: Call) -> Call:
    """Of ``JointAttnProcessor2_0``, which Stable Diffusion 3 has."""

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        text = encoder_hidden_states
        if not _ours(self, attn, hidden_states, text) or not _alike(attn.norm_q, attn.norm_k):
            return call(self, attn, hidden_states, text, attention_mask, *args, **kwargs)
        x = hidden_states
        q, k, v = (
            to(x).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = _normed(q, k, attn.norm_q, attn.norm_k, None)
        if text is None:
            return attn.to_out[1](attn.to_out[0](_attended(q, k, v)))
        text_q, text_k, text_v = (
            to(text).unflatten(-1, (attn.heads, -1))
            for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        text_q, text_k = _normed(text_q, text_k, attn.norm_added_q, attn.norm_added_k, None)
        image, text_out = _joined((q, k, v), (text_q, text_k, text_v))
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return attn.to_out[1](attn.to_out[0](image)), text_out

    return __call__


def wan(call: Call) -> Call:
    """Of ``WanAttnProcessor``: norms across heads, and a table of cosines that repeats itself."""

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        text = encoder_hidden_states
        if (
            attn.add_k_proj is not None
            or attn.fused_projections
            or rotary_emb is None
            or not _ours(self, attn, hidden_states, text)
            or not _alike(attn.norm_q, attn.norm_k)
        ):
            return call(self, attn, hidden_states, text, attention_mask, rotary_emb)
        source = hidden_states if text is None else text
        q, k, v = (
            to(of).unflatten(2, (attn.heads, -1))
            for to, of in (
                (attn.to_q, hidden_states),
                (attn.to_k, source),
                (attn.to_v, source),
            )
        )
        cos, sin = (table.flatten(0, -2) for table in rotary_emb)  # (1, L, 1, E) there
        q, k = _normed(q, k, attn.norm_q, attn.norm_k, (cos, sin), across_heads=True)
        return attn.to_out[1](attn.to_out[0](_attended(q, k, v, attention_mask)))

    return __call__
