"""What the tests of the integrations share: a model beside its patched copy."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from mmfast.integrations import PatchReport, patch


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module, PatchReport]:
    """The model, a patched copy of it, and the report."""
    twin = copy.deepcopy(model)
    return model, twin, patch(twin)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with standard normal codes: those of a fresh one may be zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(("embed", "embed_sum", "codebook.weight", "embedding.weight")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def assert_same(got: Any, want: Any, exact: bool = False) -> None:
    """The same structure, types, shapes and values: to rounding, or every bit."""
    got_leaves, got_structure = tree_flatten(got)
    want_leaves, want_structure = tree_flatten(want)
    assert got_structure == want_structure
    tolerances = {"rtol": 0, "atol": 0} if exact else {}
    for a, b in zip(got_leaves, want_leaves, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert a.requires_grad == b.requires_grad
            torch.testing.assert_close(a, b, equal_nan=True, **tolerances)
        else:
            assert a == b


def results(model: nn.Module, run: Callable[[nn.Module, Tensor], Any], x: Tensor) -> list[Any]:
    """What ``run(model, x)`` returns, and the gradients of its floating outputs' squares.

    Random numbers are drawn from the same seed each time.
    """
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    outputs = run(model, x)
    floating = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    if not floating:
        return [outputs]
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    total = sum(t.double().square().sum() for t in floating)
    return [outputs, torch.autograd.grad(total, inputs, allow_unused=True)]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What tensors are made of where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Largest(TorchDispatchMode):
    """Records the most elements that a tensor made inside has."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, stored)
        return made


def largest(run: Callable[[], Any]) -> int:
    """Elements of the largest tensor that ``run()`` makes."""
    with _Largest() as mode:
        run()
    return mode.elements


def own_methods(model: nn.Module) -> Iterator[str]:
    """Names of functions that live on instances of modules instead of on their classes."""
    for module in model.modules():
        yield from (n for n in ("forward", "quantize", "decode_latents") if n in vars(module))
