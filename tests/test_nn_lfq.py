"""LFQ, ResidualLFQ and GroupedResidualLFQ as drop-ins for the peer's."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from test_nn_fsq import check_same, pair

from mmfast.nn import LFQ, GroupedResidualLFQ, ResidualLFQ

peer = pytest.importorskip("vector_quantize_pytorch")

LFQS = {
    "plain": ({"dim": 5}, (2, 30, 5)),
    "image": ({"codebook_size": 32}, (2, 5, 4, 6)),
    "projected": ({"dim": 7, "codebook_size": 16}, (2, 30, 7)),
    "projected image": ({"dim": 7, "codebook_size": 16}, (2, 7, 4, 6)),
    "channel first": ({"dim": 7, "codebook_size": 16, "channel_first": True}, (2, 7, 9)),
    "no bias": ({"dim": 7, "codebook_size": 16, "projection_has_bias": False}, (2, 30, 7)),
    "cosine": ({"dim": 7, "codebook_size": 16, "cosine_sim_project_in": True}, (2, 30, 7)),
    "codebooks": ({"dim": 8, "codebook_size": 16, "num_codebooks": 2}, (2, 30, 8)),
    "codebooks of an image": ({"dim": 8, "codebook_size": 16, "num_codebooks": 2}, (2, 8, 3, 4)),
    "kept": ({"dim": 5, "keep_num_codebooks_dim": True}, (2, 30, 5)),
    "spherical": ({"dim": 5, "spherical": True, "codebook_scale": 0.5}, (2, 30, 5)),
    "commitment": ({"dim": 5, "commitment_loss_weight": 0.25, "diversity_gamma": 2.0}, (2, 30, 5)),
    "clamped": ({"dim": 5, "soft_clamp_input_value": 1.5}, (2, 30, 5)),
    "activation": ({"dim": 5, "straight_through_activation": torch.nn.Tanh()}, (2, 30, 5)),
    "spherical activation": (
        {"dim": 5, "straight_through_activation": torch.nn.Tanh(), "spherical": True},
        (2, 30, 5),
    ),
    "softplus": ({"dim": 5, "experimental_softplus_entropy_loss": True}, (2, 30, 5)),
    "rotated": (
        {"dim": 8, "codebook_size": 16, "num_codebooks": 2, "orthogonal_rotation": True},
        (2, 30, 8),
    ),
}
# At this temperature no probability is so small that the peer's logarithm cuts it off.
INV_TEMPERATURE = 0.3


def gradients(module, x, **more):
    """Outputs of a call, and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    (out, indices, loss), parts = module(x, INV_TEMPERATURE, return_loss_breakdown=True, **more)
    weight = normal(*out.shape, seed=1)
    parameters = [x, *module.parameters()] if module.training or module.has_projections else []
    wanted = (
        torch.autograd.grad((out * weight).sum() + loss, parameters, allow_unused=True)
        if parameters
        else ()
    )
    return out, indices, loss, *parts, *wanted


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", LFQS)
def test_lfq(case, training):
    options, shape = LFQS[case]
    theirs, ours = pair("LFQ", options, LFQ)
    theirs.train(training)
    ours.train(training)
    x = normal(*shape)
    got, want = gradients(ours, x), gradients(theirs, x)
    check_same(got, want)
    indices = got[1]
    assert indices.dtype == want[1].dtype
    check_same([ours.indices_to_codes(indices)], [theirs.indices_to_codes(indices)])
    check_same([ours.indices_to_codes(indices)], [got[0]])
    check_same(
        [ours.indices_to_codes(indices, project_out=False)],
        [theirs.indices_to_codes(indices, project_out=False)],
    )
    check_same([ours.codebook], [theirs.codebook])
    assert ours.dtype == theirs.dtype
    assert (ours.codebook_size, ours.codebook_dim) == (theirs.codebook_size, theirs.codebook_dim)
    result = ours(x)
    assert result._fields == theirs(x)._fields


@pytest.mark.parametrize("case", ["plain", "codebooks", "commitment"])
def test_mask(case):
    options, shape = LFQS[case]
    theirs, ours = pair("LFQ", options, LFQ)
    x, mask = normal(*shape).requires_grad_(), normal(*shape[:2], seed=2) < 0.4
    (_, _, loss), parts = ours(x, INV_TEMPERATURE, return_loss_breakdown=True, mask=mask)
    # The peer's own masks leave its means unaveraged.
    (_, _, expected), wanted = theirs(x[mask][None], INV_TEMPERATURE, return_loss_breakdown=True)
    check_same([loss, *parts], [expected, *wanted])
    check_same(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_mask_of_whole_samples():
    quantizer = LFQ(codebook_size=16, entropy_loss_weight=1.0, commitment_loss_weight=1.0)
    x = normal(3, 4, 5, 6)
    whole = torch.tensor([True, False, True])
    got = quantizer(x, INV_TEMPERATURE, return_loss_breakdown=True, mask=whole)
    each = whole[:, None].expand(3, 30)
    want = quantizer(x, INV_TEMPERATURE, return_loss_breakdown=True, mask=each)
    torch.testing.assert_close(got, want)
    assert float(got[0].entropy_aux_loss) != float(quantizer(x, INV_TEMPERATURE).entropy_aux_loss)


def test_a_fraction_of_the_vectors():
    x = normal(2, 50, 5)
    mask = normal(2, 50, seed=2) < 0.4
    for given in (None, mask):
        ours = LFQ(dim=5, frac_per_sample_entropy=0.5, commitment_loss_weight=1.0)
        whole = LFQ(dim=5, commitment_loss_weight=1.0)
        _, parts = ours(x, INV_TEMPERATURE, return_loss_breakdown=True, mask=given)
        _, expected = whole(x, INV_TEMPERATURE, return_loss_breakdown=True, mask=given)
        torch.testing.assert_close(parts.commitment, expected.commitment)
        assert parts.per_sample_entropy != expected.per_sample_entropy
        sampled = ours._sampled(x, given)
        inside = torch.ones(2, 50, dtype=torch.bool) if given is None else given
        assert sampled.sum() == inside.sum() // 2
        assert not (sampled & ~inside).any()


def test_the_fraction_is_the_peers():
    options = {"dim": 5, "frac_per_sample_entropy": 0.3, "commitment_loss_weight": 1.0}
    theirs, ours = pair("LFQ", options, LFQ)
    check_same(gradients(ours, normal(2, 25, 5)), gradients(theirs, normal(2, 25, 5)))


def test_entropy_by_groups():
    x = normal(2, 40, 20)
    module = LFQ(dim=20, spherical=True, entropy_group_bits=5)
    _, parts = module(x, 1.0, return_loss_breakdown=True)
    exact = LFQ(dim=20, spherical=True)
    _, expected = exact(x, 1.0, return_loss_breakdown=True)
    torch.testing.assert_close(parts.per_sample_entropy, expected.per_sample_entropy)
    assert parts.batch_entropy > expected.batch_entropy


RESIDUALS = {
    "plain": {"dim": 5, "codebook_size": 32, "num_quantizers": 3},
    "projected": {"dim": 7, "codebook_size": 16, "num_quantizers": 2},
    "clamped": {"dim": 4, "codebook_size": 16, "num_quantizers": 3, "soft_clamp_input_value": 2.0},
    "spherical": {"dim": 4, "codebook_size": 16, "num_quantizers": 2, "spherical": True},
    "kept": {
        "dim": 7,
        "codebook_size": 16,
        "num_quantizers": 2,
        "keep_num_codebooks_dim": True,
    },
}


@pytest.mark.parametrize("case", RESIDUALS)
def test_residual_lfq(case):
    options = {**RESIDUALS[case], "entropy_loss_weight": 0.0, "commitment_loss_weight": 0.5}
    theirs, ours = pair("ResidualLFQ", options, ResidualLFQ)
    x = normal(2, 30, options["dim"]).requires_grad_()
    mask = normal(2, 30, seed=2) < 0.4
    got, want = ours(x, mask), theirs(x, mask)
    check_same(got, want)
    weight = normal(*x.shape, seed=1)
    parameters = [x, *ours.parameters()]
    mine = torch.autograd.grad((got[0] * weight).sum() + got[2].sum(), parameters)
    parameters = [x, *theirs.parameters()]
    check_same(mine, torch.autograd.grad((want[0] * weight).sum() + want[2].sum(), parameters))
    check_same([ours.codebooks], [theirs.codebooks])
    quantized, indices, _, codes = ours(x, return_all_codes=True)
    check_same([ours.get_output_from_indices(indices).reshape(x.shape)], [quantized])
    check_same([ours.project_out(codes.sum(0)).reshape(x.shape)], [quantized])
    if case != "spherical":  # the peer's codes are not normalised
        check_same([codes], [theirs.get_codes_from_indices(indices)])


def test_residual_lfq_entropies():
    theirs, ours = pair("ResidualLFQ", {**RESIDUALS["plain"], "num_quantizers": 2}, ResidualLFQ)
    x = normal(2, 30, 5)
    # Without a temperature to choose, the peer's logarithms are cut off.
    torch.testing.assert_close(ours(x)[2], theirs(x)[2], rtol=0, atol=2e-3)


def test_residual_lfq_of_images():
    ours = ResidualLFQ(dim=7, codebook_size=16, num_quantizers=2)
    x = normal(2, 7, 3, 4)
    quantized, indices, _ = ours(x)
    flat, flat_indices, _ = ours(x.flatten(2).transpose(1, 2))
    check_same([quantized.flatten(2).transpose(1, 2)], [flat])
    assert torch.equal(indices.flatten(1, 2), flat_indices)
    grouped = GroupedResidualLFQ(
        dim=14, groups=2, codebook_size=16, num_quantizers=2, accept_image_fmap=True
    )
    for shape in ((2, 14, 3, 4), (2, 14, 5)):
        quantized, indices, _ = grouped(normal(*shape))
        check_same([grouped.get_output_from_indices(indices).movedim(-1, 1)], [quantized])


def test_residual_lfq_with_channels_first():
    options = {"dim": 4, "codebook_size": 16, "num_quantizers": 2, "channel_first": True}
    theirs, ours = pair("ResidualLFQ", options | {"entropy_loss_weight": 0.0}, ResidualLFQ)
    x = normal(2, 4, 9)
    check_same(ours(x), theirs(x))


def test_quantize_dropout():
    options = {**RESIDUALS["plain"], "quantize_dropout": True, "entropy_loss_weight": 0.0}
    theirs, ours = pair("ResidualLFQ", options, ResidualLFQ)
    x = normal(2, 30, 5)
    for seed in range(5):
        check_same(
            ours(x, rand_quantize_dropout_fixed_seed=seed),
            theirs(x, rand_quantize_dropout_fixed_seed=seed),
        )


def test_grouped_residual_lfq():
    options = {"dim": 8, "groups": 2, "codebook_size": 16, "num_quantizers": 2}
    options["entropy_loss_weight"] = 0.0
    theirs, ours = pair("GroupedResidualLFQ", options, GroupedResidualLFQ)
    x = normal(2, 30, 8)
    got = ours(x, return_all_codes=True)
    want = theirs(x, return_all_codes=True)
    check_same(got[:3], want[:3])
    check_same(got[3], want[3])
    check_same([ours.get_output_from_indices(got[1])], [got[0]])
    check_same(ours.get_codes_from_indices(got[1]), got[3])
    check_same([ours.codebooks], [theirs.codebooks])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (
            lambda: LFQ(
                dim=6, codebook_size=16, spherical=True, frac_per_sample_entropy=0.5,
                commitment_loss_weight=0.5,
            ),
            (2, 6, 5, 4),
        ),
        (
            lambda: ResidualLFQ(dim=4, codebook_size=16, num_quantizers=3, quantize_dropout=True),
            (2, 9, 4),
        ),
        (
            lambda: GroupedResidualLFQ(
                dim=4, groups=2, codebook_size=4, num_quantizers=2, quantize_dropout=True
            ),
            (2, 9, 4),
        ),
    ],
    ids=["LFQ", "ResidualLFQ", "GroupedResidualLFQ"],
)  # fmt: skip
def test_compiles_without_a_break(make, shape, training):
    torch.compiler.reset()
    module = make().train(training)
    x = normal(*shape).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, indices, loss = compiled(x)
    if training:
        (out.sum() + loss.sum()).backward()
        assert x.grad.isfinite().all()
    else:
        want = module(x)
        check_same((out, indices, loss), want)


def test_messages():
    with pytest.raises(ValueError, match="one of dim and codebook_size must be given"):
        LFQ()
    with pytest.raises(ValueError, match="codebook_size must be a power of 2, got 12"):
        LFQ(codebook_size=12)
    with pytest.raises(ValueError, match="soft_clamp_input_value must be at least codebook_scale"):
        LFQ(dim=4, soft_clamp_input_value=0.5)
    with pytest.raises(ValueError, match="frac_per_sample_entropy must be above 0"):
        LFQ(dim=4, frac_per_sample_entropy=0.0)
    with pytest.raises(ValueError, match="keep_num_codebooks_dim must be True for 2 codebooks"):
        LFQ(dim=4, num_codebooks=2, keep_num_codebooks_dim=False)
    with pytest.raises(ValueError, match="x must have 4 channels, got 3"):
        LFQ(dim=4)(normal(2, 4, 3))
    with pytest.raises(ValueError, match="dim must be a multiple of groups = 3, got 4"):
        GroupedResidualLFQ(dim=4, groups=3, codebook_size=4, num_quantizers=2)
    residual = {"dim": 4, "codebook_size": 16, "num_quantizers": 2}
    with pytest.raises(ValueError, match="has_projections must be False in a residual"):
        ResidualLFQ(**residual, has_projections=True)
    with pytest.raises(ValueError, match="num_codebooks must be 1 in a residual quantiser, got 2"):
        ResidualLFQ(**residual, num_codebooks=2)
    with pytest.raises(TypeError, match="nonsense"):
        LFQ(dim=4, nonsense=1)
