"""Blocks of diffusion transformers against diffusers' with the same weights, all random."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from test_models_dit import randomise
from torch import nn
from torch.nn import functional as F

import mmfast
import mmfast.nn as mnn
from mmfast.nn import weights
from mmfast.nn.adaptive_norm import conditioned, modulation

DIM, HEADS, TOKENS, TEXT = 48, 2, 12, 5


def tokens(length: int, seed: int) -> torch.Tensor:
    return normal(2, length, DIM, seed=seed, dtype=torch.float64).requires_grad_()


def assert_same(
    ours: nn.Module, theirs: nn.Module, outputs, expected, inputs, error: float = 1e-10
) -> None:
    """Outputs, and gradients of inputs and weights, the weights' as their norm."""
    torch.testing.assert_close(outputs, expected, atol=error, rtol=error)

    def gradients(module: nn.Module, results) -> tuple[list[torch.Tensor], torch.Tensor]:
        loss = sum((r * normal(*r.shape, seed=9 + i)).sum() for i, r in enumerate(results))
        parameters = list(module.parameters())
        grads = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)
        of_inputs = [g for g in grads[: len(inputs)] if g is not None]
        squares = [g.square().sum() for g in grads[len(inputs) :] if g is not None]
        return of_inputs, torch.stack(squares).sum()

    torch.testing.assert_close(
        gradients(ours, outputs), gradients(theirs, expected), atol=10 * error, rtol=10 * error
    )


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_block_of_sd3(qk_norm, ends):
    attention = pytest.importorskip("diffusers.models.attention")
    theirs = attention.JointTransformerBlock(
        DIM, HEADS, DIM // HEADS, context_pre_only=ends, qk_norm=qk_norm
    )
    randomise(theirs.double())
    ours = mnn.JointTransformerBlock(
        DIM, HEADS, qk_norm="rms" if qk_norm else "none", text_ends=ends
    ).double()
    ours.load_state_dict(weights.joint_block_from_diffusers(theirs.state_dict()))
    image, text = tokens(TOKENS, 1), tokens(TEXT, 2)
    c = normal(2, DIM, seed=3, dtype=torch.float64).requires_grad_()
    expected = theirs(image, text, c)[::-1]
    outputs = ours(image, text, c)
    assert (outputs[1] is None) == ends
    both = [[t for t in pair if t is not None] for pair in (outputs, expected)]
    # RMSNorm of diffusers squares in float32.
    assert_same(ours, theirs, *both, [image, text, c], 1e-6 if qk_norm else 1e-10)


def test_block_of_flux():
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    theirs = randomise(flux.FluxTransformerBlock(DIM, HEADS, DIM // HEADS).double())
    ours = mnn.JointTransformerBlock(DIM, HEADS, qk_norm="rms").double()
    ours.load_state_dict(weights.joint_block_from_diffusers(theirs.state_dict()))
    image, text = tokens(TOKENS, 1), tokens(TEXT, 2)
    c = normal(2, DIM, seed=3, dtype=torch.float64).requires_grad_()
    cos, sin = mmfast.rotary_tables((1, 3, 4), (8, 8, 8), dtype=torch.float64)
    text_tables = mmfast.rotary_tables(torch.zeros(TEXT, 3), (8, 8, 8), dtype=torch.float64)
    pairs = zip(text_tables, (cos, sin), strict=True)
    whole = tuple(torch.cat(pair).repeat_interleave(2, 1) for pair in pairs)
    expected = theirs(image, text, c, whole)[::-1]
    outputs = ours(image, text, c, image_tables=(cos, sin), text_tables=text_tables)
    # Tables of diffusers are rotated in float32.
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)


def test_joint_block_with_lengths():
    block = randomise(mnn.JointTransformerBlock(DIM, HEADS).double())
    image, text = tokens(TOKENS, 1), tokens(TEXT, 2)
    c = normal(2, DIM, seed=3, dtype=torch.float64)
    lengths = torch.tensor([2, 5])
    got_image, got_text = block(image, text, c, text_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        alone_image, alone_text = block(image[one], text[one, :length], c[one])
        torch.testing.assert_close(got_image[one], alone_image)
        torch.testing.assert_close(got_text[one, :length], alone_text)


def test_block_of_pixart():
    attention = pytest.importorskip("diffusers.models.attention")
    theirs = attention.BasicTransformerBlock(
        DIM, HEADS, DIM // HEADS, cross_attention_dim=DIM, attention_bias=True,
        activation_fn="gelu-approximate", norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    randomise(theirs.double())
    ours = mnn.CrossAttentionBlock(DIM, HEADS).double()
    ours.load_state_dict(weights.cross_attention_block_from_diffusers(theirs.state_dict()))
    x, text = tokens(TOKENS, 1), tokens(TEXT, 2)
    c = normal(2, 6, DIM, seed=3, dtype=torch.float64).requires_grad_()
    mask = torch.arange(TEXT) < torch.tensor([[2], [5]])
    bias = torch.where(mask, 0.0, -1e9).double()[:, None]
    expected = theirs(
        x, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=c.flatten(1)
    )
    outputs = ours(x, text, c, context_mask=mask)
    assert_same(ours, theirs, [outputs], [expected], [x, text, c])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("cross_norm", [False, True])
def test_block_of_wan(cross_norm, per_token):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    theirs = wan.WanTransformerBlock(DIM, 4 * DIM, HEADS, cross_attn_norm=cross_norm)
    randomise(theirs.double())
    ours = mnn.CrossAttentionBlock(
        DIM, HEADS, qk_norm="rms_across_heads", cross_norm=cross_norm
    ).double()
    ours.load_state_dict(weights.cross_attention_block_from_diffusers(theirs.state_dict()))
    x, text = tokens(TOKENS, 1), tokens(TEXT, 2)
    shape = (2, TOKENS, 6, DIM) if per_token else (2, 6, DIM)
    c = normal(*shape, seed=3, dtype=torch.float64)
    tables = mmfast.rotary_tables((1, 3, 4), (8, 8, 8))
    whole = tuple(t.repeat_interleave(2, 1)[None, :, None] for t in tables)
    expected = theirs(x, text, c, whole)
    # Norms and conditions are float32 there.
    torch.testing.assert_close(
        ours(x, text, c, tables=tables), expected, atol=1e-4, rtol=1e-4, check_dtype=False
    )


@pytest.mark.parametrize("frames", [0, 3])
def test_dit_block_defers(frames):
    block = randomise(mnn.DiTBlock(DIM, HEADS, qk_norm="layer", mlp_eps=1e-5).double())
    x = tokens(TOKENS, 1)
    shape = (2, frames, DIM) if frames else (2, DIM)
    c = normal(*shape, seed=3, dtype=torch.float64)
    expected = block(block(x, c), c)
    y, pending = block(x, c, defer=True)
    torch.testing.assert_close(block(y, c, pending), expected)


def test_no_values():
    """Blocks on the meta device, for which there is no autocast."""
    block = mnn.DiTBlock(48, 2).to("meta")
    x, c = torch.empty(2, 9, 48, device="meta"), torch.empty(2, 48, device="meta")
    assert block(x, c).shape == x.shape


def test_modulation_runs_what_was_put_in_its_place():
    layers = modulation(6, 2)
    c = normal(3, 6, seed=1)
    wanted = layers(c)
    torch.testing.assert_close(conditioned(layers, c), wanted)
    handle = layers[0].register_forward_hook(lambda module, given, made: made + 1)
    hooked = layers(c)
    assert (hooked - wanted).abs().max() > 0.1
    torch.testing.assert_close(conditioned(layers, c), hooked)
    handle.remove()
    layers[0] = nn.SiLU(inplace=True)
    conditioned(layers, given := c.clone())
    torch.testing.assert_close(given, F.silu(c))


@pytest.mark.parametrize("activation", ["gelu", "silu", "geglu", "geglu_tanh", "swiglu"])
def test_mlp(activation):
    mlp = mnn.MLP(7, 10, activation=activation, gate="first", out_dim=3)
    x = normal(2, 5, 7)
    hidden = mlp.fc1(x)
    run = {"silu": F.silu, "swiglu": F.silu, "gelu": F.gelu, "geglu": F.gelu}.get(
        activation, lambda x: F.gelu(x, approximate="tanh")
    )
    if "glu" in activation:
        gate, value = hidden.chunk(2, -1)
        hidden = run(gate) * value
    else:
        hidden = run(hidden)
    torch.testing.assert_close(mlp(x), mlp.fc2(hidden))
    with pytest.raises(ValueError, match="activation must be one of"):
        mnn.MLP(7, activation="relu")


def test_labels_are_dropped_in_training():
    embedder = mnn.LabelEmbedder(5, 8, 0.5)
    labels = torch.arange(5)
    table = embedder.embedding_table.weight
    assert torch.equal(embedder.eval()(labels), table[:5])
    drop = torch.tensor([True, False, True, False, False])
    assert torch.equal(embedder(labels, drop), table[[5, 1, 5, 3, 4]])
    torch.manual_seed(0)
    many = embedder.train()(torch.zeros(1000, dtype=torch.int64))
    share = (many == table[5]).all(1).float().mean()
    assert 0.4 < share < 0.6
    with pytest.raises(ValueError, match="dropout_prob above 0"):
        mnn.LabelEmbedder(5, 8, 0.0)(labels, drop)
