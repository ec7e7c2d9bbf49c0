"""vector_quantize_pytorch on mmfast: the same outputs, gradients and moving averages."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import normal
from patched import assert_same, largest, pair, results

import mmfast
from mmfast.integrations import patch

library = pytest.importorskip("vector_quantize_pytorch")

OPTIONS = {
    "euclidean": {},
    "cosine": {"use_cosine_sim": True},
    "straight_through": {"rotation_trick": False},
    "heads": {"heads": 2, "codebook_dim": 4},
    "separate_heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "projected": {"codebook_dim": 4, "use_cosine_sim": True},
    "kmeans": {"kmeans_init": True},
    "expiry": {"threshold_ema_dead_code": 2},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "in_place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
    },
    "affine": {"affine_param": True},
    "orthogonal": {"orthogonal_reg_weight": 1.0, "ema_update": False},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1},
    "frozen": {"freeze_codebook": True},
}
# Those that need the distances in training.
SLOW_OPTIONS = {
    "cross_entropy": {"commitment_use_cross_entropy_loss": True},
    "diversity": {"codebook_diversity_loss_weight": 0.1},
    "sampling": {"stochastic_sample_codes": True},
    "gumbel": {"straight_through": True, "rotation_trick": False},
}


def quantizer(**options):
    torch.manual_seed(1)
    return library.VectorQuantize(dim=8, codebook_size=16, **options)


def assert_trains_alike(plain, patched, x, mask=None, steps=3):
    """Steps of training, each with other vectors; then evaluation."""

    def run(model, x):
        return model(x, mask=mask)

    for step in range(steps):
        vectors = x.roll(step, 0) * (1 + 0.1 * step)
        assert_same(results(patched, run, vectors), results(plain, run, vectors))
        assert_same(patched.state_dict(), plain.state_dict())
    assert_same(results(patched.eval(), run, x), results(plain.eval(), run, x))


@pytest.mark.parametrize("name", [*OPTIONS, *SLOW_OPTIONS])
def test_trains_alike(name):
    options = (OPTIONS | SLOW_OPTIONS)[name]
    plain, patched, report = pair(quantizer(**options))
    assert len(report.swapped) == 1
    assert ("training" in report.swapped[0].left) == (name in SLOW_OPTIONS)
    assert_trains_alike(plain, patched, normal(4, 10, 8, seed=2))


@pytest.mark.parametrize(
    "name", ["euclidean", "kmeans", "affine", "heads", "separate_heads", "cross_entropy"]
)
def test_masks(name):
    options = dict((OPTIONS | SLOW_OPTIONS)[name])
    if "heads" in options:  # the library's own loss fails with a mask and heads
        options["commitment_weight"] = 0.0
    plain, patched, _ = pair(quantizer(**options))
    assert_trains_alike(plain, patched, normal(4, 10, 8, seed=2), normal(4, 10, seed=3) < 0.5)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"accept_image_fmap": True}, (2, 8, 3, 5)),
        ({"accept_3d_fmap": True}, (2, 8, 3, 2, 2)),
        ({"channel_last": False}, (2, 8, 7)),
        ({}, (7, 8)),
    ],
)
def test_layouts(options, shape):
    plain, patched, _ = pair(quantizer(**options))
    assert_trains_alike(plain, patched, normal(*shape, seed=2), steps=2)


def test_half_precision():
    plain, patched, _ = pair(quantizer())
    assert_trains_alike(plain, patched, normal(4, 10, 8, dtype=torch.bfloat16), steps=2)


@pytest.mark.parametrize(
    "options",
    [
        {"topk": 3},
        {"freeze_codebook": True},
        {"return_loss_breakdown": True},
        {"ema_update_weight": 0.5},
        {"ema_update_weight": lambda sums, counts: counts / (1 + counts)},
        {"accum_ema_update": True},
        {"ema_update": False},
        {"lens": torch.tensor([3, 10, 0, 7])},
        {"indices": torch.arange(40).view(4, 10) % 16},
        {"codebook_transform_fn": lambda codes: codes.expand(4, 10, 16, 8)[None] * 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_options_of_a_call(options, training):
    plain, patched, _ = pair(quantizer().train(training))

    def run(model, x):
        return model(x, **options)

    x = normal(4, 10, 8, seed=2)
    assert_same(results(patched, run, x), results(plain, run, x))
    assert_same(patched.state_dict(), plain.state_dict())


@pytest.mark.parametrize("shared", [False, True])
def test_residual(shared):
    torch.manual_seed(0)
    model = library.ResidualVQ(
        dim=8, codebook_size=16, num_quantizers=3, shared_codebook=shared, kmeans_init=True
    )
    plain, patched, report = pair(model)
    assert [entry.name for entry in report.swapped] == [f"layers.{i}" for i in range(3)]
    assert_trains_alike(plain, patched, normal(4, 10, 8, seed=2))
    report.undo()
    assert_same(patched(normal(4, 10, 8)), plain(normal(4, 10, 8)))


def test_indices_are_exact():
    """A common offset, which leaves the library's float32 distances no digits."""
    plain, patched, _ = pair(quantizer().eval())
    for model in (plain, patched):
        model.codebook = normal(16, 8) + 1e4
    x = normal(4, 10, 8, seed=2) + 1e4
    want, _ = mmfast.nearest_code(x, patched.codebook)
    assert torch.equal(patched(x)[1], want)
    assert not torch.equal(plain(x)[1], want)


def test_memory():
    x = normal(1, 200, 8)
    plain, patched, _ = pair(library.VectorQuantize(dim=8, codebook_size=300))
    for training in (True, False):
        plain.train(training)
        patched.train(training)
        assert largest(lambda: plain(x)) >= 200 * 300
        assert largest(lambda: patched(x)) <= 300 * 8


def test_initialised_after_the_first_call():
    patched = quantizer(kmeans_init=True)
    report = patch(patched)
    assert "the first call, which initialises the codes" in report.swapped[0].left
    x = normal(4, 10, 8)
    assert largest(lambda: patched(x)) >= 40 * 16 > largest(lambda: patched(x))
    assert "first call" not in patch(copy.deepcopy(patched)).swapped[0].left


def test_compiles():
    plain, patched, _ = pair(quantizer(heads=2, codebook_dim=4).eval())
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    x = normal(4, 10, 8)
    assert_same(compiled(x), plain(x))


def test_others_are_left():
    model = torch.nn.ModuleDict(
        {
            "vq": quantizer(),
            "fsq": library.FSQ(levels=[8, 5]),
            "lfq": library.LFQ(dim=4, codebook_size=16),
            "sim": library.SimVQ(dim=4, codebook_size=16),
        }
    )
    report = patch(model)
    assert [entry.name for entry in report.swapped] == ["vq"]
    assert {entry.name: entry.left for entry in report.left} == {
        "fsq": "rounds: looks no codes up",
        "lfq": "takes signs: looks no codes up",
        "sim": "its lookup is not covered",
    }
    with pytest.raises(ValueError, match=r"Found, but left:\n  \(the model\) \(FSQ\): rounds"):
        patch(library.FSQ(levels=[8, 5]))


def test_another_codebook_is_left():
    model = quantizer()
    model._codebook = torch.nn.Identity()
    with pytest.raises(ValueError, match="its codebook is of class Identity, expected Codebook"):
        patch(model)


def test_sampling_by_another_function_is_left():
    model = quantizer()
    model._codebook.gumbel_sample = lambda *_, **__: None
    with pytest.raises(ValueError, match="drawn by a function that is not the library's"):
        patch(model)
