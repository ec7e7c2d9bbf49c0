"""taming-transformers' and LlamaGen's quantisers on mmfast, with stand-ins of their interface."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import normal
from patched import assert_same, default_dtype, largest, pair, randomised, results
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

import mmfast
from mmfast.integrations import patch


def nearest(z, codes):
    """All distances, expanded as these projects do: (N, K), and the indices (N,)."""
    rows = z.reshape(-1, codes.shape[1])
    squares = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
    distances = squares - 2 * rows @ codes.T
    return distances, distances.argmin(1)


def squared(z, codes):
    return ((codes.detach() - z) ** 2).mean(), ((codes - z.detach()) ** 2).mean()


class VectorQuantizer(nn.Module):
    """taming's first."""

    def __init__(self, n_e, e_dim, beta):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        z = z.permute(0, 2, 3, 1).contiguous()
        _, indices = nearest(z, self.embedding.weight)
        one_hot = nn.functional.one_hot(indices, self.n_e).to(z)
        codes = (one_hot @ self.embedding.weight).view(z.shape)
        commitment, codebook = squared(z, codes)
        mean = one_hot.mean(0)
        perplexity = torch.exp(-torch.sum(mean * torch.log(mean + 1e-10)))
        quantized = (z + (codes - z).detach()).permute(0, 3, 1, 2).contiguous()
        return quantized, commitment + self.beta * codebook, (perplexity, one_hot, indices[:, None])


class VectorQuantizer2(nn.Module):
    """taming's second, with its remapping of indices."""

    def __init__(self, n_e, e_dim, beta, remap=None, sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.remap, self.sane_index_shape = remap, sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        if remap is not None:
            self.register_buffer("used", torch.tensor(remap))

    def remap_to_used(self, indices):
        assert indices.dim() == 2
        match = indices[..., None] == self.used
        unknown = torch.randint(len(self.used), indices.shape)
        return torch.where(match.any(-1), match.long().argmax(-1), unknown)

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        assert temp is None or temp == 1.0
        assert rescale_logits is False
        assert return_logits is False
        z = z.permute(0, 2, 3, 1).contiguous()
        _, indices = nearest(z, self.embedding.weight)
        codes = self.embedding(indices).view(z.shape)
        commitment, codebook = squared(z, codes)
        if self.legacy:
            loss = commitment + self.beta * codebook
        else:
            loss = self.beta * commitment + codebook
        quantized = (z + (codes - z).detach()).permute(0, 3, 1, 2).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[:3])
        return quantized, loss, (None, None, indices)


Taming, Taming2 = VectorQuantizer, VectorQuantizer2


class LlamaGenQuantizer(nn.Module):
    def __init__(self, n_e, e_dim, beta, entropy_loss_ratio, l2_norm, show_usage):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.entropy_loss_ratio, self.l2_norm = entropy_loss_ratio, l2_norm
        self.show_usage = show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(100))

    def forward(self, z):
        z = z.permute(0, 2, 3, 1).contiguous()
        codes = self.embedding.weight
        if self.l2_norm:
            z = nn.functional.normalize(z, dim=-1)
            codes = nn.functional.normalize(codes, dim=-1)
        distances, indices = nearest(z, codes)
        chosen = codes[indices].view(z.shape)
        usage, terms = 0, (None, None, None)
        if self.show_usage and self.training:
            new = len(indices)
            self.codebook_used[:-new] = self.codebook_used[new:].clone()
            self.codebook_used[-new:] = indices
            usage = len(torch.unique(self.codebook_used)) / self.n_e
        if self.training:
            commitment, codebook = squared(z, chosen)
            chances = (-distances / 0.01).softmax(1)
            mean = chances.mean(0)
            each = -(chances * (chances + 1e-5).log()).sum(1).mean()
            entropy = self.entropy_loss_ratio * (each + (mean * (mean + 1e-5).log()).sum())
            terms = codebook, self.beta * commitment, entropy
        quantized = (z + (chosen - z).detach()).permute(0, 3, 1, 2)
        return quantized, (*terms, usage), (None, None, indices)


LlamaGenQuantizer.__name__ = "VectorQuantizer"  # it is matched by its name

QUANTIZERS = {
    "first": lambda k, d: Taming(k, d, 0.25),
    "second": lambda k, d: Taming2(k, d, 0.25),
    "second_not_legacy": lambda k, d: Taming2(k, d, 0.25, legacy=False),
    "second_shaped": lambda k, d: Taming2(k, d, 0.25, sane_index_shape=True),
    "second_remapped": lambda k, d: Taming2(k, d, 0.25, remap=[3, 1, 5, 9, 2]),
    "second_remapped_shaped": lambda k, d: Taming2(k, d, 0.25, [3, 1, 5], sane_index_shape=True),
    "llamagen": lambda k, d: LlamaGenQuantizer(k, d, 0.25, 0.0, False, False),
    "llamagen_l2": lambda k, d: LlamaGenQuantizer(k, d, 0.25, 0.0, True, True),
    "llamagen_entropy": lambda k, d: LlamaGenQuantizer(k, d, 0.25, 0.1, True, False),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_same(name, training):
    plain, patched, report = pair(randomised(QUANTIZERS[name](16, 4)).train(training))
    assert [entry.library for entry in report.swapped] == ["taming"]
    z = normal(2, 4, 3, 5, seed=1)
    for _ in range(3):
        got, want = (results(m, lambda m, x: m(x), z) for m in (patched, plain))
        assert_same(got, want)
        assert_same(patched.state_dict(), plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_autocast(name, dtype):
    """Dtypes of everything, too, that of a product of matrices among them."""
    plain, patched, _ = pair(randomised(QUANTIZERS[name](16, 4)))
    codes = plain.embedding.weight.detach().repeat(2, 1)[:30]  # no ties for bfloat16 to break
    z = (codes * 1.02).view(2, 3, 5, 4).permute(0, 3, 1, 2).to(dtype)

    def run(model, z):
        with torch.autocast("cpu", torch.bfloat16):
            return model(z)

    got, want = (tree_leaves(results(m, run, z)) for m in (patched, plain))
    for a, b in zip(got, want, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
            assert a.requires_grad == b.requires_grad


def test_only_codes_train():
    """Which gradients the losses have does not depend on those of the input."""
    for make in QUANTIZERS.values():
        plain, patched, _ = pair(randomised(make(16, 4)))
        z = normal(2, 4, 3, 5)
        assert_same(patched(z)[1], plain(z)[1])


def test_a_parameter_as_buffer():
    """As LlamaGen's, which then cannot train on a CPU."""
    _, patched, _ = pair(QUANTIZERS["llamagen_l2"](16, 4))
    patched.codebook_used = torch.nn.Parameter(patched.codebook_used)
    patched(normal(2, 4, 3, 5))
    assert patched.codebook_used[:70].eq(0).all()
    assert patched.codebook_used[70:].gt(0).any()
    assert patched.codebook_used.is_leaf


def test_gumbel_options_are_refused():
    _, patched, _ = pair(Taming2(16, 4, 0.25))
    patched(normal(1, 4, 2, 2), temp=1.0)
    with pytest.raises(AssertionError, match="for Gumbel quantisers"):
        patched(normal(1, 4, 2, 2), temp=0.5)


def test_memory():
    z = normal(2, 4, 10, 10)
    for make in (QUANTIZERS["second"], QUANTIZERS["llamagen_l2"]):
        plain, patched, _ = pair(randomised(make(300, 4)).eval())
        assert largest(lambda: plain(z)) >= 200 * 300  # noqa: B023
        assert largest(lambda: patched(z)) <= 300 * 4  # noqa: B023


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("second_shaped", "aot_eager"),
        ("llamagen_l2", "aot_eager"),
        ("first", "inductor"),
    ],
)
def test_compiles(name, backend):
    training = backend == "inductor"
    plain, patched, _ = pair(randomised(QUANTIZERS[name](16, 4)).train(training))
    z = normal(2, 4, 3, 5)
    compiled = torch.compile(patched, fullgraph=True, backend=backend)
    assert_same(results(compiled, lambda m, x: m(x), z), results(plain, lambda m, x: m(x), z))


@pytest.mark.parametrize("name", ["first", "second", "llamagen_l2"])
def test_exports(name):
    """With any batch size, as the originals are."""
    plain, patched, _ = pair(randomised(QUANTIZERS[name](16, 4)).eval())
    batch = {"z": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(patched, (normal(2, 4, 3, 5),), dynamic_shapes=batch)
    z = normal(4, 4, 3, 5, seed=1)
    assert_same(program.module()(z), plain(z))


def test_indices_are_exact():
    """A common offset, which leaves the expanded distances no digits."""
    plain, patched, _ = pair(QUANTIZERS["second"](16, 4))
    for model in (plain, patched):
        model.embedding.weight.data.copy_(normal(16, 4) + 1e4)
    z = normal(2, 4, 3, 5) + 1e4
    want, _ = mmfast.nearest_code(z.movedim(1, -1), patched.embedding.weight)
    assert torch.equal(patched(z)[2][2], want.flatten())
    assert not torch.equal(plain(z)[2][2], want.flatten())


def test_report():
    report = patch(nn.Sequential(*(make(16, 4) for make in QUANTIZERS.values())))
    lines = {entry.name: (entry.done, entry.left) for entry in report.entries}
    encodings = "the N x K encodings that it returns; VectorQuantizer2 returns none"
    entropy = "training with an entropy loss, which takes all N x K distances"
    assert lines["0"] == ("forward (as Taming)", encodings)
    assert lines["1"] == ("forward (as Taming2)", "")
    assert lines["6"] == ("forward (as LlamaGen)", entropy)
    assert "9 of 9 modules run on mmfast" in str(report)


class Farthest(Taming2):
    """Looks for something else. The name is the base's in the test, as of those below."""

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        return super().forward(-z)


class TwoOutputs(Taming):
    def forward(self, z):
        return super().forward(z)[:2]


class OtherLoss(Taming):
    def forward(self, z):
        quantized, loss, info = super().forward(z)
        return quantized, 2 * loss if self.training else loss, info


class Fails(Taming):
    def forward(self, z):
        raise RuntimeError("not these sizes")


class OtherArguments(Taming):
    def forward(self, z, mask=None):
        return super().forward(z)


OTHERS = {
    Farthest: "its forward gives something else than the original's in evaluation",
    TwoOutputs: "its forward gives something else than the original's in evaluation",
    OtherLoss: "its forward gives something else than the original's in training",
    Fails: "its forward refuses a small input in evaluation: not these sizes",
    OtherArguments: "forward of this version takes (self, z, mask), expected (self, z)",
}


SETTINGS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_patched_anywhere(setting):
    """What the caller has set does not count as a difference."""
    model = nn.Sequential(*(make(16, 4) for make in QUANTIZERS.values()))
    with SETTINGS[setting]():
        assert len(patch(model).swapped) == len(model)


def test_patched_without_values():
    model = nn.Sequential(*(make(16, 4) for make in QUANTIZERS.values())).to("meta")
    assert len(patch(model).swapped) == len(model)
    assert model[1](torch.empty(2, 4, 3, 5, device="meta"))[0].shape == (2, 4, 3, 5)


def test_patched_as_fake_tensors():
    """Built on them, or made of them after; the own code is tried with real ones."""
    make = [functools.partial(make, 16, 4) for make in QUANTIZERS.values()]
    with FakeTensorMode():
        model = nn.Sequential(*(each() for each in make))
        assert len(patch(model).swapped) == len(model)
        assert model[1](torch.empty(2, 4, 3, 5))[0].shape == (2, 4, 3, 5)
    with FakeTensorMode():
        other = nn.Sequential(*(each() for each in make))
    assert len(patch(other).swapped) == len(other)


@pytest.mark.parametrize("other", OTHERS)
def test_namesakes_are_left(other):
    model = type(other.__base__.__name__, (other,), {})(16, 4, 0.25)
    with pytest.raises(ValueError, match="Found, but left") as error:
        patch(model)
    assert error.value.args[0].endswith(OTHERS[other])
    assert "forward" not in vars(model)


def test_patching_changes_nothing_else(monkeypatch):
    model = nn.Sequential(QUANTIZERS["llamagen_l2"](16, 4), QUANTIZERS["second_remapped"](16, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    # A seed for all devices would not be taken back.
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds all devices"))
    patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same(dict(model.state_dict()), before)
