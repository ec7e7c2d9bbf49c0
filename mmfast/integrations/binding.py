"""Methods bound to single modules: how a module of another library gets other code.

The module itself stays in place, with its class, parameters, buffers, hooks and state-dict keys.
Its instance gets an attribute ``forward`` (or another method), which deleting undoes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

from torch import nn

_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Method:
    """``function``, to be bound to ``owner`` under the function's own name.

    ``written_for`` is the class whose method of that name the function stands for.
    """

    owner: nn.Module
    written_for: type
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    def objections(self) -> list[str]:
        """Why binding would change more than the speed; empty when nothing speaks against it."""
        theirs = getattr(type(self.owner), self.name)
        if theirs is not getattr(self.written_for, self.name):
            return [f"{type(self.owner).__name__} has a {self.name} of its own"]
        replaced = vars(self.owner).get(self.name)
        # A pickled patch comes back as the class's own method, bound to the instance.
        harmless = replaced is None or getattr(replaced, "__func__", None) is theirs
        if not harmless and not is_bound(self.owner, self.name):
            return [f"something else has replaced {self.name} on this module"]
        expected, got = _parameters(self.function), _parameters(theirs)
        if expected != got and "options" not in expected:
            return [
                f"{self.name} of this version takes ({', '.join(got)}), "
                f"expected ({', '.join(expected)})"
            ]
        return []

    def bind(self) -> None:
        setattr(self.owner, self.name, MethodType(self.function, self.owner))


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@dataclass(frozen=True)
class ClassSwap:
    """An object whose class is exchanged for one of ours, which is derived from it.

    Attributes:
        owner: the object.
        before: its own class.
        after: ours.
        added: attributes that objects of our class have besides.
    """

    owner: Any
    before: type
    after: type
    added: tuple[str, ...] = ()

    def make(self) -> None:
        self.owner.__class__ = self.after

    def undo(self) -> bool:
        """Give it its own class back; whether it had ours, or has its own already."""
        if type(self.owner) is self.after:
            for name in self.added:
                vars(self.owner).pop(name, None)
            self.owner.__class__ = self.before
        return type(self.owner) is self.before

    def __str__(self) -> str:
        return f"the class of a {self.before.__name__}"


class Exchange(Protocol):
    """A change that is not of a module's method."""

    def make(self) -> None:
        """Make it."""

    def undo(self) -> bool:
        """Take it back; False where something else has changed it since."""


@dataclass(frozen=True)
class Swap:
    """What a library's file would do with a module.

    Attributes:
        methods: to bind; none where the module stays as it is.
        done: what then runs on mmfast, for the report.
        left: what keeps its own code and why, for the report.
        exchanges: other changes to make.
    """

    methods: tuple[Method, ...] = ()
    done: str = ""
    left: str = ""
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class Library:
    """A library whose modules can be swapped, or some of them.

    Attributes:
        name: as it is imported.
        classes: the names of the classes that ``matches`` looks for.
        matches: whether this file answers for a module. Imports nothing.
        swap: what to do with such a module; changes nothing yet.
    """

    name: str
    classes: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    swap: Callable[[nn.Module], Swap]


def joined(*parts: Library) -> Library:
    """One library of several parts, the first that matches answers for a module."""

    def part_of(module: nn.Module) -> Library | None:
        return next((part for part in parts if part.matches(module)), None)

    def swap(module: nn.Module) -> Swap:
        part = part_of(module)
        assert part is not None  # it matched
        return part.swap(module)

    classes = tuple(name for part in parts for name in part.classes)
    return Library(parts[0].name, classes, lambda module: part_of(module) is not None, swap)


class NotLoaded:
    """Stands for a class of a module that nothing has imported: nothing is an instance of it."""


def loaded_class(module: str, name: str) -> type:
    """Class ``name`` of ``module``; :class:`NotLoaded` unless that has been imported already."""
    return getattr(sys.modules.get(module), name, NotLoaded)


def method_of(
    module: nn.Module, library: str, functions: Mapping[str, Callable[..., Any]]
) -> Method | None:
    """The function for the first class, by its name in module ``library``, that this is one of."""
    for name, function in functions.items():
        theirs = loaded_class(library, name)
        if isinstance(module, theirs):
            return Method(module, theirs, function)
    return None


def is_bound(module: nn.Module, name: str) -> bool:
    """Whether ``name`` of this module is a method that an integration bound."""
    method = vars(module).get(name)
    return isinstance(method, MethodType) and method.__func__.__module__.startswith(_PACKAGE)


def bound_names(module: nn.Module) -> list[str]:
    """The names of all methods that integrations bound to this module."""
    return [name for name in vars(module) if is_bound(module, name)]


def own_class(module: nn.Module) -> type[nn.Module]:
    """Its class, or the one that ``fully_shard`` has derived its class from."""
    theirs = type(module)
    sharded = loaded_class("torch.distributed.fsdp", "FSDPModule")
    if not issubclass(theirs, sharded):
        return theirs
    return next(
        c for c in theirs.__mro__ if issubclass(c, nn.Module) and not issubclass(c, sharded)
    )


def on_own_code(module: nn.Module) -> nn.Module:
    """A view of ``module``, the same tensors and hooks, without the methods that were bound.

    Submodules included; for calls that need the library's own code after all. The patched module
    is not touched, so that other threads can go on using it.
    """
    theirs = own_class(module)
    view = theirs.__new__(theirs)
    vars(view).update(vars(module))
    for name in bound_names(view):
        delattr(view, name)
    view._modules = {
        name: child if child is None else on_own_code(child)
        for name, child in module._modules.items()
    }
    return view
