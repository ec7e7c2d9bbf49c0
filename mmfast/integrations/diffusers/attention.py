"""diffusers: the processors inside its attention modules.

A processor keeps its object and attributes and gets a class derived from its own. The call is the
library's code with mmfast's attention, or, for those in :data:`_FUSED`, one that takes the text's
and the image's tokens as they are, and norms and rotates in one pass.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from mmfast.integrations.binding import ClassSwap, Library, Swap
from mmfast.integrations.diffusers import processors
from mmfast.integrations.rebased import attends, rebased

# By the processor's class: what takes the place of its call, and says where it may.
_FUSED: dict[str, Callable[..., Any]] = {
    "FluxAttnProcessor": processors.flux,
    "JointAttnProcessor2_0": processors.joint,
    "WanAttnProcessor": processors.wan,
}


def _pickled(processor: Any, _: Any) -> tuple[Any, ...]:
    """As a processor of the library's class: what is saved loads without mmfast."""
    return object.__new__, (_own_class(processor),), dict(vars(processor))


def _copied(processor: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, which keeps the patch."""
    twin = object.__new__(type(processor))
    memo[id(processor)] = twin
    vars(twin).update(copy.deepcopy(vars(processor), memo))
    return twin


@functools.cache
def _on_mmfast(theirs: type) -> type:
    """The class derived from a processor's class that attends with mmfast."""
    call = rebased(theirs.__call__)
    fused = _FUSED.get(theirs.__name__) if theirs.__module__.startswith("diffusers.") else None
    if fused is not None:
        call = fused(call)

    members = {
        "__call__": call,
        "__module__": __name__,
        "__reduce_ex__": _pickled,
        "__deepcopy__": _copied,
    }
    return type(theirs.__name__, (theirs,), members)


def _own_class(processor: Any) -> type:
    """The library's class of a processor, patched or not."""
    theirs = type(processor)
    return theirs.__bases__[0] if theirs.__module__ == __name__ else theirs


def matches(module: nn.Module) -> bool:
    processor = getattr(module, "processor", None)
    return processor is not None and attends(_own_class(processor).__call__)


def swap(module: nn.Module) -> Swap:
    processor = module.processor
    theirs = _own_class(processor)
    if isinstance(processor, nn.Module):
        return Swap(left="its processor is a module itself")
    name = theirs.__name__
    done = "attention with norms and rotation" if name in _FUSED else "attention"
    if type(processor) is not theirs:
        return Swap(done=done)
    return Swap(exchanges=(ClassSwap(processor, theirs, _on_mmfast(theirs)),), done=done)


def restored_processor(module: nn.Module) -> bool:
    """Give the processor of a module the library's class back; whether it had ours."""
    processor = getattr(module, "processor", None)
    if type(processor).__module__ != __name__:
        return False
    return ClassSwap(processor, _own_class(processor), type(processor)).undo()


LIBRARY = Library("diffusers", ("attention modules with a processor",), matches, swap)
