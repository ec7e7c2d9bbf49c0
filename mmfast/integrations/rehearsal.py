"""Whether a module's own forward and ours give the same, tried on a small input.

For modules that are known only by their class's name, behind which may be anything.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily
from torch.utils._pytree import tree_flatten

from mmfast.integrations.binding import on_own_code
from mmfast.nn.layers import HOOKS

_NUM_CODES = 8


def difference(module: nn.Module, forward: Callable[..., Any]) -> list[str]:
    """What ``forward`` does differently from the module's own, in training or in evaluation.

    Outputs and gradients are compared on a view of the module with a few codes of its own, so
    that the module does not change and the size of its codebook does not matter.

    Args:
        module: has ``embedding``, an ``nn.Embedding``, ``n_e``, the number of its codes, and takes
            ``(B, D, height, width)``.
        forward: takes the module and what the module's own takes.
    """
    return _differences(lambda run, training: _results(module, run, training), module, forward)


def block_difference(module: nn.Module, forward: Callable[..., Any]) -> list[str]:
    """What ``forward`` does differently from a transformer block's own.

    Outputs and gradients are compared on a copy of the block with weights of its own: those that
    begin at zero would hide everything. Blocks made alike are tried once.

    Args:
        module: takes tokens ``(B, L, C)`` and a condition ``(B, C)``, and has
            ``adaLN_modulation``, whose last layer is linear.
        forward: takes the module and what the module's own takes.
    """
    tried = _tried.setdefault(type(module), {})
    made = _made_of(module)
    key = (forward, made)
    if made is not None and key in tried:
        return tried[key]
    with _by_itself():
        copied = _randomised(module)
    found = _differences(
        lambda run, training: _block_results(copied, run, training), module, forward
    )
    if made is not None:
        tried[key] = found
    return found


def _made_of(module: nn.Module) -> Hashable:
    """All that the code of a module could make a difference of, but the values of parameters.

    None where there is more than can be compared: a buffer, or an attribute of an unknown type.
    """
    found: list[Hashable] = []
    for name, part in on_own_code(module).named_modules():
        if part._buffers:
            return None
        shapes = [(n, None if p is None else p.shape) for n, p in part._parameters.items()]
        found.append((name, weakref.ref(type(part)), *shapes))  # a class may go meanwhile
        for key, value in vars(part).items():
            if key in _OF_EVERY_MODULE or not key.isidentifier():
                continue
            if not _is_plain_value(value):
                return None
            found.append((key, repr(value)))
    return tuple(found)


def _is_plain_value(value: Any) -> bool:
    """Whether it prints all that it is."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain_value, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


# Hooks are not tried, and both modes are.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_tried: WeakKeyDictionary[type, dict[Any, list[str]]] = WeakKeyDictionary()


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Without what the caller has set: fake tensors, inference mode, autocast, a default device,
    random state. Nothing of it changes, nor the random state of other devices, which a seed for all
    would reach.
    """
    with (
        unset_fake_temporarily(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.default_generator.manual_seed(0)
        yield


def _differences(
    results: Callable[[Callable[..., Any], bool], list[Any]],
    module: nn.Module,
    forward: Callable[..., Any],
) -> list[str]:
    """``results(run, training)``: what a forward gives; for the module's own and for ours."""
    for training in (False, True):
        mode = "training" if training else "evaluation"
        try:
            with _by_itself():
                want = results(type(module).forward, training)
        except Exception as error:  # whatever a foreign forward may raise
            return [f"its forward refuses a small input in {mode}: {error}"]
        try:
            with _by_itself():
                got = results(forward, training)
        except Exception as error:
            return [f"its forward needs other attributes in {mode}: {error}"]
        with _by_itself():
            alike = len(got) == len(want) and all(map(_alike, got, want))
        if not alike:
            return [f"its forward gives something else than the original's in {mode}"]
    return []


def _randomised(module: nn.Module) -> nn.Module:
    """A copy on its own code, in float32 on the CPU, with small random parameters and no hooks.

    Nothing is read of the parameters, which may be sharded.
    """
    view = on_own_code(module)
    generator = torch.Generator().manual_seed(0)
    drawn: dict[int, Any] = {}
    for parameter in view.parameters():
        width = parameter.shape[-1] if parameter.dim() > 1 else 4
        values = _normal(generator, *parameter.shape) / width**0.5
        drawn[id(parameter)] = nn.Parameter(values)
    drawn.update({id(buffer): _copied(buffer) for buffer in view.buffers()})
    for part in view.modules():
        # What fully_shard keeps with a module is under keys that no attribute can have.
        for key in [key for key in vars(part) if not key.isidentifier()]:
            del vars(part)[key]
        vars(part).update({hooks: OrderedDict() for hooks in HOOKS})
    return copy.deepcopy(view, drawn).to("cpu", torch.float32)


def _block_results(block: Any, forward: Callable[..., Any], training: bool) -> list[Any]:
    """All that forward returns, and the gradients of tokens and condition."""
    block.train(training)
    generator = torch.Generator().manual_seed(1)
    width = block.adaLN_modulation[-1].in_features
    x = _normal(generator, 2, 5, width).requires_grad_()
    c = _normal(generator, 2, width).requires_grad_()
    leaves, structure = tree_flatten(forward(block, x, c))
    total = torch.stack([leaf.square().sum() for leaf in leaves if isinstance(leaf, Tensor)])
    return [structure, *leaves, *torch.autograd.grad(total.sum(), (x, c), allow_unused=True)]


def _results(module: nn.Module, forward: Callable[..., Any], training: bool) -> list[Any]:
    """All that forward returns, the structure of it, and the gradients of z and of the codes."""
    view: Any = on_own_code(module).train(training)
    view._buffers = {name: b if b is None else _copied(b) for name, b in view._buffers.items()}
    generator = torch.Generator().manual_seed(0)
    num_dims = view.embedding.embedding_dim
    codes = _normal(generator, _NUM_CODES, num_dims)
    view.embedding = nn.Embedding.from_pretrained(codes, freeze=False)
    view.n_e = _NUM_CODES
    z = _normal(generator, 2, num_dims, 2, 3).requires_grad_()
    # An index without a place in a remapping may be drawn at random.
    leaves, structure = tree_flatten(forward(view, z))
    of = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    total = sum((leaf.square().sum() for leaf in of), z.sum())
    gradients = torch.autograd.grad(total, (z, view.embedding.weight), allow_unused=True)
    return [structure, *leaves, *gradients]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _copied(buffer: Tensor) -> Tensor:
    """On the CPU; zeros of a buffer without values."""
    if buffer.is_meta or is_fake(buffer):
        return torch.zeros(buffer.shape, dtype=buffer.dtype)
    return buffer.detach().to("cpu", copy=True)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        # Sums of large terms may come out small, with the rounding of the large ones.
        largest = (
            float(b.detach().abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).amax())
            if b.numel()
            else 0.0
        )
        atol = 1e-5 * max(1.0, largest)
        return torch.allclose(a, b, rtol=1e-4, atol=atol, equal_nan=True)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
