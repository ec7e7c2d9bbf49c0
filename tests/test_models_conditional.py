"""ConditionalDiT: contexts by cross and joint attention."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from whole_models import assert_sound, randomise

from mmfast.models import ConditionalDiT, Diffusion, load_model, save_model

S = 5


def build(conditioning="cross", **options):
    kind = {} if "context_dim" in options else {"context_codes": 11}
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "context_size": S}
    options = sizes | kind | options
    model = ConditionalDiT(8, 2, 3, conditioning=conditioning, **options)
    return randomise(model).eval()


def inputs(dtype=torch.float32, batch=3):
    x = normal(batch, 3, 8, 8, dtype=dtype)
    ids = torch.randint(11, (batch, S), generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(0, 900, batch), ids, torch.tensor([2, 5, 0] * batch)[:batch]


@pytest.mark.parametrize("qk_norm", ["none", "rms"])
@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_sound(conditioning, qk_norm):
    model = build(conditioning, qk_norm=qk_norm)

    def loss(model, dtype):
        x, *rest = inputs(dtype)
        return (model(x, *rest) * normal(3, 3, 8, 8, seed=2, dtype=dtype)).sum()

    assert_sound(model, loss)


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_what_is_behind_the_length_changes_nothing(conditioning):
    model = build(conditioning)
    x, t, ids, lengths = inputs()
    out = model(x, t, ids, lengths)
    other = torch.where(torch.arange(S) < lengths[:, None], ids, 10 - ids)
    assert torch.equal(model(x, t, other, lengths), out)
    short = model(x[:1], t[:1], ids[:1, :2])
    torch.testing.assert_close(short, out[:1], rtol=1e-5, atol=1e-5)
    changed = model(x, t, 10 - ids, lengths)
    assert (changed[2] == out[2]).all()  # of length 0
    assert not torch.allclose(changed[1], out[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_contexts_are_dropped_and_guide(conditioning):
    model = build(conditioning)
    x, t, ids, _ = inputs(batch=2)
    plain, nothing = model(x, t, ids), model(x, t, ids, torch.zeros(2, dtype=torch.int64))
    dropped = model(x, t, ids, drop=torch.tensor([True, False]))
    torch.testing.assert_close(dropped, torch.stack([nothing[0], plain[1]]))
    both = model(torch.cat([x, x]), t.repeat(2), **model.for_guidance(ids))
    torch.testing.assert_close(both, torch.cat([nothing, plain]))
    model.context_dropout_prob = 1.0
    torch.testing.assert_close(model.train()(x, t, ids), nothing)
    options = {"condition": {"context": ids}, "steps": 2, "progress": False}
    drawn = Diffusion("flow").sample(model, x.shape, guidance=2.0, **options)
    assert not torch.equal(drawn, Diffusion("flow").sample(model, x.shape, **options))


@pytest.mark.parametrize("size", [(2, 3), (1, 2, 3)])
def test_contexts_of_a_grid(size):
    model = build(context_dim=6, context_size=size)
    x, t, *_ = inputs()
    context = normal(3, *size, 6, seed=4)
    out = model(x, t, context)
    assert out.shape == x.shape
    assert not torch.allclose(model(x, t, context.flip(-2)), out, rtol=1e-3, atol=1e-3)
    codes = build(context_size=size)
    assert codes(x, t, torch.zeros(3, *size, dtype=torch.int64)).shape == x.shape


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_starts_as_dit_does_and_is_saved(conditioning, tmp_path):
    torch.manual_seed(0)
    options = {"hidden_size": 32, "depth": 2, "num_heads": 2, "context_codes": 11}
    model = ConditionalDiT(8, 2, 3, conditioning=conditioning, context_size=S, **options)
    assert model.eval()(*inputs()).count_nonzero() == 0
    randomise(model)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", ConditionalDiT)
    assert torch.equal(loaded(*inputs()), model(*inputs()))


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_learns_what_the_context_says(conditioning):
    """Each id is a colour of its place; generated pictures have them."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "depth": 2, "num_heads": 2, "context_codes": 4}
    model = ConditionalDiT(2, 1, 1, conditioning=conditioning, context_size=2, **options)
    ids = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(4, 1)  # of two rows
    pictures = (ids / 1.5 - 1).view(-1, 1, 2, 1).repeat_interleave(2, 3)
    diffusion, condition = Diffusion("flow"), {"context": ids}
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(130):
        loss = diffusion.loss(model, pictures, seed=0, offset=step, condition=condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = diffusion.sample(model, pictures.shape, condition=condition, steps=8, progress=False)
    read = ((drawn + 1) * 1.5).round()
    assert (read == (pictures + 1) * 1.5).float().mean() > 0.9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConditionalDiT(8), ValueError, "one of context_codes and context_dim"),
        (lambda: build("single"), ValueError, "conditioning must be one of cross, joint"),
        (lambda: build()(*inputs()[:2], normal(3, S)), TypeError, "context must be int64"),
        (
            lambda: build()(*inputs()[:2], torch.ones(3, 6).long()),
            ValueError,
            r"context must be \(B, S <= 5\), got \(3, 6\)",
        ),
        (
            lambda: build(context_dim=4)(*inputs()[:2], normal(3, S, 5)),
            ValueError,
            r"context must be \(B, S <= 5, 4\), got \(3, 5, 5\)",
        ),
        (
            lambda: build(context_size=(2, 3))(*inputs()[:2], torch.ones(3, 3, 2).long()),
            ValueError,
            r"context must be \(B, 2, 3\), got \(3, 3, 2\)",
        ),
        (
            lambda: build()(*inputs()[:3], torch.ones(2).long()),
            ValueError,
            r"lengths must be \(B,\) = \(3,\), got \(2,\)",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
