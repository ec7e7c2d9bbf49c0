"""The tensors of a model's state, sharded or not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfast.nn.sharded_parameter import is_sharded, set_whole, whole


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state, those that are in the model, by name."""
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def gathered_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the host; all processes must ask."""
    return {name: whole(tensor).cpu() for name, tensor in tensors.items()}


@torch.no_grad()
def sharded_like(target: Tensor, value: Tensor) -> Tensor:
    """``value``, on the device of ``target`` and sharded as it is."""
    if not is_sharded(target):
        return value.to(target.device)
    made = torch.zeros_like(target)
    set_whole(made, value.to(target.device))
    return made


def load_state(model: nn.Module, values: Mapping[str, Tensor], what: str) -> None:
    """Give a model, sharded or not, the state ``values`` of whole tensors.

    Raises:
        ValueError: names or shapes differ; the message names one, and ``what`` has it.
    """
    target = named_state(model)
    check_same(target, values, what)
    model.load_state_dict({n: sharded_like(t, values[n]) for n, t in target.items()})


def check_same(target: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """``values`` have the names and shapes of ``target``, the model's, else ValueError."""
    for name in sorted(target.keys() ^ values.keys()):
        where = "lacks" if name in target else "has, but the model has not,"
        raise ValueError(f"{what} {where} {name}")
    for name, tensor in target.items():
        if tensor.shape != values[name].shape:
            raise ValueError(
                f"{what} has {name} of shape {tuple(values[name].shape)}, "
                f"the model of shape {tuple(tensor.shape)}"
            )
