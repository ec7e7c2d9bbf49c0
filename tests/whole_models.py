"""What whole models are held to: gradients, steps of an optimiser, compilation, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from test_models_dit import randomise
from torch import Tensor, nn

import mmfast

Loss = Callable[[nn.Module, torch.dtype], Tensor]
__all__ = ["assert_sound", "gradients", "randomise"]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Of all parameters that learn; each of them must have one."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, learning))


def distance(got: list[Tensor], exact: list[Tensor]) -> float:
    """Of all numbers together, relative."""
    pairs = zip(got, exact, strict=True)
    squares = sum(float((g.double() - e.double()).square().sum()) for g, e in pairs)
    return (squares / sum(float(e.double().square().sum()) for e in exact)) ** 0.5


def assert_sound(
    model: nn.Module, loss: Loss, error: float = 3e-6, *, compiles: bool = True
) -> None:
    """Loss, gradients and a step of AdamW in float32 against float64 on the reference backend;
    compiled without a break, and with gradient checkpointing, the same.

    Args:
        model: with random weights, in evaluation mode.
        loss: of a model, of inputs of a dtype.
        error: relative, of all gradients together.
        compiles: whether it is compiled.
    """
    exact = copy.deepcopy(model).double()
    with mmfast.use_backend("reference"):
        of_exact = gradients(exact, loss(exact, torch.float64))
        plain = copy.deepcopy(model)
        of_plain = gradients(plain, loss(plain, torch.float32))
    value = loss(model, torch.float32)
    made = gradients(model, value)
    assert distance(made, of_exact) < error
    assert all(bool(g.isfinite().all()) for g in made)
    # A step of Adam is the gradient's sign where the gradient is small: eps is not.
    moved = []
    for module, grads in ((copy.deepcopy(model), made), (plain, of_plain)):
        learning = [p for p in module.parameters() if p.requires_grad]
        for parameter, grad in zip(learning, grads, strict=True):
            parameter.grad = grad
        torch.optim.AdamW(learning, 1e-2, eps=1e-3).step()
        moved.append([p.detach() for p in learning])
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-5)
    if compiles:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(loss(compiled, torch.float32), value)
    if hasattr(model, "gradient_checkpointing"):
        model.gradient_checkpointing = True
        torch.testing.assert_close(gradients(model, loss(model, torch.float32)), made)
        model.gradient_checkpointing = False
