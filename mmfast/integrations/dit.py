"""facebookresearch/DiT: its ``DiTBlock`` and ``FinalLayer``, and the copies in other projects.

The model is no package, and its attention and MLP are timm's. A copy is known by its class's name
and attributes, and trusted only after ``rehearsal`` found no difference.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmfast.integrations.attention import scaled_dot_product_attention
from mmfast.integrations.binding import Library, Method, Swap, is_bound, own_class
from mmfast.integrations.norms import is_computed, kind_of, modulated, next_branch
from mmfast.integrations.rehearsal import block_difference
from mmfast.integrations.residuals import add
from mmfast.nn.adaptive_norm import conditioned
from mmfast.nn.layers import is_bare, is_plain, linear
from mmfast.nn.whole_block import whole_block


class DiTBlock:
    """A block with adaLN-Zero."""

    attributes = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")

    def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, L, C) from tokens and the condition (B, C)."""
        modulation = conditioned(self.adaLN_modulation, c)
        made = _whole(self, x, modulation)
        if made is not None:
            return made
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        normed = modulated(self.norm1, x, shift, scale)
        y = _attended(self.attn, normed)
        x, normed = next_branch(self.norm2, x, gate, y, shift_mlp, scale_mlp)
        return add(x, gate_mlp, _fed_forward(self.mlp, normed))


class FinalLayer:
    """The last norm and projection."""

    attributes = ("norm_final", "linear", "adaLN_modulation")

    def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
        """Patches (B, L, P) from tokens (B, L, C) and the condition (B, C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final, x, shift, scale))


def _whole(block: Any, x: Tensor, modulation: Tensor) -> Tensor | None:
    """The block as a single op, if its parts do nothing else."""
    attn = block.attn
    first, act, last = _layers(block.mlp)
    if first is None or not _is_timms(attn):
        return None
    for norm in (block.norm1, block.norm2):
        if not is_computed(norm) or kind_of(norm) != "layer" or norm.weight is not None:
            return None
    # Of timm's attention, what there may be besides its two layers.
    for name in ("q_norm", "k_norm", "norm", "attn_drop", "proj_drop"):
        part = getattr(attn, name, None)
        if isinstance(part, nn.Module) and not _does_nothing(part):
            return None
    return whole_block(
        x,
        modulation,
        (attn.qkv, attn.proj, first, last),
        num_heads=attn.num_heads,
        scale=attn.scale,
        eps=block.norm1.eps,
        mlp_eps=block.norm2.eps,
        activation=_activation(act),
    )


def _is_timms(attn: Any) -> bool:
    """Whether a call of timm's ``Attention`` is no more than its class's forward."""
    own = "forward" not in vars(attn) or is_bound(attn, "forward")
    return own and is_bare(attn) and "qkv" in attn._modules


def _attended(attn: Any, x: Tensor) -> Tensor:
    """timm's ``Attention``, or a call of it where that is more than its class's forward."""
    if not _is_timms(attn):
        return attn(x)
    q, k, v = linear(attn.qkv, x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    for name in ("q_norm", "k_norm"):
        norm = getattr(attn, name, None)
        if isinstance(norm, nn.Module):
            q, k = (norm(q), k) if name == "q_norm" else (q, norm(k))
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale)
    out = out.transpose(1, 2).flatten(2)
    norm = getattr(attn, "norm", None)
    if isinstance(norm, nn.Module):
        out = norm(out)
    return attn.proj_drop(linear(attn.proj, out))


def _fed_forward(mlp: Any, x: Tensor) -> Tensor:
    """timm's ``Mlp``, or a sequence of the same; any other runs as it is."""
    first, act, last = _layers(mlp)
    if first is None:
        return mlp(x)
    return linear(last, linear(first, x), _activation(act))


def _activation(act: nn.GELU) -> str:
    return "gelu" if act.approximate == "none" else "gelu_tanh"


def _layers(mlp: Any) -> tuple[Any, Any, Any]:
    """Its linear layers and the GELU between them; None three times if there is more to it."""
    if is_plain(mlp, nn.Sequential) and len(mlp) == 3:
        first, act, last = mlp
    elif type(mlp).__name__ == "Mlp" and is_plain(mlp, type(mlp)):
        first, act, last = (getattr(mlp, name, None) for name in ("fc1", "act", "fc2"))
        between = [c for n, c in mlp.named_children() if n not in ("fc1", "act", "fc2")]
        if any(not _does_nothing(child) for child in between):
            return None, None, None
    else:
        return None, None, None
    known = isinstance(act, nn.GELU) and is_plain(act, nn.GELU)
    return (first, act, last) if known else (None, None, None)


def _does_nothing(module: nn.Module) -> bool:
    if is_plain(module, nn.Identity):
        return True
    return is_plain(module, nn.Dropout) and not (module.training and module.p)


_OURS: tuple[Any, ...] = (DiTBlock, FinalLayer)


def _match(module: nn.Module) -> Any:
    for ours in _OURS:
        if own_class(module).__name__ == ours.__name__ and all(
            hasattr(module, n) for n in ours.attributes
        ):
            return ours
    return None


def matches(module: nn.Module) -> bool:
    return _match(module) is not None


def swap(module: nn.Module) -> Swap:
    ours = _match(module)
    reasons = block_difference(module, ours.forward)
    if reasons:
        return Swap(left="; ".join(reasons))
    done = (
        "attention, MLP, gates, norms and modulation" if ours is DiTBlock else "norm and modulation"
    )
    return Swap((Method(module, type(module), ours.forward),), done=done)


LIBRARY = Library("DiT", tuple(ours.__name__ for ours in _OURS), matches, swap)
