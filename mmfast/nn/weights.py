"""Weights of diffusers' transformer blocks, by the names of mmfast's, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

# Layers by their names: here, and in diffusers.
_MLP = {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
_MERGED = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v")}
_DIT_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", **_MLP}


def _part(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries under ``prefix``, without it."""
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}


def _renamed(
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    merged: Mapping[str, tuple[str, ...]],
) -> State:
    """By mmfast's names. ``merged``: layers that are several in diffusers, one behind the other.

    Raises:
        KeyError: a weight is missing.
    """
    result = {}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                result[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
        if f"{ours}.weight" not in result:
            raise KeyError(f"{theirs}.weight is missing")
    for ours, parts in merged.items():
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in state or kind == "weight":
                result[f"{ours}.{kind}"] = torch.cat([state[f"{part}.{kind}"] for part in parts])
    return result


def dit_block_from_diffusers(state: Mapping[str, Tensor]) -> State:
    """For :class:`mmfast.nn.DiTBlock`, from a ``BasicTransformerBlock`` with ``ada_norm_zero``."""
    return _renamed(state, _DIT_BLOCK, _MERGED)


def dit_block_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """The inverse of :func:`dit_block_from_diffusers`, without the embedders of ``norm1.emb``."""
    result: State = {}
    for name, t in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in _MERGED:
            parts = zip(_MERGED[layer], t.chunk(3), strict=True)
            result |= {f"{theirs}.{kind}": part.clone() for theirs, part in parts}
        else:
            result[f"{_DIT_BLOCK[layer]}.{kind}"] = t
    return result


def joint_block_from_diffusers(state: Mapping[str, Tensor]) -> State:
    """For :class:`mmfast.nn.JointTransformerBlock`, from diffusers' block of this name or Flux's.

    Args:
        state: of a ``JointTransformerBlock`` without dual attention, or a
            ``FluxTransformerBlock``.
    """
    result: State = {}
    for stream, norm, suffix, qkv, out, q_norm, k_norm in (
        ("image", "norm1", "", ("to_q", "to_k", "to_v"), "to_out.0", "norm_q", "norm_k"),
        (
            "text", "norm1_context", "_context", ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out", "norm_added_q", "norm_added_k",
        ),
    ):  # fmt: skip
        names = {"adaLN_modulation.1": f"{norm}.linear"}
        ends = f"ff{suffix}.net.2.weight" not in state
        if not ends:
            names |= {
                "attn.proj": f"attn.{out}",
                "mlp.fc1": f"ff{suffix}.net.0.proj",
                "mlp.fc2": f"ff{suffix}.net.2",
            }
        if f"attn.{q_norm}.weight" in state:
            names |= {"attn.q_norm": f"attn.{q_norm}", "attn.k_norm": f"attn.{k_norm}"}
        part = _renamed(state, names, {"attn.qkv": tuple(f"attn.{name}" for name in qkv)})
        if ends:
            # Scale and shift are the other way round there.
            for kind in ("weight", "bias"):
                scale, shift = part[f"adaLN_modulation.1.{kind}"].chunk(2)
                part[f"adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        result |= {f"{stream}.{name}": t for name, t in part.items()}
    return result


def cross_attention_block_from_diffusers(state: Mapping[str, Tensor]) -> State:
    """For :class:`mmfast.nn.CrossAttentionBlock`, from a block of diffusers' PixArt or Wan.

    Args:
        state: of a ``BasicTransformerBlock`` with ``ada_norm_single``, or of a
            ``WanTransformerBlock`` without image conditioning.
    """
    wan = "ffn.net.2.weight" in state
    ff = "ffn" if wan else "ff"
    names = {
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q": "attn2.to_q",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.fc1": f"{ff}.net.0.proj",
        "mlp.fc2": f"{ff}.net.2",
    }
    for ours, theirs in (("attn", "attn1"), ("cross_attn", "attn2")):
        if f"{theirs}.norm_q.weight" in state:
            names |= {f"{ours}.q_norm": f"{theirs}.norm_q", f"{ours}.k_norm": f"{theirs}.norm_k"}
    if wan and "norm2.weight" in state:
        names["norm"] = "norm2"
    merged = _MERGED | {"cross_attn.kv": ("attn2.to_k", "attn2.to_v")}
    result = _renamed(state, names, merged)
    table = state["scale_shift_table"]
    return result | {"scale_shift_table": table.reshape(table.shape[-2:])}


def dit_from_diffusers(state: Mapping[str, Tensor]) -> State:
    """For :class:`mmfast.models.DiT`, from a ``DiTTransformer2DModel``; without ``pos_embed``.

    Raises:
        KeyError: a weight is missing.
        ValueError: the blocks embed timesteps or labels each in its own way.
    """
    blocks = "transformer_blocks."
    depth = 1 + max((int(n.split(".")[1]) for n in state if n.startswith(blocks)), default=-1)
    if depth == 0:
        raise KeyError("transformer_blocks.0 is missing")
    embedders = [_part(state, f"{blocks}{i}.norm1.emb.") for i in range(depth)]
    for name, t in embedders[0].items():
        if any(not torch.equal(t, other[name]) for other in embedders[1:]):
            raise ValueError(f"blocks have different norm1.emb.{name}: DiT has one for all")
    result = {f"x_embedder.proj.{kind}": t for kind, t in _part(state, "pos_embed.proj.").items()}
    names = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    result |= _renamed(embedders[0], names, {})
    for i in range(depth):
        block = dit_block_from_diffusers(_part(state, f"{blocks}{i}."))
        result |= {f"blocks.{i}.{name}": t for name, t in block.items()}
    last = {"final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
    return result | _renamed(state, last, {})


def dit_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """The inverse of :func:`dit_from_diffusers`: every block gets the embedders."""
    result = {f"pos_embed.proj.{kind}": t for kind, t in _part(state, "x_embedder.proj.").items()}
    embedders = {
        "timestep_embedder.linear_1": _part(state, "t_embedder.mlp.0."),
        "timestep_embedder.linear_2": _part(state, "t_embedder.mlp.2."),
        "class_embedder.embedding_table": _part(state, "y_embedder.embedding_table."),
    }
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    for i in range(depth):
        block = dit_block_to_diffusers(_part(state, f"blocks.{i}."))
        block |= {
            f"norm1.emb.{layer}.{kind}": t
            for layer, kinds in embedders.items()
            for kind, t in kinds.items()
        }
        result |= {f"transformer_blocks.{i}.{name}": t for name, t in block.items()}
    for theirs, ours in (
        ("proj_out_1", "final_layer.adaLN_modulation.1."),
        ("proj_out_2", "final_layer.linear."),
    ):
        result |= {f"{theirs}.{kind}": t for kind, t in _part(state, ours).items()}
    return result
