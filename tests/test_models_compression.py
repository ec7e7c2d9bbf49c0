"""Learned compression: what is restored is what the model makes of the codes."""

from __future__ import annotations

import pytest
import torch
from cases import normal

pytest.importorskip("constriction")

from mmfast.models import VQVAE, codebook_sizes, compress, decompress, model_digest
from mmfast.models.compression import padded

D = 4
QUANTIZERS = {
    "VectorQuantize": {"dim": D, "codebook_size": 11},
    "heads": {"type": "VectorQuantize", "dim": D, "codebook_size": 8, "heads": 2},
    "ResidualVQ": {"dim": D, "num_quantizers": 3, "codebook_size": 16},
    "sizes": {"type": "ResidualVQ", "dim": D, "num_quantizers": 2, "codebook_size": [32, 5]},
    "fewer": {
        "type": "ResidualVQ",
        "dim": D,
        "codebook_size": [32, 5, 16],
        "quantize_dropout": True,
    },
    "FSQ": {"levels": [4, 3, 3], "dim": D},
    "ResidualFSQ": {"levels": [4, 3], "num_quantizers": 2, "dim": D},
    "LFQ": {"dim": D, "codebook_size": 64},
    "ResidualLFQ": {"dim": D, "codebook_size": 64, "num_quantizers": 2},
    "SimVQ": {"dim": D, "codebook_size": 16},
    "GroupedResidualVQ": {"dim": D, "groups": 2, "num_quantizers": 3, "codebook_size": 16},
    "sizes of groups": {
        "type": "GroupedResidualVQ",
        "dim": D,
        "groups": 2,
        "codebook_size": [32, 5, 16],
        "quantize_dropout": True,
    },
    "GroupedResidualFSQ": {"dim": D, "groups": 2, "levels": [4, 3], "num_quantizers": 2},
    "GroupedResidualLFQ": {"dim": D, "groups": 2, "codebook_size": 16, "num_quantizers": 2},
}


def vqvae(name="VectorQuantize", spatial_dims=2, seed=0, **options):
    torch.manual_seed(seed)
    return VQVAE(
        {"type": name, **QUANTIZERS[name]},
        D,
        spatial_dims=spatial_dims,
        widths=(4, 8),
        num_blocks=1,
        **options,
    ).eval()


def restored(model, x):
    """What a model makes of x whose sizes it does not take: of x with its ends repeated."""
    for dim in range(1, x.dim()):
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([x, *[last] * (-x.shape[dim] % model.downsampling)], dim)
    with torch.no_grad():
        return model.decode(model.encode(x[None]))[0]


def test_tiles():
    """Of a model without norms they change nothing but rounding; each side may have its own."""
    model, x = vqvae("FSQ", norm=None), normal(3, 45, 62)
    whole = decompress(model, compress(model, x, tile=0), tile=0)
    tiled = decompress(model, compress(model, x, tile=8), tile=16)
    assert (tiled.indices != whole.indices).float().mean() < 0.01
    again = decompress(model, compress(model, x, tile=8), tile=0)
    torch.testing.assert_close(tiled.x, again.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer(name):
    model, x = vqvae(name), normal(3, 13, 10)
    data = compress(model, x)
    assert torch.equal(decompress(model, data).x, restored(model, x)[:, :13, :10])


def test_fewer_stages():
    model, x = vqvae("fewer"), normal(3, 16, 12)
    every = model.quantizer.num_quantizers
    for stages in range(1, every + 1):
        data = compress(model, x, stages=stages)
        with torch.no_grad():
            indices = model.encode(x[None])[..., :stages]
            expected = model.decode(indices)[0]
        got = decompress(model, data)
        assert torch.equal(got.indices, indices[0])
        assert torch.equal(got.x, expected)
    assert compress(model, x) == data
    for stages in (0, every + 1):
        with pytest.raises(ValueError, match=f"stages must be from 1 to {every}, got {stages}"):
            compress(model, x, stages=stages)


def test_fewer_stages_of_a_model_that_needs_all():
    with pytest.raises(ValueError, match="quantize_dropout"):
        compress(vqvae("ResidualVQ"), normal(3, 8, 8), stages=2)


@pytest.mark.parametrize(("spatial_dims", "sizes"), [(1, (35,)), (2, (1, 3)), (3, (3, 8, 5))])
def test_every_number_of_dimensions(spatial_dims, sizes):
    model, x = vqvae(spatial_dims=spatial_dims), normal(3, *sizes)
    got, indices, about = decompress(model, compress(model, x, rate=16000))
    cut = tuple(slice(size) for size in sizes)
    assert torch.equal(got, restored(model, x)[(slice(None), *cut)])
    assert indices.shape == tuple(-(-size // 2) for size in sizes)
    assert about == {"rate": 16000}


def test_large_grids_are_modelled_and_small_ones_packed():
    model = vqvae()
    smooth = torch.zeros(3, 200, 200)
    assert len(compress(model, smooth)) < 500  # 10000 codes of 4 bits
    noise = normal(3, 8, 8)
    assert len(compress(model, noise)) == 44 + 16 * 4 // 8
    for x in (smooth, noise):
        assert torch.equal(decompress(model, compress(model, x)).x, restored(model, x))


def test_the_digest_knows_configuration_and_weights():
    model = vqvae()
    assert model_digest(model) == model_digest(vqvae())
    assert model_digest(model) != model_digest(vqvae(seed=1))
    assert model_digest(model) != model_digest(vqvae(reconstruction="l1"))
    before = model_digest(model)
    next(model.parameters()).data.flatten()[0] += 1e-3
    assert model_digest(model) != before


def test_refuses():
    model, x = vqvae(), normal(3, 8, 8)
    data = compress(model, x)
    with pytest.raises(ValueError, match="wrong model: compressed with"):
        decompress(vqvae(seed=1), data)
    with pytest.raises(ValueError, match="not a file of compress"):
        decompress(model, b"something")
    with pytest.raises(ValueError, match=r"x must be \(channels, size, size\), got \(1, 3, 8, 8\)"):
        compress(model, x[None])
    with pytest.raises(ValueError, match=r"x must be \(B, 3, size, size\)"):
        compress(model, x[:1])
    with pytest.raises(ValueError, match="must have something in it"):
        compress(model, x[:, :0])
    with pytest.raises(TypeError, match="got uint8"):
        compress(model, x.to(torch.uint8))
    with pytest.raises(ValueError, match="evaluation mode"):
        compress(model.train(), x)


def test_codebook_sizes():
    def of(name):
        return codebook_sizes(vqvae(name).quantizer)

    assert of("VectorQuantize") == (11,)
    assert of("sizes") == (32, 5)
    assert of("FSQ") == (36,)
    assert of("ResidualLFQ") == (64,)
    with pytest.raises(TypeError, match="a Identity does not say how many codes"):
        codebook_sizes(torch.nn.Identity())


def test_padded():
    x = torch.arange(3.0).view(1, 1, 1, 3)
    assert padded(x, 2).tolist() == [[[[0, 1, 2, 2]] * 2]]
    assert padded(x, 1) is x
