"""Linear layers of modules on mmfast's products, as long as they are no more than that."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as _module

from mmfast.ops.gated_activation import gated_activation
from mmfast.ops.linear import linear as _linear

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a call of the module runs nothing but the ``forward`` of one of these classes.

    Adapters are some of what else there may be, and what :func:`is_bare` excludes.
    """
    return type(module) in kinds and "forward" not in vars(module) and is_bare(module)


def is_bare(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor parameters that are sharded or quantised."""
    # Asked of every norm and layer in every call: without generators, in half the time.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False
    if module._backward_pre_hooks or _module._has_any_global_hook():
        return False
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return False
    return True


def linear(layer: nn.Module, x: Tensor, activation: str = "none") -> Tensor:
    """``layer(activation(x))``, a linear layer or what somebody has put in its place.

    Args:
        layer: ``(..., K)`` to ``(..., N)``.
        x: ``(..., K)``.
        activation: of :func:`mmfast.linear`.
    """
    if is_plain(layer, nn.Linear):
        assert isinstance(layer, nn.Linear)
        return _linear(x, layer.weight, layer.bias, activation=activation)
    return layer(x if activation == "none" else gated_activation(x, activation=activation))
