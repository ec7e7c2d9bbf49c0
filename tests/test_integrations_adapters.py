"""Low-rank adapters in patched transformers, those of peft and their like: none is passed by."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import pytest
import torch
from cases import normal
from torch import Tensor, nn

import mmfast
from mmfast.integrations import patch, unpatch

pytest.importorskip("diffusers")

from test_integrations_blocks import DiT, assert_alike
from transformers_of_diffusers import MODELS, output, randomised

pytestmark = pytest.mark.skipif(
    bool(mmfast.backends.extension_missing()), reason="the compiled extension is absent"
)
_LAYERS = r"(.*\.)?(qkv|proj|mlp\.[02]|linear|adaLN_modulation\.1|to_[qkv]|to_out\.0|add_[qkv]_proj"
_LAYERS += r"|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out|linear_[123])"


class Adapter(nn.Module):
    """In the place of a linear layer, with that layer's attributes, as adapters of peft are."""

    def __init__(self, layer: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.Parameter(normal(2, layer.in_features, seed=seed) / 4)
        self.up = nn.Parameter(normal(layer.out_features, 2, seed=seed + 1) / 4)
        self.enabled, self.merged = True, False
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + x @ self.down.T @ self.up.T if self.enabled and not self.merged else y

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled

    def merge(self) -> None:
        self.base_layer.weight.data += self.up.data @ self.down.data
        self.merged = True

    def unmerge(self) -> None:
        self.base_layer.weight.data -= self.up.data @ self.down.data
        self.merged = False


def look_alike(model: nn.Module) -> None:
    model.requires_grad_(False)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for seed, (name, layer) in enumerate(found):
        if re.fullmatch(_LAYERS, name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapter(layer, 2 * seed))


def lora(model: nn.Module, **options: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = [name for name in found if re.fullmatch(_LAYERS, name)]
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=chosen, **options)
    peft.inject_adapter_in_model(config, model)


def dora(model: nn.Module) -> None:
    lora(model, use_dora=True)


def adapters(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if hasattr(module, "base_layer"))


class Whole(DiT):
    """Called as the models of diffusers are."""

    def forward(self, x: Tensor, c: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (super().forward(x, c),)


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "facebookresearch":
        return randomised(Whole()), {"x": normal(2, 9, 48), "c": normal(2, 48, seed=1)}
    model, inputs = MODELS[name]()
    return randomised(model), inputs


def results(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the adapters."""
    out = output(model, inputs)
    learning = [p for p in model.parameters() if p.requires_grad]
    return out, list(torch.autograd.grad(out.square().mean(), learning, allow_unused=True))


@pytest.mark.parametrize("adapt", [look_alike, lora, dora])
@pytest.mark.parametrize("first", [True, False], ids=["patched before", "patched after"])
@pytest.mark.parametrize("name", ["facebookresearch", *MODELS])
def test_adapters(name, first, adapt):
    model, inputs = build(name)
    bare = output(model, inputs)
    twin = copy.deepcopy(model)
    if first:
        patch(twin)
    adapt(model)
    adapt(twin)
    if not first:
        patch(twin)

    def changed(how) -> Tensor:
        for either in (model, twin):
            for adapter in adapters(either):
                how(adapter)
        with torch.no_grad():
            got, want = output(twin, inputs), output(model, inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
        return want

    want, grads = results(model, inputs)
    assert (want - bare).norm() > 0.1 * bare.norm()
    got, of_twin = results(twin, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    assert_alike(of_twin, grads)
    off = changed(lambda adapter: adapter.enable_adapters(False))
    torch.testing.assert_close(off, bare, rtol=1e-4, atol=1e-5)
    changed(lambda adapter: adapter.enable_adapters(True))
    merged = changed(lambda adapter: adapter.merge())
    assert (merged - bare).norm() > 0.1 * bare.norm()
    changed(lambda adapter: adapter.unmerge())
    unpatch(twin)
    again = output(twin, inputs)
    torch.testing.assert_close(again, output(model, inputs), rtol=0, atol=0)
