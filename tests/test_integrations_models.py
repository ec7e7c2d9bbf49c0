"""Many transformers of diffusers, patched: the same outputs and gradients, or reported as left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import mmfast
from mmfast.integrations import patch, unpatch

pytest.importorskip("diffusers")

from more_transformers_of_diffusers import OTHERS, build
from transformers_of_diffusers import randomised

pytestmark = pytest.mark.skipif(
    bool(mmfast.backends.extension_missing()), reason="the compiled extension is absent"
)


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import diffusers

    if not hasattr(diffusers, name.partition(",")[0]):
        pytest.skip("this version of diffusers has no such model")
    model, inputs = build(name)
    return randomised(model), inputs


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return [t for t in tree_leaves(model(**inputs, return_dict=False)) if isinstance(t, Tensor)]


def gradients(model: nn.Module, of: list[Tensor]) -> dict[str, Tensor]:
    """Of all parameters that have one."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = torch.stack([t.square().mean() for t in of]).sum()
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def error(got: list[Tensor], exact: list[Tensor]) -> float:
    """Relative, of all numbers together."""
    pairs = list(zip(got, exact, strict=True))
    wrong = sum(float((g.double() - e.double()).square().sum()) for g, e in pairs)
    return (wrong / sum(float(e.double().square().sum()) for _, e in pairs)) ** 0.5


@pytest.mark.parametrize("name", OTHERS)
def test_same(name: str) -> None:
    model, inputs = made(name)
    twin = copy.deepcopy(model)
    report = patch(twin)
    assert [entry for entry in report.swapped if "attention" in entry.done], str(report)
    of_twin, of_model = outputs(twin, inputs), outputs(model, inputs)
    for a, b in zip(of_twin, of_model, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    got, want = gradients(twin, of_twin), gradients(model, of_model)
    assert got.keys() == want.keys()
    largest = max(t.abs().max().item() for t in want.values())
    for key, grad in want.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-3, atol=1e-5 * largest)
    unpatch(twin)
    for a, b in zip(outputs(twin, inputs), of_model, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# Their own code fails in bfloat16.
_FLOAT32_ONLY = ("Kandinsky5Transformer3DModel",)


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in _FLOAT32_ONLY])
def test_bfloat16_is_no_worse(name: str) -> None:
    model, inputs = made(name)
    with torch.no_grad():
        exact = outputs(model, inputs)  # float32: some cannot be run in float64
        model = model.bfloat16()
        inputs = tree_map(
            lambda t: t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
        )
        theirs = outputs(model, inputs)
        patch(model)
        ours = outputs(model, inputs)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert error(ours, exact) <= 1.2 * error(theirs, exact)
