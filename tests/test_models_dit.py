"""mmfast.models.DiT against plain PyTorch, and against diffusers' model with the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from cases import normal
from torch import nn
from torch.nn import functional as F

import mmfast.nn as mnn
from mmfast.models import DiT
from mmfast.nn.weights import dit_from_diffusers

SMALL = {"input_size": 8, "hidden_size": 48, "depth": 3, "num_heads": 2, "num_classes": 7}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """All weights random: gates that are zero hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.5 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.2
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (scale * noise).to(parameter)
    return module


def plain(model: DiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The paper's model in plain PyTorch, from the parameters' names."""
    of = dict(model.named_parameters())

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, of[f"{name}.weight"], of[f"{name}.bias"])

    def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def attend(name: str, x: torch.Tensor) -> torch.Tensor:
        heads = linear(f"{name}.qkv", x).unflatten(-1, (3, model.blocks[0].attn.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return linear(f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))

    weight = of["x_embedder.proj.weight"]
    dims = weight.dim() - 2
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    tokens = convolution(x, weight, of["x_embedder.proj.bias"], stride=model.patch_size)
    grid = tokens.shape[2:]
    tokens = tokens.flatten(2).mT + of["pos_embed"]
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = t.double()[:, None] * frequencies
    sinusoids = torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoids)))
    c = c + of["y_embedder.embedding_table.weight"][y]
    for i in range(len(model.blocks)):
        parts = linear(f"blocks.{i}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
        branch = attend(f"blocks.{i}.attn", modulate(tokens, *parts[:2]))
        tokens = tokens + parts[2][:, None] * branch
        hidden = linear(f"blocks.{i}.mlp.fc1", modulate(tokens, *parts[3:5]))
        branch = linear(f"blocks.{i}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
        tokens = tokens + parts[5][:, None] * branch
    parts = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    tokens = linear("final_layer.linear", modulate(tokens, *parts))
    patches = tokens.view(len(x), *grid, *model.patch_size, model.out_channels)
    order = [0, 2 * dims + 1, *(axis for d in range(dims) for axis in (1 + d, 1 + dims + d))]
    return patches.permute(order).reshape(len(x), model.out_channels, *model.input_size)


def inputs(model: DiT, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    x = normal(3, model.in_channels, *model.input_size, dtype=dtype)
    return x, torch.tensor([0.0, 3.5, 900.0]), torch.tensor([1, 0, 7])


@pytest.mark.parametrize("input_size", [8, (12,), (2, 4, 6)], ids=str)
def test_outputs_and_gradients(input_size):
    model = randomise(DiT(**SMALL | {"input_size": input_size}).double()).eval()
    x, t, y = inputs(model)
    x.requires_grad_()
    of = [x, *(p for p in model.parameters() if p.requires_grad)]
    grad = normal(3, model.out_channels, *model.input_size, seed=1, dtype=torch.float64)
    out, expected = model(x, t, y), plain(model, x, t, y)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(out, of, grad),
        torch.autograd.grad(expected, of, grad),
        atol=1e-9,
        rtol=1e-9,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_torchs(dtype):
    model = randomise(DiT(**SMALL)).to(dtype).eval()
    x, t, y = inputs(model, dtype)
    exact = randomise(DiT(**SMALL)).to(dtype).double().eval()
    with torch.no_grad():
        truth = exact(x.double(), t, y)
        ours = (model(x, t, y) - truth).square().mean().sqrt()
        theirs = (plain(model, x, t, y) - truth).square().mean().sqrt()
    assert model(x, t, y).dtype == dtype
    assert ours <= 2 * theirs


def test_zero_initialisation():
    model = DiT(**SMALL)
    assert model(*inputs(model, torch.float32)).count_nonzero() == 0
    parameters = sum(p.numel() for p in DiT.named("DiT-S/4").parameters())
    assert 32.5e6 < parameters < 33.5e6


def test_position_embedding_is_dits():
    got = mnn.sincos_positions((3, 5), 16)
    omega = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for row in range(3):
        for column in range(5):
            angles = [column * omega, row * omega]
            expected = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(got[5 * row + column], expected.float())


def diffusers_model(**options):
    diffusers = pytest.importorskip("diffusers")
    given = {
        "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "sample_size": 8,
        "num_embeds_ada_norm": 7, "out_channels": 8,
    }  # fmt: skip
    model = randomise(diffusers.DiTTransformer2DModel(**given | options)).double().eval()
    embedder = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(embedder.state_dict())
    return model


def test_same_as_diffusers():
    theirs = diffusers_model()
    ours = DiT.from_diffusers(theirs).eval()
    # Larger timesteps round the angles, which are float32 there.
    x, t, y = normal(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 1]), torch.tensor([3, 7])
    expected = theirs(x, t, y, return_dict=False)[0]
    torch.testing.assert_close(ours(x, t, y), expected, atol=1e-6, rtol=1e-6)


def test_weights_to_diffusers_and_back():
    theirs = diffusers_model()
    ours = DiT.from_diffusers(theirs)
    state = ours.diffusers_state_dict()
    missing, unexpected = diffusers_model().load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    for name, t in theirs.state_dict().items():
        assert torch.equal(state[name], t)
    again = DiT(**SMALL).double()
    again.load_state_dict(state)
    for name, t in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_model_to_diffusers_and_back(learn_sigma):
    pytest.importorskip("diffusers")
    options = SMALL | {"learn_sigma": learn_sigma}
    ours = randomise(DiT(**options, mlp_eps=1e-4, downscale_freq_shift=1.0).double()).eval()
    with pytest.raises(ValueError, match="sines and cosines as pos_embed, this one others"):
        ours.to_diffusers()
    ours.pos_embed.data = DiT(**options).pos_embed.data.double()
    theirs = ours.to_diffusers()
    x, t, y = normal(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 1]), torch.tensor([3, 7])
    expected = ours(x, t, y)
    torch.testing.assert_close(
        theirs(x, t, y, return_dict=False)[0], expected, rtol=1e-6, atol=1e-6
    )
    assert torch.equal(DiT.from_diffusers(theirs).eval()(x, t, y), expected)
    for wrong, message in (
        ({}, r"downscale_freq_shift: 1\.0, got 0\.0"),
        ({"input_size": (8, 4)}, r"dimensions of equal sizes: \(8, 8\), got \(8, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DiT(**SMALL | wrong).to_diffusers()


def test_weights_that_do_not_fit():
    theirs = diffusers_model()
    state = theirs.state_dict()
    broken = dict(state)
    del broken["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(KeyError, match=r"to_k\.weight"):
        dit_from_diffusers(broken)
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match="DiT has one for all"):
        dit_from_diffusers(state | {name: state[name] + 1})
    with pytest.raises(ValueError, match="activation_fn must be 'gelu-approximate'"):
        DiT.from_diffusers(diffusers_model(activation_fn="geglu"))


def test_names_are_those_of_the_papers_code():
    names = set(DiT(**SMALL | {"depth": 1}).state_dict())
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += [f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    layers += ["blocks.0.adaLN_modulation.1", "final_layer.adaLN_modulation.1"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == expected | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_guidance():
    model = randomise(DiT(**SMALL)).eval()
    x, t = normal(2, 4, 8, 8), torch.tensor([5, 9])
    y, none = torch.tensor([2, 3]), torch.tensor([7, 7])
    conditional, unconditional = model(x, t, y), model(x, t, none)
    got = model.forward_with_cfg(torch.cat([x, x]), t.repeat(2), torch.cat([y, none]), 3.0)
    expected = unconditional[:, :4] + 3 * (conditional[:, :4] - unconditional[:, :4])
    torch.testing.assert_close(got[:2, :4], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[2:, :4], got[:2, :4])
    torch.testing.assert_close(got[:2, 4:], conditional[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DiT(input_size=9),
            r"multiples of patch_size \(2, 2\), .* got \(9, 9\)",
        ),
        (lambda: DiT.named("DiT-M/2"), "one of S, B, L, XL, got 'DiT-M/2'"),
        (lambda: DiT(**SMALL | {"num_heads": 5}), "dim must be a multiple of num_heads = 5"),
        (
            lambda: DiT(**SMALL)(torch.ones(1, 4, 8, 9), torch.ones(1), torch.ones(1).long()),
            r"x must be \(B, 4, 8, 8\), got \(1, 4, 8, 9\)",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_compile_without_a_break():
    model = randomise(DiT(**SMALL | {"depth": 2})).eval()
    arguments = inputs(model, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(*arguments)
    torch.testing.assert_close(out, model(*arguments))
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_autocast():
    model = randomise(DiT(**SMALL)).eval()
    arguments = inputs(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(*arguments), plain(model, *arguments)
    exact = plain(model, *arguments)
    out.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert (out - exact).square().mean() <= 4 * (expected - exact).square().mean()


def test_checkpointing_of_blocks():
    model = randomise(DiT(**SMALL))
    x, t, y = inputs(model, torch.float32)
    model.eval()

    def gradients():
        model.zero_grad()
        model(x, t, y).square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients()
    for block in model.blocks:
        run = block.forward
        block.forward = lambda *a, run=run, **k: torch.utils.checkpoint.checkpoint(
            run, *a, use_reentrant=False, **k
        )
    torch.testing.assert_close(gradients(), expected)
