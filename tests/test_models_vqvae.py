"""VQVAE over 1 to 3 dimensions and with every kind of quantiser."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from whole_models import assert_sound

import mmfast.nn
from mmfast.models import VQVAE, code_usage, count_codes
from mmfast.models.codes import num_stages
from mmfast.models.convolutions import Fold

D = 8


def quantizer(name, **options):
    torch.manual_seed(0)
    nn = mmfast.nn
    return {
        "VectorQuantize": lambda: nn.VectorQuantize(D, 16, **options),
        "projected": lambda: nn.VectorQuantize(D, 16, codebook_dim=4, **options),
        "cosine": lambda: nn.VectorQuantize(D, 16, use_cosine_sim=True),
        "ResidualVQ": lambda: nn.ResidualVQ(dim=D, num_quantizers=3, codebook_size=16),
        "FSQ": lambda: nn.FSQ([4, 4, 3], dim=D),
        "LFQ": lambda: nn.LFQ(dim=D, codebook_size=64),
        "SimVQ": lambda: nn.SimVQ(dim=D, codebook_size=16),
        "GroupedResidualVQ": lambda: nn.GroupedResidualVQ(
            dim=D, groups=2, num_quantizers=3, codebook_size=16
        ),
        "GroupedResidualFSQ": lambda: nn.GroupedResidualFSQ(
            dim=D, groups=2, levels=[4, 3], num_quantizers=2
        ),
        "GroupedResidualLFQ": lambda: nn.GroupedResidualLFQ(
            dim=D, groups=2, codebook_size=16, num_quantizers=2
        ),
    }[name]()


def model(name="VectorQuantize", spatial_dims=2, **options):
    made = quantizer(name, **options)
    torch.manual_seed(1)
    return VQVAE(made, D, spatial_dims=spatial_dims, widths=(6, 12), num_blocks=1)


GROUPED = ["GroupedResidualVQ", "GroupedResidualFSQ", "GroupedResidualLFQ"]
QUANTIZERS = ["VectorQuantize", "projected", "cosine", "ResidualVQ", "FSQ", "LFQ", "SimVQ"]


@pytest.mark.parametrize("name", QUANTIZERS + GROUPED)
def test_there_and_back(name):
    vqvae = model(name).eval()
    x = normal(2, 3, 8, 12)
    with torch.no_grad():
        output = vqvae(x)
        indices = vqvae.encode(x)
        assert output.reconstruction.shape == x.shape
        assert torch.equal(indices, output.indices)
        assert indices.shape[:3] == (2, 4, 6)
        torch.testing.assert_close(vqvae.decode(indices), output.reconstruction)
    assert torch.equal(output.loss, output.reconstruction_loss + output.quantizer_loss)


@pytest.mark.parametrize(("spatial_dims", "sizes"), [(1, (16,)), (2, (8, 4)), (3, (4, 8, 6))])
@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ", "FSQ"])
def test_learns(spatial_dims, sizes, name):
    """A few steps on one batch: every parameter gets a gradient, and the loss falls."""
    vqvae = model(name, spatial_dims)
    x = normal(2, 3, *sizes)
    optimizer = torch.optim.Adam(vqvae.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        output = vqvae(x)
        output.loss.backward()
        losses.append(output.reconstruction_loss.item())
        optimizer.step()
    assert all(p.grad is not None for p in vqvae.parameters())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("spatial_dims", "sizes"), [(1, (16,)), (2, (8, 16)), (3, (4, 8, 12))])
def test_blocks_as_channels(spatial_dims, sizes):
    """patch_size: as with a model of that many channels, of blocks."""
    patch = 2
    x = normal(2, 3, *sizes)
    blocks = x
    for i in range(spatial_dims):
        blocks = blocks.unflatten(2 + 2 * i, (-1, patch))
    order = [0, 1, *range(3, 3 + 2 * spatial_dims, 2), *range(2, 2 + 2 * spatial_dims, 2)]
    channels = blocks.permute(order).flatten(1, 1 + spatial_dims)
    shape = {"spatial_dims": spatial_dims, "widths": (6, 12), "num_blocks": 1}
    book = quantizer("VectorQuantize")
    vqvae = VQVAE(book, D, patch_size=patch, **shape).eval()
    plain = VQVAE(book, D, channels=3 * patch**spatial_dims, **shape).eval()
    with torch.no_grad():
        for own, other in zip(plain.parameters(), vqvae.parameters(), strict=True):
            own.copy_(other)
    with torch.no_grad():
        indices = vqvae.encode(x)
        assert vqvae.downsampling == 4
        assert indices.shape == (2, *(size // 4 for size in sizes))
        assert torch.equal(indices, plain.encode(channels))
        made = vqvae.decode(indices)
        assert made.shape == x.shape
        back = (
            plain.decode(indices)
            .unflatten(1, (3, *(patch,) * spatial_dims))
            .permute([order.index(i) for i in range(len(order))])
        )
        assert torch.equal(made, back.reshape(x.shape))
    assert vqvae(x).loss.requires_grad


@pytest.mark.parametrize(("spatial_dims", "sizes"), [(1, (64,)), (2, (8, 16)), (3, (8, 8, 12))])
def test_shortcut(spatial_dims, sizes):
    """It starts as the best linear map of blocks of 4 there is; gradients reach everything."""
    vqvae = VQVAE(
        quantizer("VectorQuantize"),
        D,
        channels=2,
        spatial_dims=spatial_dims,
        widths=(4, 6),
        num_blocks=1,
        patch_size=2,
        shortcut=True,
        norm=None,
    )
    x = normal(6, 2, *sizes)
    vqvae.initialize_shortcut(x.split(4))
    with torch.no_grad():
        made = vqvae.decoder(vqvae.latents(x))
    blocks = Fold(spatial_dims, 4)(x).flatten(2).transpose(1, 2).flatten(0, 1).double()
    centred = blocks - blocks.mean(0)
    lost = torch.linalg.svdvals(centred)[D:].square().sum()  # Eckart and Young
    torch.testing.assert_close((made - x).double().square().sum(), lost, rtol=1e-4, atol=1e-4)
    vqvae(x).loss.backward()
    assert all(p.grad is not None for p in vqvae.parameters())


def test_shortcut_to_more_vectors_than_a_block_has_values():
    vqvae = VQVAE(quantizer("FSQ"), D, channels=1, widths=(4, 6), num_blocks=1, shortcut=True)
    x = normal(3, 1, 8, 8)
    vqvae.initialize_shortcut([x])
    with torch.no_grad():
        torch.testing.assert_close(vqvae.decoder(vqvae.latents(x)), x)


def test_no_shortcut():
    with pytest.raises(TypeError, match="shortcut=True"):
        model().initialize_shortcut([normal(1, 3, 8, 8)])


@pytest.mark.parametrize("shortcut", [False, True])
def test_without_norms_parts_are_independent(shortcut):
    """What is far away does not matter."""
    vqvae = VQVAE(
        quantizer("FSQ"), D, widths=(6, 12), num_blocks=1, norm=None, shortcut=shortcut
    ).eval()
    x = normal(1, 3, 8, 96)
    other = torch.cat([x[..., :48], normal(1, 3, 8, 48, seed=1)], 3)
    with torch.no_grad():
        a, b = vqvae.decoder(vqvae.latents(x)), vqvae.decoder(vqvae.latents(other))
    torch.testing.assert_close(a[..., :16], b[..., :16])
    assert not torch.allclose(a[..., 48:], b[..., 48:])


def test_k_means():
    vqvae = model()
    x = normal(4, 3, 8, 8)
    with torch.no_grad():
        vectors = vqvae.latents(x).flatten(2).transpose(1, 2).flatten(0, 1)
        vqvae.initialize_codebook(x.split(2), seed=3)
    want = mmfast.kmeans(vectors, 16, iterations=10, seed=3)
    torch.testing.assert_close(vqvae.quantizer.codebook, want.codebook)
    book = vqvae.quantizer._codebook
    assert book.cluster_size.sum() == len(vectors)
    torch.testing.assert_close(
        book.embed_avg[0] / book.cluster_size[0, :, None], book.embed[0], rtol=1e-3, atol=1e-3
    )
    usage = code_usage(vqvae.encode(x), 16)
    assert usage.used > 0.9
    with pytest.raises(ValueError, match="k-means of 16 codes needs as many vectors, got 4"):
        vqvae.initialize_codebook([normal(1, 3, 4, 4)])
    with pytest.raises(TypeError, match="needs a VectorQuantize with one codebook, got FSQ"):
        model("FSQ").initialize_codebook([x])


def test_the_plain_recipe():
    """Encode all, a codebook by k-means, quantise, train the decoder alone."""
    vqvae, x = model().eval(), normal(8, 3, 8, 8)
    vqvae.initialize_codebook(x.split(4))
    vqvae.requires_grad_(False).decoder.requires_grad_(True)
    before = {name: value.clone() for name, value in vqvae.state_dict().items()}
    indices = vqvae.encode(x)
    optimizer = torch.optim.Adam(vqvae.decoder.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = vqvae.reconstruction_loss(vqvae.decode(indices), x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, value in vqvae.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("decoder."), name
    assert torch.equal(vqvae.encode(x), indices)


@pytest.mark.parametrize("name", GROUPED)
def test_groups(name):
    """Their indices are those of a stage side by side, and each is a stage to those who count."""
    vqvae = model(name).eval()
    x = normal(2, 3, 8, 12)
    with torch.no_grad():
        latents = vqvae.latents(x)
        own = vqvae.quantizer(latents.flatten(2).mT)[1]  # [G, B, L, Q]
        indices = vqvae.encode(x)
    for group in range(2):
        torch.testing.assert_close(indices.flatten(1, 2)[..., group::2], own[group])
    assert num_stages(vqvae) == own.shape[0] * own.shape[-1]
    assert sum(int(count.sum()) for count in count_codes(vqvae, indices)) == indices.numel()


@pytest.mark.parametrize("shortcut", [False, True])
def test_gradient_checkpointing(shortcut):
    """The same gradients, and less is kept for the backward."""
    vqvae = VQVAE(quantizer("FSQ"), D, widths=(6, 12), num_blocks=1, shortcut=shortcut)
    x = normal(2, 3, 8, 8)
    kept, gradients = [], []
    for again in (False, True):
        vqvae.gradient_checkpointing = again
        assert vqvae.gradient_checkpointing == again
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loss = vqvae(x).loss
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, list(vqvae.parameters())))
    assert kept[1] < 0.7 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_step_is_the_references():
    """Loss, gradients and a step in float32 against float64 on the reference backend."""
    x = normal(2, 3, 8, 8)
    assert_sound(model().eval(), lambda m, dtype: m(x.to(dtype)).loss, compiles=False)


def test_usage():
    usage = code_usage(torch.tensor([[0, 0, 1], [1, 3, 3]]), 4)
    torch.testing.assert_close(usage.perplexity, torch.tensor(3.0))
    assert usage.used == 0.75
    nothing = code_usage(torch.zeros(0, dtype=torch.int64), 4)
    assert (nothing.perplexity, nothing.used) == (1, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(normal(1, 3, 7, 8)), ValueError, r"x must be \(B, 3, size, size\), sizes mul"),
        (lambda m: m(normal(1, 2, 8, 8)), ValueError, r"got \(1, 2, 8, 8\)"),
        (lambda m: m(normal(3, 8, 8)), ValueError, r"got \(3, 8, 8\)"),
        (lambda m: m(torch.ones(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "got uint8"),
        (lambda m: VQVAE(m.quantizer, D, spatial_dims=4), ValueError, "must be 1, 2 or 3, got 4"),
        (lambda m: VQVAE(m.quantizer, D, widths=()), ValueError, "must be at least 1"),
        (lambda m: VQVAE(m.quantizer, D, reconstruction="ssim"), ValueError, "one of l1, l2"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(model())
