"""AdamW, fused where it can be, and the norm of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.nn.sharded_parameter import is_sharded, whole
from mmfast.train.config import TrainConfig
from mmfast.train.state import sharded_like


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name.

    Raises:
        ValueError: there are none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"a {type(model).__name__} has no parameter to train")
    return found


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of ``model``; weight decay is that of matrices only.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
    """
    parameters = list(trained(model).values())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    on_cpu = any(p.device.type == "cpu" for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=not (on_cpu and any(is_sharded(p) for p in parameters)),
    )


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradients to a norm of at most ``largest`` (0: any); the norm before, ``()``."""
    parameters = list(trained(model).values())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return whole(norm.detach())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimiser's state, those that are in it, as ``parameter:key``."""
    return {
        f"{name}:{key}": value
        for name, parameter in trained(model).items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Take the state that :func:`optimizer_tensors` gave, of whole tensors.

    Raises:
        ValueError: it is that of other parameters.
    """
    parameters = trained(model)
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(":")
        if name not in parameters:
            raise ValueError(f"the checkpoint's optimiser has {name}, which the model has not")
        parameter = parameters[name]
        if key == "step":
            fused = optimizer.param_groups[0]["fused"]
            made = value.to(parameter.device if fused else "cpu")
        else:
            made = sharded_like(parameter.detach(), value)
        optimizer.state[parameter][key] = made
