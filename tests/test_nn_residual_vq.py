"""ResidualVQ and GroupedResidualVQ against the library whose place they take."""

from __future__ import annotations

import copy

import nn_residual_ranks
import pytest
import torch
from cases import normal

from mmfast.nn import GroupedResidualVQ, ResidualVQ, residual_vq
from mmfast.ops.residual_quantize import residual_quantize

BASE = {"dim": 8, "num_quantizers": 3, "codebook_size": 16}
WEIGHTS = [1.0, 0.5, 2.0]
BY_GRADIENT = {"learnable_codebook": True, "ema_update": False}

OPTIONS = {
    "plain": {},
    "projected": {"codebook_dim": 4},
    "shared": {"shared_codebook": True},
    "dropout": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "cutoff_without_dropout": {"quantize_dropout_cutoff_index": 5},
    "dropout_multiple": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2},
    "sizes": {"num_quantizers": None, "codebook_size": (16, 8, 4)},
    "cosine": {"use_cosine_sim": True},
    "learnable": BY_GRADIENT,
    "no_rotation": {"rotation_trick": False},
    "gradient_between_stages": {"quant_grad_frac": 0.3},
    "diveq": {"diveq": True},
    "implicit": {"implicit_neural_codebook": True, "mlp_kwargs": {"depth": 2, "dim_hidden": 6}},
    "implicit_shared": {"implicit_neural_codebook": True, "shared_codebook": True},
    "beam": BY_GRADIENT | {"beam_size": 3, "beam_score_quantizer_weights": WEIGHTS},
    "beam_shared": BY_GRADIENT | {"beam_size": 2, "shared_codebook": True},
    "beam_drawn": BY_GRADIENT
    | {"beam_size": 2, "stochastic_sample_codes": True, "rotation_trick": False},
    "beam_dropout": BY_GRADIENT | {"beam_size": 2, "quantize_dropout": True},
    "beam_in_eval": {"beam_size": 1, "eval_beam_size": 3},
}


def pair(name, module=ResidualVQ, **options):
    """Ours and the peer's, from the same seed."""
    peer = pytest.importorskip("vector_quantize_pytorch")
    made = []
    for cls in (module, getattr(peer, module.__name__)):
        torch.manual_seed(0)
        made.append(cls(**{**BASE, **options}))
    return made


def assert_same_state(ours, theirs, exact=False):
    state = ours.state_dict()
    expected = theirs.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        if exact:
            assert torch.equal(value, expected[key]), key
        else:
            torch.testing.assert_close(value, expected[key], msg=lambda text, k=key: f"{k}: {text}")


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()


def train(modules, steps=10, mask=None, shape=(2, 20, 8)):
    """Step all modules side by side on the same batches; their results must agree."""
    optimizers = [
        torch.optim.Adam([*parameters], 1e-2) if (parameters := [*m.parameters()]) else None
        for m in modules
    ]
    call = {} if mask is None else {"mask": mask}
    for step in range(steps):
        results = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            torch.manual_seed(step)
            x = normal(*shape, seed=step).requires_grad_()
            quantized, indices, losses = module(x, **call)
            (quantized.square().sum() + losses.sum()).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            results.append((quantized, indices, losses, x.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", OPTIONS)
def test_trains_as_the_peer(name):
    ours, theirs = pair(name, **OPTIONS[name])
    assert_same_state(ours, theirs, exact=True)
    train((ours, theirs))
    assert_same_state(ours, theirs)
    for module in (ours, theirs):
        module.eval()
    x = normal(2, 7, 8, seed=99)
    torch.manual_seed(1)
    quantized, indices, losses, codes = ours(x, return_all_codes=True)
    torch.manual_seed(1)
    expected = theirs(x, return_all_codes=True)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(losses, expected[2])
    torch.testing.assert_close(codes, expected[3])
    output = ours.get_output_from_indices(indices)
    torch.testing.assert_close(output, theirs.get_output_from_indices(indices))
    # The peer adds the noise of diveq to its eval output as well; ours is the sum of the codes.
    torch.testing.assert_close(quantized, output if ours.diveq else expected[0])
    torch.testing.assert_close(quantized, output)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"shared_codebook": True}])
def test_beam_search_moves_every_codebook(options):
    ours, theirs = pair("", beam_size=3, **options)
    before = [layer._codebook.cluster_size.clone() for layer in ours.layers]
    train((ours, theirs), steps=1)  # the peer moves the first stage's codebook alone
    torch.manual_seed(0)
    indices = ResidualVQ(**BASE, beam_size=3, **options)(normal(2, 20, 8))[1]
    expected = before[0]
    for stage, layer in enumerate(ours.layers):
        counts = torch.bincount(indices[..., stage].flatten(), minlength=16)
        start = expected if ours.shared_codebook else before[stage]
        expected = 0.8 * start + 0.2 * counts
        if not ours.shared_codebook:
            torch.testing.assert_close(layer._codebook.cluster_size, expected)
    torch.testing.assert_close(ours.layers[-1]._codebook.cluster_size, expected)


def test_a_beam_for_each_code_is_exhaustive():
    torch.manual_seed(0)
    weights = [0.25, 1.0]
    module = ResidualVQ(
        dim=4,
        num_quantizers=2,
        codebook_size=5,
        beam_size=5,
        beam_score_quantizer_weights=weights,
    ).eval()
    x = normal(3, 20, 4)
    quantized, indices, losses = module(x)
    first, second = module.codebooks
    residual = x[..., None, :] - first  # [B, L, K, D]
    rest = residual[..., None, :] - second  # [B, L, K, K, D]
    each = [t.square().mean(-1) for t in (residual, rest)]
    score = weights[0] * each[0][..., None] + weights[1] * each[1]
    best = score.flatten(2).argmin(2)
    assert torch.equal(indices, torch.stack([best // 5, best % 5], -1))
    torch.testing.assert_close(quantized, first[best // 5] + second[best % 5])
    torch.testing.assert_close(losses[1], each[1].flatten(2).gather(2, best[..., None]).mean())
    nearest = module(x, beam_size=1)[1]
    assert not torch.equal(nearest, indices)


@pytest.mark.parametrize("name", ["plain", "projected", "implicit", "beam", "shared"])
@pytest.mark.parametrize("zeros", [True, False])
def test_mask(name, zeros):
    ours, theirs = pair(name, **OPTIONS[name], return_zeros_for_masked_padding=zeros)
    mask = normal(2, 20, seed=5) < 0.5
    train((ours, theirs), mask=mask, steps=3)
    assert_same_state(ours, theirs)
    x = normal(2, 20, 8)
    quantized, indices, _ = ours(x, mask=mask)
    assert torch.equal(quantized[~mask], x[~mask] * (not zeros))
    assert (indices[~mask] == -1).all()
    assert (indices[mask] >= 0).all()


FUSED = ["plain", "projected", "shared", "sizes", "learnable", "no_rotation", "diveq"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUSED)
def test_one_op_gives_what_the_stages_do(name, dtype, monkeypatch):
    module = ResidualVQ(**BASE | OPTIONS[name]).to(dtype)
    calls = []

    def spy(*args, **kwargs):
        calls.append(args)
        return residual_quantize(*args, **kwargs)

    monkeypatch.setattr(residual_vq, "residual_quantize", spy)
    x, mask = normal(2, 20, 8).to(dtype), normal(2, 20, seed=5) < 0.5
    module(x)  # codes that a step has moved
    assert not calls
    module.eval()
    with torch.no_grad():
        for call in ({}, {"mask": mask}, {"return_all_codes": True}):
            one = module(x, **call)
            assert len(calls) == 1
            listener = module.layers[-1].register_forward_hook(lambda *_: None)
            stages = module(x, **call)
            listener.remove()
            assert len(calls) == 1
            calls.clear()
            for a, b in zip(one, stages, strict=True):
                assert torch.equal(a, b)
                assert a.dtype == b.dtype


@pytest.mark.parametrize("name", ["cosine", "implicit", "beam_in_eval"])
def test_what_one_op_does_not_do_is_left_to_the_stages(name, monkeypatch):
    monkeypatch.setattr(residual_vq, "residual_quantize", None)
    module = ResidualVQ(**BASE | OPTIONS[name]).eval()
    with torch.no_grad():
        module(normal(2, 20, 8))
    ResidualVQ(**BASE | OPTIONS["learnable"]).eval()(normal(2, 20, 8))[0].sum().backward()
    half = ResidualVQ(**BASE).eval()
    assert half(normal(2, 20, 8).half())[0].dtype == torch.float16


@pytest.mark.parametrize("name", ["plain", "beam", "implicit"])
def test_one_vector_for_each_sample(name):
    modules = pair(name, **OPTIONS[name])
    train(modules, shape=(5, 8), steps=3)
    assert modules[0](normal(5, 8))[1].shape == (5, 3)


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"quantize_dropout": True}])
def test_checkpoints_load_both_ways(options):
    ours, theirs = pair("", **options)
    train((ours, theirs), steps=2)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        fresh = [type(m)(**BASE, **options) for m in (ours, theirs)]
    fresh[0].load_state_dict(theirs.state_dict())
    fresh[1].load_state_dict(ours.state_dict())
    x = normal(2, 9, 8)
    a, b = (m.eval()(x) for m in fresh)
    assert torch.equal(a[1], b[1])
    torch.testing.assert_close(a[0], b[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize_dropout": True},
        OPTIONS["beam"],
        {"stochastic_sample_codes": True, "rotation_trick": False},
    ],
)
def test_grouped(options):
    ours, theirs = pair("", GroupedResidualVQ, groups=2, **options)
    assert_same_state(ours, theirs, exact=True)
    train((ours, theirs), steps=5)
    assert_same_state(ours, theirs)
    torch.testing.assert_close(ours.codebooks, theirs.codebooks)
    x = normal(2, 9, 8)
    result, expected = (m.eval()(x, return_all_codes=True) for m in (ours, theirs))
    torch.testing.assert_close(result, expected)
    quantized, indices, _, codes = result
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(ours.get_codes_from_indices(indices), torch.stack(codes))


@pytest.mark.parametrize("name", ["plain", "projected", "implicit", "beam", "dropout"])
@pytest.mark.parametrize("module", [ResidualVQ, GroupedResidualVQ])
def test_images_are_sequences(module, name):
    options = BASE | OPTIONS[name] | ({"groups": 2} if module is GroupedResidualVQ else {})
    torch.manual_seed(0)
    on_images = module(accept_image_fmap=True, **options)
    on_tokens = module(**options)
    on_tokens.load_state_dict(on_images.state_dict())
    for training in (True, False):
        results = []
        for images, m in ((True, on_images), (False, on_tokens)):
            torch.manual_seed(3)
            x = normal(2, 8, 4, 5)
            x = (x if images else x.flatten(2).mT).detach().requires_grad_()
            quantized, indices, losses, codes = m.train(training)(x, return_all_codes=True)
            assert quantized.shape == x.shape
            codes = torch.stack(codes) if isinstance(codes, tuple) else codes
            output = m.get_output_from_indices(indices)
            assert output.shape[1:] == ((4, 5, 8) if images else (20, 8))
            gradient = torch.autograd.grad(quantized.square().sum() + losses.sum(), x)[0]
            if images:
                quantized, gradient = (t.flatten(2).mT for t in (quantized, gradient))
                assert indices.shape[-3:] == (4, 5, 3)
                indices, codes = indices.flatten(-3, -2), codes.flatten(-3, -2)
                output = output.flatten(1, 2)
            results.append((quantized, indices, losses, codes, output, gradient))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert_same_state(on_images, on_tokens)


def cross_entropy(module, x, indices):
    """Of each stage alone, added up."""
    residual, loss = x, 0
    for layer, target in zip(module.layers, indices.unbind(-1), strict=True):
        codes, nearest = layer.codebook, layer(residual)[1]
        logits = -torch.cdist(residual, codes[None].expand(len(x), -1, -1))
        loss = loss + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=-1
        )
        residual = residual - codes[nearest]
    return loss


@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy(masked):
    torch.manual_seed(0)
    module = ResidualVQ(**BASE).eval()
    x = normal(2, 6, 8).requires_grad_()
    indices = torch.randint(0, 16, (2, 6, 3))
    mask = normal(2, 6, seed=5) < 0.5 if masked else None
    targets = indices if mask is None else indices.masked_fill(~mask[..., None], -1)
    quantized, loss = module(x, indices=targets, mask=mask)
    expected = cross_entropy(module, x, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(t, x)[0] for t in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(quantized, module(x, mask=mask)[0])


def test_cross_entropy_of_images_and_groups():
    torch.manual_seed(0)
    module = GroupedResidualVQ(**BASE, groups=2, accept_image_fmap=True).eval()
    x = normal(2, 8, 4, 5)
    indices = module(x)[1]
    quantized, loss = module(x, indices=indices)
    assert quantized.shape == x.shape
    tokens = [part.flatten(2).mT for part in x.chunk(2, 1)]
    expected = sum(
        cross_entropy(rvq, part, index.flatten(1, 2))
        for rvq, part, index in zip(as_sequences(module), tokens, indices, strict=True)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def as_sequences(grouped):
    """The groups of a quantiser of images, for sequences."""
    made = []
    for rvq in grouped.rvqs:
        made.append(ResidualVQ(**(BASE | {"dim": 4})).eval())
        made[-1].load_state_dict(rvq.state_dict())
    return made


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"beam_size": 2}])
def test_frozen_codebooks_stay(options):
    torch.manual_seed(0)
    module = ResidualVQ(**BASE, **options)
    before = copy.deepcopy(module.state_dict())
    module(normal(2, 6, 8), freeze_codebook=True)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    module(normal(2, 6, 8))
    assert any(not torch.equal(value, before[key]) for key, value in module.state_dict().items())
    frozen = ResidualVQ(**BASE, **options, freeze_codebook=True)
    before = copy.deepcopy(frozen.state_dict())
    frozen(normal(2, 6, 8))
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())


def test_shared_codebook_replaces_dead_codes_from_all_stages_and_samples():
    torch.manual_seed(0)
    module = ResidualVQ(**BASE, shared_codebook=True, threshold_ema_dead_code=1e6)
    assert len({id(layer._codebook) for layer in module.layers}) == 1
    # Fewer vectors than codes, so that the stages alone cannot replace all that are dead.
    x = normal(4, 12, 8)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, :1] = True
    x[~mask] = 100
    module(x, mask=mask)
    codebook = module.codebooks[0]
    assert codebook.abs().max() < 50
    # Four codes by the last stage, the other twelve by all vectors of the three stages.
    assert (module.layers[0]._codebook.cluster_size == 1e6).all()
    assert (torch.cdist(x[:, 0], codebook).amin(1) < 1e-5).sum() > 1


def test_shared_codebook_takes_the_step_of_its_optimizer():
    torch.manual_seed(0)
    module = ResidualVQ(
        **BASE,
        **BY_GRADIENT,
        shared_codebook=True,
        in_place_codebook_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )
    before = module.codebooks.detach().clone()
    module(normal(2, 6, 8))
    after = module.codebooks
    assert not torch.equal(before, after)
    assert torch.equal(after[0], after[2])


def test_dropout_leaves_out_the_last_stages():
    torch.manual_seed(0)
    module = ResidualVQ(
        **BASE | {"num_quantizers": 6}, quantize_dropout=True, quantize_dropout_cutoff_index=2
    )
    seen = set()
    for seed in range(30):
        before = [layer._codebook.cluster_size.clone() for layer in module.layers]
        x = normal(1, 5, 8, seed=seed)
        _, indices, losses = module(x, rand_quantize_dropout_fixed_seed=seed)
        used = int((indices[0, 0] >= 0).sum())
        seen.add(used)
        assert (indices[..., :used] >= 0).all()
        assert (indices[..., used:] == -1).all()
        assert (losses[used:] == 0).all()
        for stage, (layer, size) in enumerate(zip(module.layers, before, strict=True)):
            assert torch.equal(layer._codebook.cluster_size, size) == (stage >= used)
    assert seen == {3, 4, 5, 6}
    module.eval()
    indices = module(x)[1]
    assert (indices >= 0).all()
    coarse = module.get_codes_from_indices(indices[..., :2])
    assert coarse.shape == (6, 1, 5, 8)
    assert (coarse[2:] == 0).all()


def test_a_seed_on_the_device_gives_what_leaving_out_gives():
    torch.manual_seed(0)
    options = BASE | {"num_quantizers": 5, "quantize_dropout": True}
    by_tensor, by_number = ResidualVQ(**options), ResidualVQ(**options)
    by_number.load_state_dict(by_tensor.state_dict())
    seen = set()
    for seed in range(12):
        x = normal(2, 5, 8, seed=seed)
        result = by_tensor(x, rand_quantize_dropout_fixed_seed=torch.tensor(seed))
        used = int((result[1][0, 0] >= 0).sum())
        seen.add(used)
        # A seed with which the host's draw leaves as many.
        same = next(s for s in range(100) if used == draw(by_number, s))
        expected = by_number(x, rand_quantize_dropout_fixed_seed=same)
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b)
        assert_same_state(by_tensor, by_number, exact=True)
    assert seen == {1, 2, 3, 4, 5}


def draw(module, seed):
    """How many stages that seed leaves."""
    return module._num_stages(seed, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "training"),
    [("projected", False), ("shared", True), ("implicit", True), ("beam_shared", True)],
)
def test_compiles(name, training):
    torch.manual_seed(0)
    module = ResidualVQ(**BASE | OPTIONS[name] | {"num_quantizers": 2}).train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for m in (module, compiled):
        x = normal(2, 6, 8).requires_grad_()
        quantized, indices, losses = m(x)
        (quantized.square().sum() + losses.sum()).backward()
        results.append((quantized, indices, losses, x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert_same_state(module, twin)


@pytest.mark.parametrize("module", [ResidualVQ, GroupedResidualVQ])
def test_compiles_with_dropout(module):
    torch.manual_seed(0)
    options = {"groups": 2} if module is GroupedResidualVQ else {}
    options |= BASE
    compiled = torch.compile(
        module(**options, quantize_dropout=True), fullgraph=True, backend="aot_eager"
    )
    seen = set()
    for step in range(12):
        indices = compiled(normal(2, 6, 8, seed=step))[1]
        used = (indices.flatten(0, -2) >= 0).sum(-1)
        assert (used == used[0]).all()
        seen.add(int(used[0]))
    assert len(seen) > 1


def test_ranks_drop_the_same_stages(tmp_path):
    torch.multiprocessing.spawn(
        nn_residual_ranks.work, (2, f"{tmp_path}/store", str(tmp_path)), nprocs=2
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (used, state), (expected, other) in zip(*ranks, strict=True):
        assert used == expected
        assert len(set(used)) > 1
        # The codebooks follow the batches of both.
        for key, value in state.items():
            assert torch.equal(value, other[key]), key


def test_exports():
    torch.manual_seed(0)
    module = ResidualVQ(**BASE, codebook_dim=4).eval()
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(
        module, (normal(2, 6, 8),), dynamic_shapes={"x": {1: length}}, strict=False
    )
    x = normal(2, 9, 8, seed=1)
    for a, b in zip(program.module()(x), module(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": 2}, ValueError, "heads must be 1 in a residual quantiser, got 2"),
        ({"num_quantizers": None}, ValueError, "num_quantizers must be given"),
        ({"codebook_size": (4, 4)}, ValueError, "num_quantizers = 3 stages, got 2"),
        (
            {"codebook_size": (4, 4, 8), "shared_codebook": True},
            ValueError,
            r"one number if shared_codebook, got \(4, 4, 8\)",
        ),
        ({"eval_beam_size": 2}, ValueError, "eval_beam_size 2 needs a beam_size, got None"),
        (
            {"quantize_dropout": True, "quantize_dropout_cutoff_index": 3},
            ValueError,
            "quantize_dropout_cutoff_index must be from 0 to num_quantizers - 1 = 2, got 3",
        ),
        ({"quantize_dropout_multiple_of": 0}, ValueError, "must be at least 1, got 0"),
        ({"beam_score_quantizer_weights": [1.0]}, ValueError, "each of 3 stages, got 1"),
        ({"channel_last": False}, ValueError, "channel_last is not an option of a residual"),
        (
            {"implicit_neural_codebook": True, "beam_size": 2},
            NotImplementedError,
            "implicit_neural_codebook together with beam_size is not supported",
        ),
        (
            {"implicit_neural_codebook": True, "stochastic_sample_codes": True},
            NotImplementedError,
            "implicit_neural_codebook together with stochastic_sample_codes",
        ),
        (
            {"implicit_neural_codebook": True, "in_place_codebook_optimizer": torch.optim.SGD},
            NotImplementedError,
            "implicit_neural_codebook together with in_place_codebook_optimizer",
        ),
    ],
)
def test_messages_of_the_constructor(options, error, message):
    with pytest.raises(error, match=message):
        ResidualVQ(**BASE | options)


def test_messages():
    module = ResidualVQ(**BASE)
    x = normal(2, 6, 8)
    with pytest.raises(ValueError, match=r"x must be \(B, L, 8\) or \(B, 8\), got shape \(2, 6, 7"):
        module(x[..., :7])
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 6\), got \(2, 5\)"):
        module(x, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        module(x, mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"indices must have shape \(2, 6, 3\), got \(2, 6, 2\)"):
        module(x, indices=torch.zeros(2, 6, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="indices must be those of all stages"):
        module(x, indices=torch.full((2, 6, 3), -1))
    with pytest.raises(NotImplementedError, match="indices together with beam search"):
        module(x, indices=torch.zeros(2, 6, 3, dtype=torch.int64), beam_size=2)
    with pytest.raises(ValueError, match=r"Q = 3 stages, got shape \(2, 6, 2\); quantize_dropout"):
        module.get_codes_from_indices(torch.zeros(2, 6, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs a commitment_weight above 0"):
        ResidualVQ(**BASE, commitment_weight=0.0)(x, beam_size=2)
    with pytest.raises(NotImplementedError, match="beam search with implicit_neural_codebook"):
        ResidualVQ(**BASE, implicit_neural_codebook=True)(x, beam_size=2)
    images = ResidualVQ(**BASE, accept_image_fmap=True)
    with pytest.raises(ValueError, match=r"x must be \(B, 8, height, width\), got shape \(2, 6, 8"):
        images(x)
    with pytest.raises(ValueError, match="mask is for x of shape"):
        images(normal(2, 8, 3, 3), mask=torch.ones(2, 9, dtype=torch.bool))
    dropping = ResidualVQ(**BASE, quantize_dropout=True, beam_size=2)
    with pytest.raises(NotImplementedError, match="beam search with quantize_dropout"):
        dropping(x, rand_quantize_dropout_fixed_seed=torch.tensor(1))


def test_messages_of_groups():
    with pytest.raises(ValueError, match="groups must divide dim = 8, got 3"):
        GroupedResidualVQ(**BASE, groups=3)
    module = GroupedResidualVQ(**BASE, groups=2)
    with pytest.raises(ValueError, match=r"x must be \(B, L, 8\) or \(B, 8\), got shape \(2, 4\)"):
        module(normal(2, 4))
    with pytest.raises(ValueError, match="indices must be of 2 groups, got 3 of them"):
        module(normal(2, 6, 8), indices=torch.zeros(3, 2, 6, 3, dtype=torch.int64))
