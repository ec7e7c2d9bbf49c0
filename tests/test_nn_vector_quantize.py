"""nn.VectorQuantize: step by step with vector-quantize-pytorch, and what that one does not do."""

from __future__ import annotations

import copy
import itertools

import nn_ranks
import pytest
import torch
from cases import normal
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmfast
from mmfast.nn import LossBreakdown, VectorQuantize, losses, similarity
from mmfast.nn.dead_codes import replacements
from mmfast.nn.ranks import Sharing

STEPS = 20
LEARNS = {"learnable_codebook": True, "ema_update": False}
STILL = {"ema_update": False}
HEADS = {"heads": 2, "separate_codebook_per_head": True}
IMAGE = {"accept_image_fmap": True}


def some(step: int) -> torch.Tensor:
    """A mask for two sequences of 15."""
    return normal(2, 15, seed=step) < 0.5


def spread_codes(embed: torch.Tensor) -> torch.Tensor:
    """Codes of their own for each of 2 x 15 vectors."""
    return embed[:, None, None] * torch.linspace(0.5, 1.5, 30).view(1, 2, 15, 1, 1)


# Options of the module, arguments of the forward (of the step, if a function), shape of the input.
# The peer overwrites its codebook before the gradient is taken, which then is another one for
# losses on distances: these are compared without updates.
PEER = {
    "plain": ({}, {}, (2, 15, 8)),
    "straight_through": ({"rotation_trick": False}, {}, (2, 15, 8)),
    "cosine": ({"use_cosine_sim": True}, {}, (2, 15, 8)),
    "projection": ({"codebook_dim": 4, "layernorm_after_project_in": True}, {}, (2, 15, 8)),
    "shared_heads": ({"heads": 4, "codebook_dim": 3}, {}, (2, 15, 8)),
    "separate_heads": ({"use_cosine_sim": True, **HEADS}, {}, (2, 15, 8)),
    "kmeans": ({"kmeans_init": True, **HEADS}, {}, (2, 15, 8)),
    "kmeans_cosine": ({"kmeans_init": True, "use_cosine_sim": True}, {}, (2, 15, 8)),
    "kmeans_masked": ({"kmeans_init": True}, {"mask": some}, (2, 15, 8)),
    "learnable": (LEARNS, {}, (2, 15, 8)),
    "sync_update": ({"sync_update_v": 0.3, "rotation_trick": False, **LEARNS}, {}, (2, 15, 8)),
    "directional": (
        {"directional_reparam": True, "threshold_ema_dead_code": 1e-9},
        {},
        (2, 15, 8),
    ),
    "orthogonal": (
        {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True},
        {},
        (2, 15, 8),
    ),
    "orthogonal_some": (
        {"orthogonal_reg_weight": 1.0, "orthogonal_reg_max_codes": 9, **LEARNS},
        {},
        (2, 15, 8),
    ),
    "diversity": (
        {"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 3.0, **LEARNS},
        {},
        (2, 15, 8),
    ),
    "cross_entropy": ({"commitment_use_cross_entropy_loss": True, **STILL}, {}, (2, 15, 8)),
    "cross_entropy_heads": (
        {"commitment_use_cross_entropy_loss": True, **HEADS, **STILL},
        {},
        (2, 15, 8),
    ),
    "affine": ({"affine_param": True}, {"mask": some}, (2, 15, 8)),
    "affine_learnable": ({"affine_param": True, **LEARNS}, {}, (2, 15, 8)),
    "in_place": (
        {"in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.5), **LEARNS},
        {"mask": some},
        (2, 15, 8),
    ),
    "sampling": ({"stochastic_sample_codes": True}, {"sample_codebook_temp": 0.5}, (2, 15, 8)),
    "soft": (
        {
            "straight_through": True,
            "stochastic_sample_codes": True,
            "rotation_trick": False,
            "route_gradients_to_input": False,
            **STILL,
        },
        {},
        (2, 15, 8),
    ),
    "manual": ({"manual_ema_update": True}, {}, (2, 15, 8)),
    "not_routed": ({"route_gradients_to_input": False, **LEARNS}, {}, (2, 15, 8)),
    "no_commitment": ({"commitment_weight": 0.0}, {}, (2, 15, 8)),
    "masked": ({"return_zeros_for_masked_padding": False}, {"mask": some}, (2, 15, 8)),
    "masked_learnable": (LEARNS, {"mask": some}, (2, 15, 8)),
    "lens": ({}, {"lens": lambda step: torch.tensor([7 + step % 5, 15])}, (2, 15, 8)),
    "topk": ({}, {"topk": 3, "mask": some}, (2, 15, 8)),
    "topk_image": ({**IMAGE, **LEARNS}, {"topk": 3}, (2, 8, 5, 3)),
    "one": ({"channel_last": False, "heads": 2}, {}, (30, 8)),
    "channel_first": ({"channel_last": False}, {}, (2, 8, 15)),
    "image": ({"heads": 2, **IMAGE}, {}, (2, 8, 5, 3)),
    "volume": ({"accept_3d_fmap": True}, {}, (2, 8, 3, 1, 5)),
    "weight": ({}, {"ema_update_weight": lambda step: torch.linspace(0, 1, 12)}, (2, 15, 8)),
    "weight_of_statistics": (
        {},
        {"ema_update_weight": lambda step: lambda sums, counts: counts / counts.sum()},
        (2, 15, 8),
    ),
    "accumulated": ({}, {"accum_ema_update": lambda step: step % 3 != 2}, (2, 15, 8)),
    "frozen_at_times": (LEARNS, {"freeze_codebook": lambda step: step % 2 == 0}, (2, 15, 8)),
    "updated_at_times": ({}, {"ema_update": lambda step: step % 3 != 1}, (2, 15, 8)),
    "codes_of_each_vector": (
        {"use_cosine_sim": True, **STILL},
        {"codebook_transform_fn": lambda step: spread_codes},
        (2, 15, 8),
    ),
}


def both(**options):
    """A module of each kind, from one seed."""
    peer = pytest.importorskip("vector_quantize_pytorch")
    modules = []
    for kind in (VectorQuantize, peer.VectorQuantize):
        torch.manual_seed(0)
        modules.append(kind(dim=8, codebook_size=12, **options))
    return modules


def same_states(ours, theirs, **tolerances):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype)
        torch.testing.assert_close(tensor, theirs[name], msg=name, **tolerances)


def train_step(module, optimizer, x, weight, seed, arguments):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    quantized, indices, loss, parts = module(x, return_loss_breakdown=True, **arguments)
    optimizer.zero_grad()
    shape = (*quantized.shape[: weight.dim()], *(1,) * (quantized.dim() - weight.dim()))
    weight = weight if shape == weight.shape else 1
    ((quantized * weight).sum() * 0.01 + loss.sum()).backward()
    optimizer.step()
    return [quantized, indices, loss, x.grad, *parts]


@pytest.mark.parametrize("case", PEER)
def test_follows_the_peer(case):
    options, arguments, shape = PEER[case]
    modules = both(**options)
    if not options.get("affine_param"):  # whose first numbers are the peer's uninitialised memory
        same_states(*modules, rtol=0, atol=0)
    spare = torch.nn.Parameter(torch.zeros(()))
    optimizers = [torch.optim.SGD([*m.parameters(), spare], lr=0.05) for m in modules]
    for step in range(STEPS):
        x, weight = normal(*shape, seed=2 * step), normal(*shape, seed=2 * step + 1)
        given = {k: v(step) if callable(v) else v for k, v in arguments.items()}
        ours, theirs = (
            train_step(m, o, x, weight, step, given)
            for m, o in zip(modules, optimizers, strict=True)
        )
        assert torch.equal(ours[1], theirs[1])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        same_states(*modules, rtol=1e-4, atol=1e-5)
    for module in modules:
        module.eval()
    given = {k: v for k, v in given.items() if k in ("mask", "lens", "topk")}
    for a, b in zip(*(m(x, **given) for m in modules), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, LEARNS, {"freeze_codebook": True, **LEARNS}, {"orthogonal_reg_weight": 1.0}]
)
def test_losses_of_the_nearest_codes_have_gradients_in_eval_mode(options):
    found = []
    for module in both(codebook_dim=4, **options):
        x = normal(2, 15, 8).requires_grad_()
        module.eval()(x, topk=2, mask=some(0))[2].square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["projection", "separate_heads", "learnable"])
def test_checkpoints_load_both_ways(case):
    ours, theirs = both(**PEER[case][0])
    ours(normal(2, 15, 8))
    theirs.load_state_dict(ours.state_dict())
    same_states(ours, theirs, rtol=0, atol=0)
    theirs(normal(2, 15, 8, seed=1))
    ours.load_state_dict(theirs.state_dict())
    same_states(ours, theirs, rtol=0, atol=0)


def test_checkpoint_with_affine_statistics():
    ours, theirs = both(affine_param=True)
    theirs(normal(2, 15, 8))
    ours.load_state_dict(theirs.state_dict())
    same_states(ours, theirs, rtol=0, atol=0)


def test_checkpoint_says_whether_it_is_initialised():
    first, second = both(kmeans_init=True)[0], both(kmeans_init=True)[0]
    first(normal(2, 15, 8))
    second.load_state_dict(first.state_dict())
    second.eval()(normal(2, 15, 8, seed=1))
    assert torch.equal(first.codebook, second.codebook)


@pytest.mark.parametrize("heads", [{}, {"heads": 2}, HEADS], ids=["one", "shared", "separate"])
def test_cross_entropy_of_given_indices(heads):
    modules = both(**heads, **STILL)
    indices = torch.randint(0, 12, (2, 15, 2)[: 3 if heads else 2])
    indices[0, 0] = -1
    for a, b in zip(*(m(normal(2, 15, 8), indices=indices) for m in modules), strict=True):
        torch.testing.assert_close(a, b)


def test_bridge():
    bridge = torch.nn.Linear(8, 8)
    modules = both(vq_bridge=bridge)
    assert modules[0].learnable_codebook
    results = []
    for module in modules:
        bridge.zero_grad()
        quantized, indices, loss = module(normal(2, 15, 8))
        (quantized.square().sum() + loss).backward()
        results.append((quantized, indices, loss, bridge.weight.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cosine_sim": True},
        {"shared_codebook": True, "threshold_ema_dead_code": 1e-9},
        {"implicit_neural_codebook": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_under_the_peers_residual_quantiser(monkeypatch, options):
    residual = pytest.importorskip("vector_quantize_pytorch.residual_vq")
    modules = []
    for kind in (VectorQuantize, residual.VectorQuantize):
        monkeypatch.setattr(residual, "VectorQuantize", kind)
        torch.manual_seed(0)
        modules.append(residual.ResidualVQ(dim=8, codebook_size=12, num_quantizers=3, **options))
    for step in range(3):
        results = []
        for module in modules:
            torch.manual_seed(step)
            x = normal(2, 15, 8, seed=step).requires_grad_()
            quantized, indices, loss = module(x)
            (quantized.square().sum() + loss.sum()).backward()
            results.append((quantized, indices, loss, x.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        same_states(*modules, rtol=1e-4, atol=1e-5)


LAYOUTS = {
    "last": ({}, (2, 15, 8)),
    "one": ({}, (30, 8)),
    "first": ({"channel_last": False}, (2, 8, 15)),
    "image": (IMAGE, (2, 8, 5, 3)),
    "volume": ({"accept_3d_fmap": True}, (2, 8, 3, 1, 5)),
}


@pytest.mark.parametrize("heads", [{}, {"heads": 2}, HEADS], ids=["one", "shared", "separate"])
@pytest.mark.parametrize("dim", [8, 5], ids=["", "projected"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_give_the_output(layout, heads, dim):
    options, shape = LAYOUTS[layout]
    if dim == 8 and heads:
        dim = 4
    module = VectorQuantize(8, 12, codebook_dim=dim, **heads, **options).eval()
    x = normal(*shape)
    quantized, indices, loss = module(x)
    assert quantized.shape == x.shape
    assert loss == 0
    torch.testing.assert_close(module.get_output_from_indices(indices), quantized)
    # The same, codes found where they should.
    module.train()
    before = module._codebook.cluster_size.clone()
    by_hand = copy.deepcopy(module)
    by_hand.update_indices(x, indices)
    module(x)
    assert not torch.equal(module._codebook.cluster_size, before)
    assert torch.equal(module._codebook.embed, by_hand._codebook.embed)


def test_indices_of_no_code():
    module = VectorQuantize(8, 12).eval()
    indices = torch.tensor([[3, -1]])
    codes = module.get_codes_from_indices(indices)
    assert torch.equal(codes[0, 0], module.codebook[3])
    assert torch.equal(codes[0, 1], torch.zeros(8))
    module.update_indices(normal(1, 2, 8), indices)
    assert torch.equal(module._codebook.cluster_size[0, :3], torch.full((3,), 0.8))


@pytest.mark.parametrize("heads", [{}, {"heads": 2}, HEADS], ids=["one", "shared", "separate"])
@pytest.mark.parametrize("cosine", [False, True])
def test_masked_vectors_count_for_nothing(heads, cosine):
    torch.manual_seed(0)
    module = VectorQuantize(8, 12, codebook_dim=3, use_cosine_sim=cosine, **heads)
    alone = copy.deepcopy(module)
    x, mask = normal(2, 15, 8), some(0)
    changed = torch.where(mask[..., None], x, torch.nan)
    quantized, indices, loss = module(changed, mask=mask)
    expected = alone(x[mask][None])
    torch.testing.assert_close(quantized[mask], expected[0][0])
    assert torch.equal(indices[mask], expected[1][0])
    torch.testing.assert_close(loss, expected[2])
    assert (quantized[~mask] == 0).all()
    assert (indices[~mask] == -1).all()
    torch.testing.assert_close(module._codebook.embed, alone._codebook.embed)


def test_lens_where_channels_are_first():
    module = VectorQuantize(8, 12, channel_last=False).eval()
    _, indices, _ = module(normal(2, 8, 15), lens=torch.tensor([4, 15]))
    assert torch.equal((indices >= 0).sum(1), torch.tensor([4, 15]))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, LEARNS, {"affine_param": True}])
@pytest.mark.parametrize("shape", [(0, 15, 8), (2, 0, 8), (0, 8)])
def test_empty_batch(options, shape):
    threshold = {} if options is LEARNS else {"threshold_ema_dead_code": 2}
    module = VectorQuantize(8, 12, **options, **threshold)
    before = module.codebook.clone()
    for module.training in (True, False):
        quantized, indices, loss = module(normal(*shape))
        assert quantized.shape == shape
        assert indices.shape == shape[:-1]
        assert loss == 0
    # The averages shrink alike, sizes and sums.
    torch.testing.assert_close(module.codebook, before, rtol=1e-3, atol=1e-4)


def test_equal_vectors():
    module = VectorQuantize(8, 12, kmeans_init=True, threshold_ema_dead_code=1)
    with pytest.warns(UserWarning, match="a codebook of 12 codes is initialised from 6 vectors"):
        module(torch.ones(2, 3, 8))
    for _ in range(3):
        quantized, _, loss = module(torch.ones(2, 3, 8))
    torch.testing.assert_close(quantized, torch.ones(2, 3, 8))
    assert loss < 1e-8
    assert module.codebook.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"affine_param": True}, HEADS])
def test_a_nan_leaves_the_codebook_finite(options):
    module = VectorQuantize(8, 12, threshold_ema_dead_code=2, **options)
    reference = copy.deepcopy(module)
    module(normal(2, 15, 8))
    x = normal(2, 15, 8, seed=1)
    x[0, :5] = torch.nan
    x[1, 3, 2] = torch.inf
    with pytest.warns(RuntimeWarning, match="vectors that are not finite"):
        _, indices, loss = module(x)
    assert not loss.isfinite()
    assert ((indices >= 0) & (indices < 12)).all()
    for name, tensor in module.state_dict().items():
        assert tensor.isfinite().all(), name
        assert "embed" not in name or not torch.equal(tensor, reference.state_dict()[name])
    assert module._codebook.nonfinite_batches == 1
    with pytest.warns(RuntimeWarning, match="vectors that are not finite"):
        module(torch.full((2, 15, 8), torch.nan))
    assert all(t.isfinite().all() for t in module.state_dict().values())


def test_batches_that_are_not_finite_are_counted(recwarn):
    bad = torch.full((2, 15, 8), torch.nan)
    module = VectorQuantize(8, 12)
    module(normal(2, 15, 8))
    module.eval()(bad)
    module.train()(bad, mask=torch.zeros(2, 15, dtype=torch.bool))
    module(bad, freeze_codebook=True)
    assert module._codebook.nonfinite_batches == 0
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for x in (bad, normal(2, 15, 8), bad):
        compiled(x)
    assert module._codebook.nonfinite_batches == 2
    assert not [w for w in recwarn if w.category is RuntimeWarning]
    assert "_codebook.nonfinite_batches" not in module.state_dict()
    # Accumulated statistics count when they are taken; what was counted unseen is told then.
    module(bad, accum_ema_update=True)
    assert module._codebook.nonfinite_batches == 2
    with pytest.warns(RuntimeWarning, match="nonfinite_batches"):
        module(normal(2, 15, 8))
    assert module._codebook.nonfinite_batches == 3
    recwarn.clear()
    copy.deepcopy(module)(normal(2, 15, 8))
    assert not [w for w in recwarn if w.category is RuntimeWarning]


@pytest.mark.cuda
def test_a_nan_on_a_gpu_is_told_later():
    module = VectorQuantize(8, 12).cuda()
    module(normal(2, 15, 8).cuda())
    bad = torch.full((2, 15, 8), torch.nan, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.warns(RuntimeWarning, match="vectors that are not finite"):
        module(normal(2, 15, 8).cuda())


def test_initialisation_leaves_out_what_is_not_finite():
    module = VectorQuantize(8, 4, kmeans_init=True)
    x = normal(2, 15, 8)
    x[0, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        module(x)
    assert module.codebook.isfinite().all()
    with pytest.raises(ValueError, match="at least one finite vector, got none"):
        VectorQuantize(8, 4, kmeans_init=True)(torch.full((2, 3, 8), torch.nan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    module = VectorQuantize(8, 12, threshold_ema_dead_code=1, kmeans_init=True)
    module(normal(2, 15, 8))
    x = normal(2, 15, 8, seed=1, dtype=dtype).requires_grad_()
    expected, _ = mmfast.nearest_code(x, module.codebook)
    codes = module.codebook[expected]
    quantized, indices, loss = module(x)
    assert torch.equal(indices, expected)
    assert torch.equal(quantized, codes.to(dtype))
    (quantized.sum() + loss).backward()
    assert x.grad.dtype == dtype
    assert module.codebook.dtype == torch.float32


@pytest.mark.parametrize("rotation_trick", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_chosen_in_pieces_are_as_accurate(dtype, rotation_trick):
    """The one nearest code of ``topk`` is that of the op, with its loss and gradient."""
    torch.manual_seed(0)
    module = VectorQuantize(8, 12, freeze_codebook=True, rotation_trick=rotation_trick)
    results = []
    for topk in (None, 1):
        x = (3 * normal(2, 15, 8)).to(dtype).requires_grad_()
        quantized, indices, loss = module(x, topk=topk)
        quantized = quantized.view(x.shape)
        assert quantized.dtype == dtype
        ((quantized * normal(2, 15, 8, seed=1).to(dtype)).sum() + loss.mean()).backward()
        results.append((quantized.double(), indices.view(2, 15), loss.mean(), x.grad.double()))
    eps = 4 * torch.finfo(dtype).eps  # gradients of two outputs are added
    for a, b, rtol, atol in zip(*results, (eps, 0, 1e-6, eps), (eps, 0, 0, eps), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    module = VectorQuantize(8, 12, codebook_dim=4, use_cosine_sim=True)
    x = normal(2, 15, 8, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = module.project_in(x).to(dtype)
        unit = torch.nn.functional.normalize(inside, dim=-1, eps=1e-6)
        expected, _ = mmfast.nearest_code(unit, module.codebook, metric="dot")
        quantized, indices, loss = module(x)
    assert torch.equal(indices, expected)
    assert module.codebook.dtype == loss.dtype == torch.float32
    (quantized.sum() + loss).backward()
    assert x.grad.dtype == dtype


COMPILED = {
    "heads": {
        "heads": 2,
        "codebook_dim": 3,
        "use_cosine_sim": True,
        "threshold_ema_dead_code": 2,
    },
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1},
    "affine": {"affine_param": True, **HEADS},
    "losses": {
        "orthogonal_reg_weight": 1.0,
        "orthogonal_reg_active_codes_only": True,
        "orthogonal_reg_max_codes": 5,
        "codebook_diversity_loss_weight": 1.0,
    },
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiles(case):
    torch.manual_seed(0)
    module = VectorQuantize(8, 12, **COMPILED[case])
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(3):
        results = []
        for run in (compiled, eager):
            torch.manual_seed(step)
            x = normal(2, 15, 8, seed=step).requires_grad_()
            quantized, indices, loss = run(x, mask=some(0))
            (quantized.square().sum() + loss).backward()
            results.append((quantized, indices, loss, x.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        same_states(module, eager)
    module.eval(), eager.eval()
    for a, b in zip(compiled(x, mask=some(0)), eager(x, mask=some(0)), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_compiled_gradients_are_those_of_the_codes_before_they_moved():
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = VectorQuantize(8, 12, decay=0.0, orthogonal_reg_weight=1.0)
    module = copy.deepcopy(eager)
    results = []
    for m in (torch.compile(module, fullgraph=True), eager):  # inductor elides clones
        x = normal(2, 15, 8).requires_grad_()
        quantized, _, loss = m(x)
        (quantized.square().sum() + loss).backward()
        results.append([x.grad, *(p.grad for p in eager.parameters() if m is eager)])
    results[0] += [p.grad for p in module.parameters()]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(module.state_dict(), eager.state_dict())


def test_compiling_wants_an_initialised_codebook():
    module = VectorQuantize(8, 12, kmeans_init=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"call init_codebook_\(x\), or forward once"):
        compiled(normal(2, 15, 8))
    module.init_codebook_(normal(2, 15, 8))
    before = module.codebook.clone()
    torch._dynamo.reset()
    compiled.eval()
    compiled(normal(2, 15, 8))
    assert module._codebook.initted
    assert torch.equal(module.codebook, before)


def test_exports():
    module = VectorQuantize(8, 12, codebook_dim=3, heads=2).eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (normal(2, 15, 8),), dynamic_shapes={"x": sizes})
    x = normal(3, 7, 8)
    for a, b in zip(program.module()(x), module(x), strict=True):
        torch.testing.assert_close(a, b)


def test_dead_codes_become_vectors():
    torch.manual_seed(0)
    module = VectorQuantize(8, 12, threshold_ema_dead_code=1)
    book = module._codebook
    book.cluster_size[:, 6:] = 9
    x = normal(1, 40, 8)
    module(x, mask=torch.arange(40)[None] < 30)
    # After the step, what the averages called dead are vectors of the batch, with the threshold's
    # size; none of them is a masked one, and no two are the same.
    is_vector = (book.embed[0][:, None] == x[0]).all(2)  # [K, N]
    new = is_vector.any(1)
    assert new.any()
    assert not new.all()
    assert not is_vector[:, 30:].any()
    assert is_vector.sum(0).max() == 1
    assert (book.cluster_size[0, new] == 1).all()
    assert torch.equal(book.embed_avg[0, new], book.embed[0, new])
    assert (book.cluster_size >= 1).all()
    module.eval()
    before = book.embed.clone()
    module.expire_codes_(10 * x)
    assert torch.equal(book.embed, before)
    module.train()
    book.cluster_size.zero_()
    module.expire_codes_(10 * x)
    assert (book.embed.norm(dim=-1) > 10).all()


@given(
    st.integers(0, 20), st.integers(1, 9), st.integers(1, 2), st.floats(0, 1), st.integers(0, 99)
)
def test_replacements(n, k, heads, share, seed):
    torch.manual_seed(seed)
    x = torch.arange(1.0, heads * n + 1).view(heads, n, 1)
    dead, inside = torch.rand(heads, k) < share, torch.rand(heads, n) < 0.6
    vectors, chosen = replacements(x, dead, inside, Sharing(False))
    assert not (chosen & ~dead).any()
    for head in range(heads):
        taken = vectors[head, chosen[head], 0]
        assert len(taken) == min(int(dead[head].sum()), int(inside[head].sum()))
        assert len(taken.unique()) == len(taken)
        assert torch.isin(taken, x[head, inside[head], 0]).all()


def test_replacements_can_be_any_vector_of_any_code():
    torch.manual_seed(0)
    x, dead = torch.arange(1.0, 6).view(1, 5, 1), torch.ones(1, 3, dtype=torch.bool)
    draws = [replacements(x, dead, None, Sharing(False))[0] for _ in range(200)]
    assert len(torch.cat(draws, 1).unique()) == 5
    few = [replacements(x[:, :1], dead, None, Sharing(False))[1] for _ in range(100)]
    assert (torch.cat(few).sum(0) > 10).all()


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_pieces(monkeypatch, metric):
    x = normal(2, 30, 5).requires_grad_()
    codes = normal(2, 7, 5, seed=1).requires_grad_()
    index = torch.randint(-1, 7, (2, 30))

    def everything():
        torch.manual_seed(0)
        chosen = similarity.choose(x, codes, metric, topk=3)
        drawn = similarity.choose(x, codes, metric, temperature=0.5)
        soft = similarity.expected_codes(x, codes, metric, 0.7)
        loss = similarity.cross_entropy(x, codes, index, metric)
        spread = similarity.diversity(x.view(2, 3, 10, 5), codes, metric, 2.0)
        total = soft.square().sum() + loss + spread
        return chosen, drawn, soft, loss, spread, *torch.autograd.grad(total, (x, codes))

    whole = everything()
    monkeypatch.setattr(similarity, "_WORKSPACE", 30)
    for position, (a, b) in enumerate(zip(everything(), whole, strict=True)):
        if position != 1:  # drawn in another order
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    nearest, _ = mmfast.nearest_code(x, codes, metric=metric)
    assert torch.equal(whole[0][:, :, 0], nearest)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize(
    "case",
    ["cosine", "learnable", "orthogonal", "diversity", "cross_entropy", "sampling", "soft", "topk"],
)
def test_nothing_of_n_times_k(monkeypatch, case):
    monkeypatch.setattr(similarity, "_WORKSPACE", 1024)
    options, arguments, _ = PEER[case]
    module = VectorQuantize(4, 128, threshold_ema_dead_code=1, **options)
    topk = {k: v for k, v in arguments.items() if k == "topk"}
    with Largest() as largest:
        quantized, _, loss = module(normal(16, 16, 4).requires_grad_(), **topk)
        (quantized.sum() + loss.sum()).backward()
    assert 0 < largest.elements < 256 * 128 // 8


@pytest.mark.parametrize(("k", "d"), [(9, 4), (3, 7)])
def test_orthogonal_loss(k, d):
    codes = normal(2, k, d)
    unit = torch.nn.functional.normalize(codes, dim=-1)
    expected = ((unit @ unit.mT).square().sum() / (2 * k * k)) - 1 / k
    torch.testing.assert_close(losses.orthogonal(codes), expected)


def test_gradients_are_those_of_the_codes_chosen():
    """Updates of the codebook in the forward do not change them."""
    torch.manual_seed(0)
    module = VectorQuantize(8, 12, commitment_use_cross_entropy_loss=True, decay=0.1)
    still = copy.deepcopy(module)
    gradients = []
    for each, frozen in ((module, False), (still, True)):
        x = normal(2, 15, 8).requires_grad_()
        each(x, freeze_codebook=frozen)[2].backward()
        gradients.append(x.grad)
    assert not torch.equal(module.codebook, still.codebook)
    assert torch.equal(*gradients)


def test_manual_steps():
    module = VectorQuantize(8, 12, manual_ema_update=True)
    automatic = copy.deepcopy(module)
    automatic._codebook.manual_ema_update = False
    before = module.codebook.clone()
    module(normal(2, 15, 8)), automatic(normal(2, 15, 8))
    assert torch.equal(module.codebook, before)
    module._codebook.update_ema()
    torch.testing.assert_close(module.codebook, automatic.codebook)

    options = {
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.5),
        "manual_in_place_optimizer_update": True,
    }
    module = VectorQuantize(8, 12, **options, **LEARNS)
    before = module.codebook.detach().clone()
    parts = module(normal(2, 15, 8), return_loss_breakdown=True)[3]
    assert isinstance(parts, LossBreakdown)
    assert parts.inplace_optimize > 0
    assert torch.equal(module.codebook, before)
    module.update_in_place_optimizer()
    assert not torch.equal(module.codebook, before)


def test_set_codebook():
    for heads, shape in (({}, (12, 8)), (HEADS, (2, 12, 4))):
        module = VectorQuantize(8, 12, codebook_dim=shape[-1], **heads)
        module.codebook = normal(*shape)
        assert torch.equal(module.codebook, normal(*shape))


def test_messages():
    for options, message in (
        ({"use_cosine_sim": True, **LEARNS}, "use_cosine_sim with learnable_codebook"),
        ({"learnable_codebook": True}, "ema_update with learnable_codebook"),
        ({"use_cosine_sim": True, "affine_param": True}, "use_cosine_sim with affine_param"),
        ({"directional_reparam": True}, "directional_reparam without threshold_ema_dead_code"),
        ({"sync_update_v": 0.5}, "sync_update_v without learnable_codebook"),
        ({"sync_update_v": -1}, "sync_update_v must be from 0 to 1, got -1"),
        ({"straight_through": True, "rotation_trick": True}, "more than one of straight_through"),
    ):
        with pytest.raises(ValueError, match=message):
            VectorQuantize(8, 12, **options)
    with pytest.raises(TypeError, match="codebook_sizes"):
        VectorQuantize(8, 12, codebook_sizes=3)
    module, x, mask = VectorQuantize(8, 12), normal(2, 15, 8), some(0)
    with pytest.raises(TypeError, match="mosk"):
        module(x, mosk=mask)
    with pytest.raises(TypeError, match=r"x must be float32.*got int64"):
        module(torch.zeros(2, 3, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        module(x, mask=mask.float())
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 15\), got \(2, 14\)"):
        module(x, mask=mask[:, 1:])
    with pytest.raises(ValueError, match=r"x must have dim = 8 channels, got shape \(2, 8, 15\)"):
        module(x.mT)
    with pytest.raises(ValueError, match="mask with lens"):
        module(x, mask=mask, lens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"x must be \(B, L, C\) or \(B, C\), got shape"):
        module(x[None])
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\), got shape \(2, 15, 8\)"):
        VectorQuantize(8, 12, accept_image_fmap=True)(x)
    with pytest.raises(ValueError, match="topk with more than one head"):
        VectorQuantize(8, 12, heads=2)(x, topk=2)
    with pytest.raises(NotImplementedError, match="topk with straight_through"):
        VectorQuantize(8, 12, straight_through=True)(x, topk=2)


def test_ranks_are_one(tmp_path):
    torch.multiprocessing.spawn(nn_ranks.work, (f"{tmp_path}/store", str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case in nn_ranks.CASES:
        indices, state = nn_ranks.train(case, slice(None))
        for name, tensor in state.items():
            assert torch.equal(first[case][1][name], second[case][1][name]), (case, name)
            torch.testing.assert_close(first[case][1][name], tensor, msg=f"{case}, {name}")
        for parts in itertools.zip_longest(first[case][0], second[case][0], indices):
            assert torch.equal(torch.cat(parts[:2]), parts[2]), case
