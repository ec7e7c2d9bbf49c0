"""What all quantisers do alike: export, empty batches, tensors without numbers, autocast,
activation checkpointing."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from cases import normal
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mmfast import nn

BASE = {"dim": 8, "codebook_size": 16}
STAGES = BASE | {"num_quantizers": 2}
BY_GRADIENT = {"learnable_codebook": True, "ema_update": False}

MODULES = {
    "VectorQuantize": (nn.VectorQuantize, BASE | {"heads": 2, "codebook_dim": 3}),
    "cosine": (
        nn.VectorQuantize,
        BASE | {"use_cosine_sim": True, "threshold_ema_dead_code": 2, "orthogonal_reg_weight": 1},
    ),
    "affine": (nn.VectorQuantize, BASE | {"affine_param": True, "straight_through": True}),
    "cross_entropy": (
        nn.VectorQuantize,
        BASE | BY_GRADIENT | {"commitment_use_cross_entropy_loss": True},
    ),
    "diversity": (nn.VectorQuantize, BASE | {"codebook_diversity_loss_weight": 0.1}),
    "ResidualVQ": (nn.ResidualVQ, STAGES | {"shared_codebook": True}),
    "implicit": (nn.ResidualVQ, STAGES | {"implicit_neural_codebook": True}),
    "beam": (nn.ResidualVQ, STAGES | {"beam_size": 2}),
    "GroupedResidualVQ": (nn.GroupedResidualVQ, STAGES | {"groups": 2}),
    "FSQ": (nn.FSQ, {"levels": [5, 4, 3], "dim": 8}),
    "GroupedResidualFSQ": (
        nn.GroupedResidualFSQ,
        {"levels": [5, 4], "dim": 8, "groups": 2, "num_quantizers": 2},
    ),
    "LFQ": (nn.LFQ, BASE | {"frac_per_sample_entropy": 0.5, "commitment_loss_weight": 1.0}),
    "ResidualLFQ": (nn.ResidualLFQ, STAGES | {"spherical": True}),
    "ResidualSimVQ": (nn.ResidualSimVQ, STAGES),
    "RandomProjectionQuantizer": (
        nn.RandomProjectionQuantizer,
        BASE | {"codebook_dim": 4, "num_codebooks": 2},
    ),
}


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, True) for name in MODULES), ("VectorQuantize", False), ("ResidualVQ", False)],
)
def test_exports_through_a_file(name, training):
    make, options = MODULES[name]
    torch.manual_seed(0)
    module = make(**options).train(training)
    if name == "affine":
        module(normal(2, 6, 8))  # which makes its buffers
    expected = copy.deepcopy(module)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(module, (normal(2, 6, 8),), dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for step in range(2):
        x = normal(3, 9 + step, 8, seed=step)
        results = []
        for m in (loaded, expected):
            torch.manual_seed(step)
            results.append(m(x))
        torch.testing.assert_close(*results)
        assert type(results[0]) is type(results[1])
    for key, value in expected.state_dict().items():  # what training has moved
        torch.testing.assert_close(loaded.state_dict()[key], value)


@pytest.mark.parametrize("shape", [(0, 6, 8), (2, 0, 8)])
@pytest.mark.parametrize("name", MODULES)
def test_an_empty_batch_is_no_loss_and_moves_nothing_to_nan(name, shape):
    make, options = MODULES[name]
    module = make(**options)
    outputs = [module(torch.zeros(shape, requires_grad=True))]
    while isinstance(outputs[0], tuple):
        outputs = [*outputs[0], *outputs[1:]]
    assert outputs[0].shape[:2] == shape[:2]
    for output in outputs:
        assert output.isfinite().all()
    trained = [output for output in outputs if output.requires_grad]
    if trained:
        sum(output.sum() for output in trained).backward()
    for key, value in module.state_dict().items():
        assert value.isfinite().all(), key


@pytest.mark.parametrize("name", MODULES)
def test_tensors_without_numbers(name):
    make, options = MODULES[name]
    module = make(**options)
    shapes = [t.shape for t in torch.utils._pytree.tree_leaves(module(normal(2, 6, 8)))]
    with FakeTensorMode():
        fake = make(**options)(torch.zeros(2, 6, 8))
    meta = module.to("meta")(torch.zeros(2, 6, 8, device="meta"))
    for result in (fake, meta):
        assert [t.shape for t in torch.utils._pytree.tree_leaves(result)] == shapes


@pytest.mark.parametrize("name", MODULES)
def test_half_inputs_under_autocast(name):
    make, options = MODULES[name]
    torch.manual_seed(0)
    module = make(**options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(normal(2, 6, 8).bfloat16().requires_grad_())
    for key, value in module.state_dict().items():
        assert value.dtype not in (torch.bfloat16, torch.float16), key
        assert value.isfinite().all(), key


MOVING = {"VectorQuantize", "cosine", "affine", "diversity", "ResidualVQ", "beam", "plain"}
MOVING |= {"GroupedResidualVQ", "in_place"}
IN_PLACE = {"in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
CHECKPOINTED = {
    **MODULES,
    "plain": (nn.VectorQuantize, BASE),
    "learnable": (nn.VectorQuantize, BASE | BY_GRADIENT),
    "in_place": (nn.VectorQuantize, BASE | BY_GRADIENT | IN_PLACE),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", sorted(CHECKPOINTED.keys() - {"RandomProjectionQuantizer"}))
def test_activation_checkpointing(name, reentrant):
    """The same gradients and state, or, where the codebook would move twice, an error."""
    make, options = CHECKPOINTED[name]
    torch.manual_seed(0)
    module = make(**options)

    def step(module, checkpointing):
        x = normal(2, 6, 8).requires_grad_()
        torch.manual_seed(1)
        run = functools.partial(checkpoint, module, use_reentrant=reentrant)
        leaves = torch.utils._pytree.tree_leaves((run if checkpointing else module)(x))
        sum(t.square().sum() for t in leaves if t.requires_grad).backward()
        return [x.grad, *(p.grad for p in module.parameters()), *module.buffers()]

    def same(module):
        for a, b in zip(step(copy.deepcopy(module), True), step(module, False), strict=True):
            torch.testing.assert_close(a, b)

    if name not in MOVING:
        same(module)
        return
    # A reentrant checkpoint has no gradients in its forward.
    with pytest.raises(RuntimeError, match=r"would move twice|does not require grad"):
        step(copy.deepcopy(module), True)
    if name != "affine":  # whose averages follow in eval mode, too
        same(make(**options, freeze_codebook=True))
