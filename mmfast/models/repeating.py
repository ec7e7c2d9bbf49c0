"""Gradient checkpointing of a model's parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def repeatable(block: nn.Module, again: bool) -> Callable[..., Any]:
    """The block; with ``again`` one that keeps nothing inside of it for the backward, but computes
    it again."""
    if not (again and torch.is_grad_enabled()):
        return block
    return functools.partial(checkpoint, block, use_reentrant=False)
