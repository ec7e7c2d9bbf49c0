"""Transformers of diffusers and facebookresearch/DiT on mmfast, beside their own code."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import weakref

import pytest
import torch
from cases import normal
from patched import assert_same, default_dtype
from torch import nn
from torch._subclasses import FakeTensorMode

import mmfast
from mmfast.integrations import patch, rehearsal, unpatch
from mmfast.integrations.norms import kind_of, modulated, next_branch

pytest.importorskip("diffusers")

from diffusers.models import attention_dispatch
from transformers_of_diffusers import MODELS, output, randomised

from benchmarks import transformers

pytestmark = pytest.mark.skipif(
    bool(mmfast.backends.extension_missing()), reason="the compiled extension is absent"
)


def build(name):
    model, inputs = MODELS[name]()
    return randomised(model), inputs


def gradients(model, inputs):
    """Of the output's mean square, for every parameter and the hidden states."""
    inputs = {**inputs, "hidden_states": inputs["hidden_states"].clone().requires_grad_()}
    torch.manual_seed(0)  # labels are dropped at random in training
    loss = output(model, inputs).square().mean()
    wanted = [inputs["hidden_states"], *model.parameters()]
    return torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_alike(got, want):
    """To rounding; some gradients, such as a key's bias, are nothing but that."""
    largest = max(t.abs().max().item() for t in want if t is not None)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("name", MODELS)
def test_same(name):
    model, inputs = build(name)
    twin = copy.deepcopy(model)
    report = patch(twin)
    torch.testing.assert_close(output(twin, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)
    assert_alike(gradients(twin, inputs), gradients(model, inputs))
    assert list(twin.state_dict()) == list(model.state_dict())
    report.undo()
    assert_same(output(twin, inputs), output(model, inputs), exact=True)


EXPECTED = {
    "DiT": {"BasicTransformerBlock": 2, "AdaLayerNormZero": 2, "Attention": 2},
    "PixArt": {"BasicTransformerBlock": 2, "Attention": 4},
    "SD3": {"JointTransformerBlock": 3, "Attention": 4, "SD35AdaLayerNormZeroX": 1},
    "Flux": {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1, "FluxAttention": 2},
    "Wan": {"WanTransformerBlock": 2, "WanAttention": 4},
    "Lumina2": {"Attention": 3},
}


@pytest.mark.parametrize("name", MODELS)
def test_report(name):
    report = patch(build(name)[0])
    found = [entry.class_name for entry in report.swapped]
    for class_name, count in EXPECTED[name].items():
        assert found.count(class_name) == count, str(report)
    assert not report.left, str(report)


@pytest.mark.parametrize("name", ["DiT", "SD3", "Flux"])
def test_compiles_whole(name):
    model, inputs = build(name)
    patch(model)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, return_dict=False)
        torch.testing.assert_close(got[0], output(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_no_worse(name):
    model, inputs = build(name)
    exact = output(copy.deepcopy(model).double(), _to(inputs, torch.float64))
    low = copy.deepcopy(model).bfloat16()
    theirs = output(low, _to(inputs, torch.bfloat16)).double()
    patch(low)
    ours = output(low, _to(inputs, torch.bfloat16)).double()
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def _to(inputs, dtype):
    return {
        name: value.to(dtype)
        if torch.is_tensor(value) and value.is_floating_point() and not name.endswith("_ids")
        else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("name", ["DiT", "Flux"])
def test_copies(name):
    model, inputs = build(name)
    want = output(model, inputs)
    patch(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(output(twin, inputs), want, rtol=1e-4, atol=1e-5)
    unpatch(twin)
    for plain in (twin, pickle.loads(pickle.dumps(model))):
        assert_same(output(plain, inputs), want, exact=True)
        with pytest.raises(ValueError, match="is patched"):
            unpatch(plain)


def test_gradient_checkpointing():
    model, inputs = build("DiT")
    twin = copy.deepcopy(model)
    patch(twin)
    twin.enable_gradient_checkpointing()
    assert_alike(gradients(twin.train(), inputs), gradients(model.train(), inputs))


def test_a_backend_that_the_user_chose_stays(monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    model, inputs = build("Flux")
    patch(model)
    model.set_attention_backend("_native_math")  # of all models

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(mmfast, "scaled_dot_product_attention", never)
    monkeypatch.setattr(mmfast, "joint_attention", never)
    output(model, inputs)


class Attention(transformers.Attention):
    """As older timm has it."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q * self.scale @ k.mT).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class DiTBlock(transformers.DiTBlock):
    def __init__(self):
        super().__init__(48, 2)
        self.attn = Attention(48, 2)


class FinalLayer(nn.Module):
    def __init__(self, dim=48):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, 16)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(transformers.modulated(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(self, block=DiTBlock):
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.final_layer = FinalLayer()

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def test_facebookresearch():
    model = randomised(DiT())
    twin = copy.deepcopy(model)
    report = patch(twin)
    assert [entry.name for entry in report.swapped] == ["blocks.0", "blocks.1", "final_layer"]
    x, c = normal(2, 9, 48), normal(2, 48, seed=1)
    torch.testing.assert_close(twin(x, c), model(x, c), rtol=1e-4, atol=1e-5)
    report.undo()
    assert_same(twin(x, c), model(x, c), exact=True)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Wan", ("FP32LayerNorm", "RMSNorm")),
        ("Flux", ("LayerNorm", "RMSNorm")),
        ("SD3", ("LayerNorm", "RMSNorm")),
        ("facebookresearch", ("Attention", "Linear", "LayerNorm")),
    ],
)
def test_hooks_inside_of_blocks_run(name, kinds):
    """Once each, also of modules that our forward would not have called."""
    if name == "facebookresearch":
        model, inputs = randomised(DiT()), (normal(2, 9, 48), normal(2, 48, seed=1))
        want = model(*inputs)
    else:
        model, inputs = build(name)
        want = output(model, inputs)
    patch(model)
    hooked, called = [], []
    for path, module in model.named_modules():
        if type(module).__name__ in kinds:
            hooked.append(path)
            module.register_forward_hook(lambda *_, path=path: called.append(path))
    got = model(*inputs) if name == "facebookresearch" else output(model, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert sorted(called) == sorted(hooked)
    assert hooked


def test_a_changed_copy_is_left():
    class Changed(DiTBlock):
        def forward(self, x, c):
            return super().forward(x, c) + x

    Changed.__name__ = "DiTBlock"
    report = patch(DiT(Changed))
    assert [entry.name for entry in report.swapped] == ["final_layer"]
    assert "gives something else than the original's" in report.left[0].left


class ByDepth(DiTBlock):
    """Prints the same at every depth."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x, c):
        for _ in range(self.times):
            x = super().forward(x, c)
        return x


class Learned(DiTBlock):
    """With a parameter or a buffer that is not printed, or without."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x, c):
        out = super().forward(x, c)
        return out + self.moved if hasattr(self, "moved") else out


@pytest.mark.parametrize(
    "second",
    [
        lambda: ByDepth(2),
        lambda: Learned(moved=nn.Parameter(torch.ones(48))),
        lambda: Learned(moved=torch.ones(48)),
    ],
    ids=["attribute", "parameter", "buffer"],
)
def test_blocks_that_print_alike_are_told_apart(second):
    other = second()
    kind = type(other)
    kind.__name__ = "DiTBlock"
    first = kind(1) if kind is ByDepth else kind()
    report = patch(nn.ModuleList([first, kind(1) if kind is ByDepth else kind(), other]))
    assert [entry.name for entry in report.swapped] == ["0", "1"], str(report)
    assert "gives something else than the original's" in report.left[0].left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["weights", "RMS", "hook", "another"])
def test_norms_of_blocks_that_are_not_the_original_s(change, dtype):
    """Also in the op that a whole block can be."""
    setting = dataclasses.replace(transformers.SETTINGS[0], blocks=1)
    block = randomised(transformers.DiT(setting)).blocks[0].to(dtype)
    width = block.norm1.normalized_shape[0]

    def altered(block):
        if change == "weights":
            block.norm2 = nn.LayerNorm(width, eps=1e-6, dtype=dtype)
            nn.init.normal_(block.norm2.weight, generator=torch.Generator().manual_seed(1))
        elif change == "RMS":
            block.norm1 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        elif change == "another":
            block.norm1 = nn.Identity()
        else:
            block.norm2.register_forward_hook(lambda *given: given[-1] * 2)
        return block

    x, c = normal(2, 33, width).to(dtype), normal(2, width, seed=1).to(dtype)
    theirs = altered(copy.deepcopy(block)).double()(x.double(), c.double())
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    for first in (True, False):
        ours = copy.deepcopy(block)
        if first:
            patch(ours)
            altered(ours)
        else:
            altered(ours)
            patch(ours)
        with torch.no_grad():
            got = ours(x, c).double()
        assert (got - theirs).norm() < limit * theirs.norm()


@pytest.mark.parametrize("setting", transformers.SETTINGS[:2], ids=lambda setting: setting.key)
def test_wide_blocks_are_taken(setting):
    model = transformers.DiT(dataclasses.replace(setting, blocks=1))
    report = patch(model)
    assert "blocks.0" in [entry.name for entry in report.swapped], str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_patched_anywhere(dtype, monkeypatch):
    """What the caller has set does not count as a difference."""
    monkeypatch.setattr(rehearsal, "_tried", weakref.WeakKeyDictionary())
    model = transformers.DiT(transformers.Setting("", 48, 2, 2, 2, 9))
    autocast = torch.autocast("cpu", torch.bfloat16)
    with default_dtype(dtype), torch.inference_mode(), torch.device("meta"), autocast:
        assert not patch(model).left


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("buffer", [False, True])
def test_patched_without_values(kind, buffer, monkeypatch):
    """Models of fake tensors, and on the meta device; blocks may have buffers."""
    monkeypatch.setattr(rehearsal, "_tried", weakref.WeakKeyDictionary())
    mode = FakeTensorMode() if kind == "fake" else torch.device("meta")
    with mode:
        model = transformers.DiT(transformers.Setting("", 48, 2, 2, 2, 9))
        for block in model.blocks:
            if buffer:
                block.register_buffer("scale", torch.ones(3))
        tokens, condition = torch.randn(2, 9, 48), torch.randn(2, 48)
        report = patch(model)
        assert not report.left
        output = model.blocks[0](tokens, condition)
    assert output.shape == tokens.shape
    assert output.device.type == ("meta" if kind == "meta" else "cpu")
    unpatch(model)
    assert not patch(model).left  # outside of the mode, too


def test_a_norm_with_a_forward_of_its_own_is_called():
    class Doubled(nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    assert kind_of(nn.RMSNorm(8)) == "rms"
    assert kind_of(Doubled(8)) is None
    x = normal(2, 3, 8)
    got = modulated(Doubled(8), x, None, None)
    torch.testing.assert_close(got, 2 * nn.RMSNorm(8)(x))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_eps_that_is_not_given_is_that_of_the_dtype(dtype, affine):
    norm = nn.RMSNorm(8, eps=None, elementwise_affine=affine, dtype=dtype)
    x = normal(2, 3, 8).to(dtype) * 1e-4
    zeros = x.new_zeros(2, 8)
    torch.testing.assert_close(modulated(norm, x, zeros, zeros), norm(x))
    _, got = next_branch(norm, torch.zeros_like(x), torch.ones_like(zeros), x, zeros, zeros)
    torch.testing.assert_close(got, norm(x))


def test_infinity_does_not_hide_differences():
    theirs = torch.tensor([1.0, math.inf, math.nan])
    assert rehearsal._alike(theirs.clone(), theirs)
    assert not rehearsal._alike(torch.tensor([2.0, math.inf, math.nan]), theirs)
