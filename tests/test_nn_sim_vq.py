"""SimVQ, ResidualSimVQ and RandomProjectionQuantizer against the library whose place they take."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import normal
from torch import nn

import mmfast
from mmfast.nn import RandomProjectionQuantizer, ResidualSimVQ, SimVQ

BASE = {"dim": 8, "codebook_size": 32}


def pair(module, **options):
    """Ours and the peer's, from the same seed."""
    peer = pytest.importorskip("vector_quantize_pytorch")
    made = []
    for cls in (module, getattr(peer, module.__name__)):
        torch.manual_seed(0)
        made.append(cls(**{name: copy.deepcopy(value) for name, value in options.items()}))
    state, expected = (m.state_dict() for m in made)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    return made


def train(modules, shape, steps=10):
    """Step all modules side by side on the same batches; their results must agree."""
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in modules]
    for step in range(steps):
        results = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            torch.manual_seed(step)
            x = normal(*shape, seed=step).requires_grad_()
            quantized, indices, loss = module(x)
            (quantized.sin().sum() + loss.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append((quantized, indices, loss, x.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


OPTIONS = {
    "plain": {},
    "straight_through": {"rotation_trick": False},
    "weights": {"input_to_quantize_commit_loss_weight": 0.1, "commitment_weight": 3.0},
    "frozen_dim": {"frozen_codebook_dim": 5},
    "init": {"init_fn": torch.tanh},
    "transform": {"codebook_transform": nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))},
}


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_sim_vq_trains_as_the_peer(name, channel_first):
    modules = pair(SimVQ, **BASE, channel_first=channel_first, **OPTIONS[name])
    shape = (2, 8, 3, 5) if channel_first else (2, 15, 8)
    train(modules, shape)
    ours, theirs = modules
    x = normal(*shape, seed=50)
    quantized, indices, loss = ours.eval()(x)
    for a, b in zip((quantized, indices, loss), theirs.eval()(x), strict=True):
        torch.testing.assert_close(a, b)
    codes = ours.indices_to_codes(indices)
    torch.testing.assert_close(codes, theirs.indices_to_codes(indices))
    torch.testing.assert_close(codes, quantized)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_sim_vq_indices_are_exact():
    torch.manual_seed(0)
    module = SimVQ(**BASE)
    x = normal(2, 50, 8) + 100
    assert torch.equal(module(x)[1], mmfast.nearest_code(x, module.codebook)[0])


def test_sim_vq_keeps_the_dtype():
    module = SimVQ(**BASE).to(torch.bfloat16)
    quantized, _, loss = module(normal(2, 9, 8, dtype=torch.bfloat16))
    assert quantized.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


RESIDUAL = {
    "plain": {},
    "straight_through": {"rotation_trick": False},
    "dropout": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "dropout_multiple": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2},
}


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_sim_vq_trains_as_the_peer(name, channel_first):
    options = BASE | RESIDUAL[name] | {"num_quantizers": 4, "channel_first": channel_first}
    ours, theirs = pair(ResidualSimVQ, **options)
    shape = (2, 8, 3, 5) if channel_first else (2, 15, 8)
    train((ours, theirs), shape)
    torch.testing.assert_close(ours.codebooks, theirs.codebooks)
    x = normal(*shape, seed=50)
    result = ours.eval()(x, return_all_codes=True)
    for a, b in zip(result, theirs.eval()(x, return_all_codes=True), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.get_output_from_indices(result[1]), result[0])
    assert (ours.codebook_size, ours.codebook_dim) == (32, 8)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_residual_sim_vq_from_fewer_stages():
    torch.manual_seed(0)
    module = ResidualSimVQ(**BASE, num_quantizers=3, quantize_dropout=True).eval()
    indices = module(normal(2, 9, 8))[1]
    codes = module.get_codes_from_indices(indices[..., :2])
    assert torch.equal(codes[:2], module.get_codes_from_indices(indices)[:2])
    assert (codes[2] == 0).all()


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_random_projections_as_the_peer(heads, norm):
    ours, theirs = pair(
        RandomProjectionQuantizer,
        dim=12,
        codebook_size=32,
        codebook_dim=8,
        num_codebooks=heads,
        norm=norm,
    )
    x = normal(2, 15, 12)
    for _ in range(2):
        indices = ours(x)
        assert torch.equal(indices, theirs(x))
    assert indices.shape == ((2, 15) if heads == 1 else (2, 15, 3))
    targets = normal(*indices.shape, seed=3).mul(100).long() % 32
    torch.testing.assert_close(ours(x, indices=targets), theirs(x, indices=targets))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_random_projections_learn_nothing():
    module = RandomProjectionQuantizer(dim=12, codebook_size=32, codebook_dim=8).train()
    before = copy.deepcopy(module.state_dict())
    module(normal(2, 15, 12))
    assert not [*module.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_compiles(training):
    torch._dynamo.reset()
    torch.manual_seed(0)
    modules = (
        SimVQ(**BASE, channel_first=True),
        ResidualSimVQ(**BASE, num_quantizers=2, channel_first=True),
        RandomProjectionQuantizer(dim=8, codebook_size=32, codebook_dim=4, num_codebooks=2),
    )
    for module in modules:
        compiled = torch.compile(module.train(training), fullgraph=True, backend="aot_eager")
        x = normal(2, 8, 5) if module is not modules[2] else normal(2, 5, 8)
        torch.testing.assert_close(compiled(x), module(x))


def test_compiles_with_dropout():
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = ResidualSimVQ(**BASE, num_quantizers=3, quantize_dropout=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    seen = set()
    for step in range(12):
        quantized, indices, losses = compiled(normal(2, 6, 8, seed=step))
        used = int((indices[0, 0] >= 0).sum())
        assert ((indices >= 0).sum(-1) == used).all()
        assert (losses[used:] == 0).all()
        torch.testing.assert_close(quantized, module.get_output_from_indices(indices))
        seen.add(used)
    assert len(seen) > 1


def test_messages():
    module = SimVQ(**BASE)
    with pytest.raises(ValueError, match=r"x must be \(B, ..., 8\), got shape \(2, 9\)"):
        module(normal(2, 9))
    with pytest.raises(ValueError, match=r"x must be \(B, 8, ...\), got shape \(2, 9, 8\)"):
        SimVQ(**BASE, channel_first=True)(normal(2, 9, 8))
    with pytest.raises(TypeError, match="x must be float32, float16, bfloat16, float64, got int64"):
        module(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="heads must be 1 in a residual quantiser, got 2"):
        ResidualSimVQ(**BASE, num_quantizers=2, heads=2)
    with pytest.raises(ValueError, match="quantize_dropout_cutoff_index must be from 0 to"):
        ResidualSimVQ(
            **BASE, num_quantizers=2, quantize_dropout=True, quantize_dropout_cutoff_index=2
        )
    residual = ResidualSimVQ(**BASE, num_quantizers=2)
    with pytest.raises(ValueError, match=r"with Q = 2 stages, got shape \(5, 3\)"):
        residual.get_codes_from_indices(torch.zeros(5, 3, dtype=torch.int64))
    projections = RandomProjectionQuantizer(dim=12, codebook_size=32, codebook_dim=8)
    with pytest.raises(ValueError, match=r"x must be \(B, L, 12\), got shape \(2, 12\)"):
        projections(normal(2, 12))
