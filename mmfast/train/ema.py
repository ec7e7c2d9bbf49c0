"""Averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfast.nn.sharded_parameter import is_sharded, set_whole, whole
from mmfast.train.state import check_same, named_state


class Averages:
    """Exponential moving averages of a model's weights and buffers, and a plain copy of the model
    that holds them.

    Floating numbers are averaged, others are copied. Early averages follow faster: the decay is at
    most (1 + n) / (10 + n) after n steps.

    Args:
        model: before it is sharded, compiled or wrapped.
        decay: of the averages; 0: the copy has the weights of the model as they are.
        main: this is the process that needs the copy.
    """

    def __init__(self, model: nn.Module, decay: float, *, main: bool = True) -> None:
        self.decay = decay
        self._main = main
        self._copy = copy.deepcopy(model).eval().requires_grad_(False) if main or decay else None
        self._model = model
        self._averages: dict[str, Tensor] = {}

    def follow(self, model: nn.Module) -> None:
        """Start with the model's weights as they are now, sharded or not."""
        self._model = model
        state = named_state(model)
        if not self.decay:
            return
        if not self._averages:
            assert self._copy is not None
            own = named_state(self._copy)
            sharded = any(is_sharded(t) for t in state.values())
            self._averages = {
                name: t.clone() if sharded else own[name] for name, t in state.items()
            }
            if sharded and not self._main:
                self._copy = None
        for name, tensor in state.items():
            self._averages[name].copy_(tensor)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model after step ``step``, counted from 0."""
        if not self.decay:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        groups: dict[tuple[bool, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in named_state(self._model).items():
            if tensor.is_floating_point():
                key = is_sharded(tensor), tensor.dtype
                averages, now = groups.setdefault(key, ([], []))
                averages.append(self._averages[name])
                now.append(tensor)
            else:
                self._averages[name].copy_(tensor)
        for averages, now in groups.values():
            torch._foreach_lerp_(averages, now, weight)

    def state(self) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint; nothing without a decay."""
        return dict(self._averages)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state` gave, of whole tensors.

        Raises:
            ValueError: names or shapes differ.
        """
        check_same(self._averages, values, "the checkpoint's averages")
        for name, tensor in self._averages.items():
            set_whole(tensor, values[name].to(tensor.device))

    @torch.no_grad()
    def model(self) -> nn.Module | None:
        """The copy with the averaged weights, in evaluation mode; None on other processes than the
        main one. With sharded weights all processes must ask for it."""
        source = self._averages or named_state(self._model)
        plain = {name: whole(tensor) for name, tensor in source.items()}
        if not self._main:
            return None
        assert self._copy is not None
        # Not by copying tensors: quantisers look at what they load.
        self._copy.load_state_dict(plain)
        return self._copy
