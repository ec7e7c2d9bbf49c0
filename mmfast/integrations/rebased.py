"""Functions of other libraries whose global names stand for something else: their code, our ops.

No module is changed, and nothing is looked up at the call, so that ``torch.compile`` sees one plain
function.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.nn.functional

from mmfast.integrations.attention import dispatch_attention_fn, scaled_dot_product_attention

_ATTENTION = "scaled_dot_product_attention"
_DISPATCH = "dispatch_attention_fn"


def _altered(module: ModuleType, **members: Any) -> ModuleType:
    """A module of the same name with other members."""
    copy = ModuleType(module.__name__)
    copy.__dict__.update(vars(module))
    copy.__dict__.update(members)
    return copy


_functional = _altered(
    torch.nn.functional, scaled_dot_product_attention=scaled_dot_product_attention
)
_nn = _altered(torch.nn, functional=_functional)
_OURS: dict[Any, Any] = {
    torch: _altered(torch, nn=_nn),
    torch.nn: _nn,
    torch.nn.functional: _functional,
    torch.nn.functional.scaled_dot_product_attention: scaled_dot_product_attention,
}


def _replacements(function: FunctionType) -> dict[str, Any]:
    """The global names in a function's code that lead to attention, and what they become."""
    names = _names(function.__code__)
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    replacements: dict[str, Any] = {}
    if _ATTENTION in names:
        replacements = {
            name: _OURS[value]
            for name, value in found.items()
            if (isinstance(value, ModuleType) or name == _ATTENTION) and value in _OURS
        }
    theirs = found.get(_DISPATCH)
    if getattr(theirs, "__module__", "") == "diffusers.models.attention_dispatch":
        replacements[_DISPATCH] = dispatch_attention_fn(theirs)
    return replacements


def _names(code: CodeType) -> set[str]:
    """All names in a function's code, and in that of the functions inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def attends(function: Any) -> bool:
    """Whether :func:`rebased` would change anything."""
    return isinstance(function, FunctionType) and bool(_replacements(function))


def rebased(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of ``function`` whose attention is that of mmfast.

    What it calls in turn is not looked at.
    """
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, **_replacements(function)}
    # With a name, torch.compile would read the globals of the module of that name instead.
    del names["__name__"]
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__qualname__ = function.__qualname__
    copy.__doc__ = function.__doc__
    copy.__module__ = __name__
    return copy
