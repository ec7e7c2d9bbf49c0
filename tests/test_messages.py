"""What is refused, and the words it is refused with."""

from __future__ import annotations

import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import mmfast
import mmfast.nn
from mmfast.models import VQVAE, Classifier, Diffusion, DiT


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


NEAREST_CODE = [
    ([1.0], zeros(2, 3), {}, TypeError, "x must be a torch.Tensor, got list"),
    (zeros(2, 3), None, {}, TypeError, "codebook must be a torch.Tensor, got NoneType"),
    (
        zeros(2, 3, dtype=torch.int64),
        zeros(2, 3),
        {},
        TypeError,
        "x must be float32, float16, bfloat16, float64, got int64",
    ),
    (
        zeros(2, 3),
        zeros(2, 3).to_sparse(),
        {},
        TypeError,
        "codebook must be strided, got a tensor of layout sparse_coo",
    ),
    (
        zeros(2, 3),
        zeros(2, 3, dtype=torch.complex64),
        {},
        TypeError,
        "codebook must be float32, float16, bfloat16, float64, got complex64",
    ),
    (
        zeros(2, 3),
        zeros(2, 3, device="meta"),
        {},
        ValueError,
        "all tensors must be on one device, got x on cpu, codebook on meta",
    ),
    (
        zeros(2, 3),
        zeros(3),
        {},
        ValueError,
        "codebook must be (K, D) or (H, K, D), got shape (3,)",
    ),
    (
        zeros(2, 3),
        zeros(1, 1, 2, 3),
        {},
        ValueError,
        "codebook must be (K, D) or (H, K, D), got shape (1, 1, 2, 3)",
    ),
    (
        zeros(2, 3),
        zeros(0, 3),
        {},
        ValueError,
        "codebook must hold at least one code (K >= 1), got shape (0, 3)",
    ),
    (zeros(), zeros(2, 3), {}, ValueError, "x must be (..., D), got shape ()"),
    (zeros(3), zeros(1, 2, 3), {}, ValueError, "x must be (H, ..., D), got shape (3,)"),
    (
        zeros(2, 4),
        zeros(2, 3),
        {},
        ValueError,
        "x must be (..., D) with the codebook's D = 3 (at least 1), got shape (2, 4)",
    ),
    (
        zeros(2, 0),
        zeros(2, 0),
        {},
        ValueError,
        "x must be (..., D) with the codebook's D = 0 (at least 1), got shape (2, 0)",
    ),
    (
        zeros(2, 5, 3),
        zeros(4, 7, 3),
        {},
        ValueError,
        "x must be (H, ..., D) with the codebook's H = 4, got shape (2, 5, 3)",
    ),
    (
        zeros(2, 3),
        zeros(2, 3),
        {"metric": "l2"},
        ValueError,
        "metric must be one of euclidean, cosine, dot, got 'l2'",
    ),
    (
        zeros(2, 3),
        zeros(2, 3),
        {"metric": None},
        ValueError,
        "metric must be one of euclidean, cosine, dot, got None",
    ),
]


@pytest.mark.parametrize(("x", "codebook", "options", "error", "message"), NEAREST_CODE)
def test_nearest_code(x, codebook, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        mmfast.nearest_code(x, codebook, **options)


def indices(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return zeros(*shape, dtype=dtype)


CODE_STATISTICS = [
    (None, indices(2), 4, None, TypeError, "x must be a torch.Tensor, got NoneType"),
    (
        zeros(2, 3, dtype=torch.uint8),
        indices(2),
        4,
        None,
        TypeError,
        "x must be float32, float16, bfloat16, float64, got uint8",
    ),
    (
        zeros(2, 3),
        indices(2, dtype=torch.int16),
        4,
        None,
        TypeError,
        "indices must be int64, int32, got int16",
    ),
    (zeros(2, 3), zeros(2), 4, None, TypeError, "indices must be int64, int32, got float32"),
    (
        zeros(2, 3),
        indices(2),
        4,
        indices(2),
        TypeError,
        "weights must be float32, float16, bfloat16, float64, got int64",
    ),
    (
        zeros(2, 3),
        indices(2),
        4,
        zeros(2, device="meta"),
        ValueError,
        "all tensors must be on one device, got x on cpu, indices on cpu, weights on meta",
    ),
    (
        zeros(3),
        indices(1),
        4,
        None,
        ValueError,
        "x must be (N, D) or (H, N, D), got shape (3,)",
    ),
    (
        zeros(1, 1, 2, 3),
        indices(1, 1, 2),
        4,
        None,
        ValueError,
        "x must be (N, D) or (H, N, D), got shape (1, 1, 2, 3)",
    ),
    (
        zeros(2, 3),
        indices(3),
        4,
        None,
        ValueError,
        "indices must have x's leading shape (2,), got shape (3,)",
    ),
    (
        zeros(2, 3),
        indices(2),
        4,
        zeros(2, 1),
        ValueError,
        "weights must have x's leading shape (2,), got shape (2, 1)",
    ),
    (
        zeros(5, 2, 3),
        indices(2),
        4,
        None,
        ValueError,
        "indices must have x's leading shape (5, 2), got shape (2,)",
    ),
    (zeros(2, 3), indices(2), 0, None, ValueError, "num_codes must be at least 1, got 0"),
    (zeros(2, 3), indices(2), -1, None, ValueError, "num_codes must be at least 1, got -1"),
]


@pytest.mark.parametrize(("x", "index", "k", "weights", "error", "message"), CODE_STATISTICS)
def test_code_statistics(x, index, k, weights, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        mmfast.code_statistics(x, index, k, weights=weights)


def test_compiled_code_refuses_too():
    compiled = torch.compile(mmfast.nearest_code, backend="eager")
    with pytest.raises(ValueError, match="x must be \\(\\.\\.\\., D\\)"):
        compiled(zeros(2, 4), zeros(2, 3))


EMBEDDING = torch.nn.Embedding(5, 8)
OTHER_OPS = {
    "code_statistics": (
        lambda: mmfast.code_statistics(zeros(2, 3), indices(2), 4.0),
        TypeError,
        "num_codes must be an int, got float",
    ),
    "ema_update_": (
        lambda: mmfast.ema_update_(EMBEDDING, zeros(5), zeros(5, 8), zeros(2, 8), indices(2)),
        TypeError,
        "codebook must be a torch.Tensor, got Embedding",
    ),
    "ema_update_, one vector": (
        lambda: mmfast.ema_update_(zeros(8), zeros(5), zeros(5, 8), zeros(2, 8), indices(2)),
        ValueError,
        "codebook must be (K, D) or (H, K, D), got shape (8,)",
    ),
    "finite_scalar_quantize, a number": (
        lambda: mmfast.finite_scalar_quantize(zeros(2, 3), 5),
        TypeError,
        "levels must be ints, one for each dimension, got 5",
    ),
    "finite_scalar_quantize, no whole number": (
        lambda: mmfast.finite_scalar_quantize(zeros(2, 2), [5, 4.5]),
        TypeError,
        "each of levels must be an int, got float",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), OTHER_OPS.values(), ids=OTHER_OPS)
def test_other_ops(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


K, Q = 16, 2
QUANTISERS = {
    "VectorQuantize": lambda: mmfast.nn.VectorQuantize(8, K),
    "FSQ": lambda: mmfast.nn.FSQ([4, 4], dim=8),
    "LFQ": lambda: mmfast.nn.LFQ(dim=8, codebook_size=K),
    "SimVQ": lambda: mmfast.nn.SimVQ(8, K),
    "ResidualVQ": lambda: mmfast.nn.ResidualVQ(dim=8, codebook_size=K, num_quantizers=Q),
    "ResidualFSQ": lambda: mmfast.nn.ResidualFSQ(levels=[4, 4], dim=8, num_quantizers=Q),
    "ResidualLFQ": lambda: mmfast.nn.ResidualLFQ(dim=8, codebook_size=K, num_quantizers=Q),
    "ResidualSimVQ": lambda: mmfast.nn.ResidualSimVQ(dim=8, codebook_size=K, num_quantizers=Q),
    "GroupedResidualVQ": lambda: mmfast.nn.GroupedResidualVQ(
        dim=8, groups=2, codebook_size=K, num_quantizers=Q
    ),
    "GroupedResidualFSQ": lambda: mmfast.nn.GroupedResidualFSQ(
        dim=8, groups=2, levels=[4, 4], num_quantizers=Q
    ),
    "RandomProjectionQuantizer": lambda: mmfast.nn.RandomProjectionQuantizer(
        dim=8, num_codebooks=1, codebook_dim=4, codebook_size=K
    ),
}


@pytest.mark.parametrize("make", QUANTISERS.values(), ids=QUANTISERS)
def test_vectors_of_quantisers(make):
    module = make().eval()
    for wrong, error, message in (
        ([1.0], TypeError, r"^[xz] must be a torch.Tensor, got list$"),
        (zeros(2, 6, 8, dtype=torch.int64), TypeError, r"^[xz] must be float32, .*, got int64$"),
        (zeros(2, 6, 7), ValueError, r"^x must .*8.* got .*7"),
        (zeros(8), ValueError, r"^x must be .*, got shape \(8,\)$"),
    ):
        with pytest.raises(error, match=message):
            module(wrong)


@pytest.mark.parametrize("make", QUANTISERS.values(), ids=QUANTISERS)
def test_indices_of_quantisers(make):
    module = make().eval()
    shape = (2, 6, Q) if hasattr(module, "num_quantizers") else (2, 6)
    shape = (2, *shape[:2], Q) if hasattr(module, "groups") else shape
    names = ("get_codes_from_indices", "get_output_from_indices", "indices_to_codes")
    for name in (name for name in names if hasattr(module, name)):
        decode = getattr(module, name)
        decode(torch.full(shape, K - 1))
        small = name == "indices_to_codes" and isinstance(module, mmfast.nn.FSQ | mmfast.nn.LFQ)
        if small:
            indices = torch.randint(K, shape)
            assert torch.equal(decode(indices.to(torch.uint8)), decode(indices))
        known = "int64, int32, int16, int8, uint8" if small else "int64, int32"
        with pytest.raises(TypeError, match=rf"^indices must be {known}, got float32$"):
            decode(zeros(*shape))
        with pytest.raises(ValueError, match=rf"^indices must be from -?\d to 15, got {K} to {K}$"):
            decode(torch.full(shape, K))
        with pytest.raises(ValueError, match=r"^indices must be from -?\d to 15, got -2 to -2$"):
            decode(torch.full(shape, -2))


def small_dit(**options):
    given = {"hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3, "learn_sigma": False}
    return DiT(4, 2, 1, **{**given, **options}).eval()


def small_vqvae():
    return VQVAE(mmfast.nn.VectorQuantize(4, K), 4, channels=1, widths=(4, 4)).eval()


def labels(*values):
    return torch.tensor(values)


IMAGES = zeros(2, 1, 4, 4)
MODULES = {
    "dim": (
        lambda: mmfast.nn.VectorQuantize(-8, K),
        ValueError,
        "dim must be at least 1, got -8",
    ),
    "no codes": (
        lambda: mmfast.nn.VectorQuantize(8, 0),
        ValueError,
        "codebook_size must be at least 1, got 0",
    ),
    "commitment_weight": (
        lambda: mmfast.nn.VectorQuantize(8, K, commitment_weight=float("nan")),
        ValueError,
        "commitment_weight must be at least 0, got nan",
    ),
    "no stages": (
        lambda: mmfast.nn.ResidualVQ(dim=8, codebook_size=K, num_quantizers=0),
        ValueError,
        "num_quantizers must be at least 1, got 0",
    ),
    "levels": (
        lambda: mmfast.nn.FSQ(5),
        TypeError,
        "levels must be ints, one for each channel, got 5",
    ),
    "no levels": (
        lambda: mmfast.nn.FSQ([]),
        ValueError,
        "levels must be at least 3, or 2 with preserve_symmetry=True, got []",
    ),
    "patch_size": (
        lambda: DiT(4, 0, 1),
        ValueError,
        "input_size and patch_size must be at least 1, got (4, 4) and (0, 0)",
    ),
    "num_classes": (
        lambda: small_dit(num_classes=0),
        ValueError,
        "num_classes must be at least 1, got 0",
    ),
    "class_dropout_prob": (
        lambda: small_dit(class_dropout_prob=2.0),
        ValueError,
        "dropout_prob must be from 0 to 1, got 2.0",
    ),
    "no classes to classify": (
        lambda: Classifier(0),
        ValueError,
        "num_classes must be at least 1, got 0",
    ),
    "labels out of range": (
        lambda: small_dit()(IMAGES, labels(1, 2), labels(0, 9)),
        ValueError,
        "labels must be from 0 to 3, got 0 to 9",
    ),
    "labels of floating numbers": (
        lambda: small_dit()(IMAGES, labels(1, 2), labels(0.0, 1.0)),
        TypeError,
        "labels must be int64, int32, got float32",
    ),
    "timesteps": (
        lambda: small_dit()(IMAGES, labels(1, 2, 3), labels(0, 1)),
        ValueError,
        "t must be (B,) = (2,), got (3,)",
    ),
    "a quantizer's name": (
        lambda: VQVAE("VectorQuantize", 4),
        TypeError,
        "quantizer must be a module or a mapping with its type and arguments, got str",
    ),
    "a grid without a batch": (
        lambda: small_vqvae().decode(indices(2, 2)),
        ValueError,
        "indices must be (B, size, size[, Q]), got (2, 2)",
    ),
    "guidance from nothing": (
        lambda: Diffusion("flow").sample(small_dit(), IMAGES.shape, guidance=2.0, steps=1),
        ValueError,
        "guidance needs a condition: give classes or condition",
    ),
    "classes of another batch": (
        lambda: Diffusion("flow").sample(small_dit(), IMAGES.shape, classes=labels(0), steps=1),
        ValueError,
        "classes must be (B,) = (2,), got (1,)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MODULES.values(), ids=MODULES)
def test_modules(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_a_model_without_parameters_is_sampled():
    class Still(torch.nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    made = Diffusion("flow").sample(Still(), (2, 3), steps=1, progress=False)
    assert made.shape == (2, 3)


def test_indices_under_transforms_are_not_looked_at():
    quantiser = mmfast.nn.FSQ([4, 4], dim=8).eval()
    indices = torch.arange(12).view(3, 4)
    want = quantiser.indices_to_codes(indices)
    torch.testing.assert_close(torch.vmap(quantiser.indices_to_codes)(indices), want)
    traced = make_fx(lambda given: quantiser.indices_to_codes(given))(indices)
    torch.testing.assert_close(traced(indices), want)
