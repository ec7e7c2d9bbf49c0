"""FSQ, ResidualFSQ and GroupedResidualFSQ as drop-ins for the peer's."""

from __future__ import annotations

import pytest
import torch
from cases import normal

from mmfast.nn import FSQ, GroupedResidualFSQ, ResidualFSQ

peer = pytest.importorskip("vector_quantize_pytorch")

FSQS = {
    "plain": ({"levels": [8, 5, 4]}, (2, 30, 3)),
    "image": ({"levels": [8, 5, 4]}, (2, 3, 5, 6)),
    "video": ({"levels": (8, 5, 4)}, (2, 3, 2, 5, 6)),
    "projected": ({"levels": [8, 5], "dim": 7}, (2, 30, 7)),
    "projected image": ({"levels": [8, 5], "dim": 7, "channel_first": True}, (2, 7, 5)),
    "no bias": ({"levels": [8, 5], "dim": 7, "projection_has_bias": False}, (2, 30, 7)),
    "codebooks": ({"levels": [8, 5, 4], "num_codebooks": 2}, (2, 30, 6)),
    "codebooks of an image": ({"levels": [8, 5], "num_codebooks": 2}, (2, 4, 5, 6)),
    "kept": ({"levels": [8, 5], "keep_num_codebooks_dim": True}, (2, 30, 2)),
    "no indices": ({"levels": [8, 5], "return_indices": False}, (2, 30, 2)),
    "symmetric": ({"levels": [2, 5, 4], "preserve_symmetry": True}, (2, 30, 3)),
    "noise": (
        {"levels": [8, 5, 4], "preserve_symmetry": True, "noise_dropout": 0.4},
        (2, 30, 3),
    ),
    "noise of an image": (
        {"levels": [8, 5], "preserve_symmetry": True, "noise_dropout": 0.4},
        (2, 2, 5, 6),
    ),
    "hard": ({"levels": [8, 5, 4], "bound_hard_clamp": True}, (2, 30, 3)),
    "rotated": ({"levels": [5, 5, 5], "orthogonal_rotation": True}, (2, 30, 3)),
}
SMALL = {"levels": [8, 5], "num_quantizers": 2}
CLAMPED = SMALL | {"bound_hard_clamp": False}
ALONE = SMALL | {"num_quantizers": 1}
DROPPING = ALONE | {"quantize_dropout": True, "quantize_dropout_cutoff_index": 2}
RESIDUALS = {
    "plain": ({"levels": [8, 5, 4], "num_quantizers": 3}, (2, 30, 3)),
    "projected": ({"levels": [5, 5], "num_quantizers": 3, "dim": 7}, (2, 30, 7)),
    "tanh": (CLAMPED | {"soft_clamp_input_value": 1.5}, (2, 30, 2)),
    "list of clamps": (CLAMPED | {"soft_clamp_input_value": [1.5, 2.0]}, (2, 30, 2)),
    "one": (ALONE, (2, 30, 2)),
    "nothing to drop": (DROPPING, (2, 30, 2)),
    "kept": (SMALL | {"keep_num_codebooks_dim": True}, (2, 30, 2)),
}


def pair(name: str, options: dict, mine: type) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The peer's module and mine, of the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(peer, name)(**options)
    ours = mine(**options)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return theirs, ours


def gradients(module: torch.nn.Module, x: torch.Tensor, seed: int = 0):
    """Outputs of a call, and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out, *others = module(x)
    weight = normal(*out.shape, seed=1)
    parameters = [x, *module.parameters()]
    return out, *others, *torch.autograd.grad((out * weight).sum(), parameters)


def check_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
        elif b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FSQS)
def test_fsq(case, training):
    options, shape = FSQS[case]
    theirs, ours = pair("FSQ", options, FSQ)
    theirs.train(training)
    ours.train(training)
    x = normal(*shape)
    got, want = gradients(ours, x), gradients(theirs, x)
    check_same(got, want)
    indices = got[1]
    if indices is None:
        return
    assert indices.dtype == want[1].dtype
    check_same([ours.indices_to_codes(indices)], [theirs.indices_to_codes(indices)])
    if not (training and ours.noise_dropout):
        check_same([ours.indices_to_codes(indices)], [got[0]])
    check_same([ours.implicit_codebook], [theirs.implicit_codebook])
    z = normal(9, ours.codebook_dim, seed=3)
    check_same([ours.quantize(z)], [theirs.quantize(z)])
    check_same(
        [ours.codes_to_indices(ours.quantize(z))], [theirs.codes_to_indices(theirs.quantize(z))]
    )
    check_same([ours.indices_to_level_indices(indices)], [theirs.indices_to_level_indices(indices)])
    assert ours.codebook_size == theirs.codebook_size


def test_fsq_in_half_precision():
    ours = FSQ([8, 5, 4])
    x = normal(2, 30, 3).bfloat16()
    quantized, indices = ours(x)
    want = FSQ([8, 5, 4])(x.float())
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(quantized, want[0].bfloat16())
    assert torch.equal(indices, want[1])


@pytest.mark.parametrize("case", RESIDUALS)
def test_residual_fsq(case):
    options, shape = RESIDUALS[case]
    theirs, ours = pair("ResidualFSQ", options, ResidualFSQ)
    x = normal(*shape)
    got, want = gradients(ours, x), gradients(theirs, x)
    check_same(got, want)
    assert got[1].dtype == want[1].dtype
    check_same(ours(x, return_all_codes=True), theirs(x, return_all_codes=True))
    output = ours.get_output_from_indices(got[1])
    check_same([output], [theirs.get_output_from_indices(want[1])])
    check_same([output.reshape(shape)], [got[0]])
    check_same([ours.codebooks, ours.scales], [theirs.codebooks, theirs.scales])


def test_residual_fsq_of_images():
    options = {"levels": [8, 5, 4], "num_quantizers": 2, "is_channel_first": True}
    theirs, ours = pair("ResidualFSQ", options, ResidualFSQ)
    x = normal(2, 3, 5, 6)
    check_same(ours(x), theirs(x))
    quantized, indices, codes = ours(x, return_all_codes=True)
    assert indices.shape == (2, 2, 5, 6)
    check_same([codes.sum(0).movedim(-1, 1)], [quantized])
    check_same([ours.get_output_from_indices(indices)], [quantized])
    flat = ResidualFSQ(levels=[8, 5, 4], num_quantizers=2)
    check_same([flat(x.movedim(1, -1))[0].movedim(-1, 1)], [quantized])


@pytest.mark.parametrize("multiple", [1, 2])
def test_quantize_dropout(multiple):
    options = {
        "levels": [8, 5, 4],
        "num_quantizers": 4,
        "quantize_dropout": True,
        "quantize_dropout_cutoff_index": 1,
        "quantize_dropout_multiple_of": multiple,
    }
    theirs, ours = pair("ResidualFSQ", options, ResidualFSQ)
    x = normal(2, 30, 3)
    for seed in range(6):
        got = ours(x, rand_quantize_dropout_fixed_seed=seed)
        want = theirs(x, rand_quantize_dropout_fixed_seed=seed)
        check_same(got, (want[0], want[1].to(torch.int32)))
    used = {int((ours(x)[1] >= 0).all(0).all(0).sum()) for _ in range(40)}
    assert used == ({2, 3, 4} if multiple == 1 else {2, 4})
    indices = ours.eval()(x)[1][..., :2]
    check_same([ours.get_output_from_indices(indices)], [theirs.get_output_from_indices(indices)])


def test_grouped_residual_fsq():
    options = {"dim": 8, "groups": 2, "levels": [8, 5, 4], "num_quantizers": 2}
    theirs, ours = pair("GroupedResidualFSQ", options, GroupedResidualFSQ)
    x = normal(2, 30, 8)
    check_same(gradients(ours, x), gradients(theirs, x))
    got = ours(x, return_all_codes=True)
    want = theirs(x, return_all_codes=True)
    check_same(got[:2], want[:2])
    check_same(got[2], want[2])
    check_same([ours.get_output_from_indices(got[1])], [got[0]])
    check_same([ours.get_codes_from_indices(got[1])], [theirs.get_codes_from_indices(got[1])])
    check_same([ours.codebooks], [theirs.codebooks])
    images = GroupedResidualFSQ(**options, accept_image_fmap=True)
    images.load_state_dict(ours.state_dict())
    as_image = images(x.movedim(1, 2)[..., None])
    check_same([as_image[0]], [got[0].movedim(1, 2)[..., None]])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: FSQ([8, 5, 4], dim=6, preserve_symmetry=True, noise_dropout=0.1), (2, 6, 5, 4)),
        (lambda: ResidualFSQ(levels=[8, 5], num_quantizers=3, quantize_dropout=True), (2, 9, 2)),
        (
            lambda: GroupedResidualFSQ(
                dim=4, groups=2, levels=[8, 5], num_quantizers=2, quantize_dropout=True
            ),
            (2, 9, 4),
        ),
    ],
    ids=["FSQ", "ResidualFSQ", "GroupedResidualFSQ"],
)
def test_compiles_without_a_break(make, shape, training):
    torch.compiler.reset()
    module = make().train(training)
    x = normal(*shape).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, indices = compiled(x)
    out.sum().backward()
    assert x.grad.isfinite().all()
    if not training:
        want, want_indices = module(x)
        assert torch.equal(out, want)
        assert torch.equal(indices, want_indices)


def test_messages():
    with pytest.raises(
        ValueError, match=r"at least 3, or 2 with preserve_symmetry=True, got \[2, 5\]"
    ):
        FSQ([2, 5])
    with pytest.raises(ValueError, match="noise_dropout needs preserve_symmetry=True"):
        FSQ([5, 5], noise_dropout=0.1)
    with pytest.raises(ValueError, match="keep_num_codebooks_dim must be True for 2 codebooks"):
        FSQ([5, 5], num_codebooks=2, keep_num_codebooks_dim=False)
    with pytest.raises(ValueError, match="x must have 2 channels, got 3"):
        FSQ([5, 5])(normal(2, 4, 3))
    with pytest.raises(ValueError, match="soft_clamp_input_value needs bound_hard_clamp=False"):
        ResidualFSQ(levels=[5, 5], num_quantizers=2, soft_clamp_input_value=2.0)
    with pytest.raises(ValueError, match="dim must be a multiple of groups = 3, got 4"):
        GroupedResidualFSQ(dim=4, groups=3, levels=[5, 5], num_quantizers=2)
    for name, expected, given in (
        ("num_codebooks", 1, 2),
        ("return_indices", True, False),
        ("channel_first", False, True),
    ):
        message = f"{name} must be {expected} in a residual quantiser, got {given}"
        with pytest.raises(ValueError, match=message):
            ResidualFSQ(levels=[5, 5], num_quantizers=2, **{name: given})
    with pytest.raises(TypeError, match="nonsense"):
        FSQ([5, 5], nonsense=1)
    residual = ResidualFSQ(levels=[5, 5], num_quantizers=3)
    with pytest.raises(ValueError, match="Q = 3 stages"):
        residual.get_codes_from_indices(torch.zeros(1, 4, 2, dtype=torch.int32))
