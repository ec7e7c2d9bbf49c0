"""Any module whose forward calls PyTorch's attention: its own code, with mmfast's."""

from __future__ import annotations

from torch import nn

from mmfast.integrations.binding import Library, Method, Swap
from mmfast.integrations.rebased import attends, rebased


def matches(module: nn.Module) -> bool:
    return attends(type(module).forward)


def swap(module: nn.Module) -> Swap:
    method = Method(module, type(module), rebased(type(module).forward))
    return Swap((method,), done="attention")


LIBRARY = Library("torch", ("modules that call scaled_dot_product_attention",), matches, swap)
