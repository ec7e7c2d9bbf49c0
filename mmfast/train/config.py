"""The settings of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmfast.train.typed import check_least, setting


@dataclass(frozen=True)
class TrainConfig:
    """How :func:`mmfast.train.fit` trains.

    Raises:
        ValueError: a number is out of range, or two do not go together.
    """

    steps: int = setting(1000, "optimiser steps")
    batch_size: int = setting(64, "samples of a step, over all processes and micro-batches")
    accumulate: int = setting(1, "micro-batches of a step, whose gradients are added up")
    lr: float = setting(3e-4, "learning rate, after the warm-up")
    warmup: int = setting(100, "steps in which the learning rate rises from 0")
    schedule: Literal["cosine", "constant"] = setting("cosine", "learning rate after that")
    min_lr: float = setting(0.0, "learning rate at the end of a cosine")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.99, "of AdamW")
    weight_decay: float = setting(0.0, "of AdamW, on matrices and convolutions only")
    clip: float = setting(1.0, "largest norm of the gradient; 0: any")
    ema: float = setting(0.999, "decay of the averaged weights; 0: none")
    precision: Literal["float32", "bfloat16"] = setting("float32", "bfloat16: under autocast")
    gradient_checkpointing: bool = setting(False, "compute activations again in the backward")
    compile: bool = setting(False, "torch.compile the model")
    deterministic: bool = setting(False, "deterministic algorithms on a GPU, slower")
    distributed: Literal["ddp", "fsdp"] = setting("ddp", "with several processes of torchrun")
    device: str = setting("auto", "cpu, cuda, ...; auto: a GPU if there is one")
    workers: int = setting(0, "processes that read data ahead")
    seed: int = setting(0, "of everything random, from 0 to 2^23 - 1")
    log_every: int = setting(10, "steps between rows of log.csv")
    checkpoint_every: int = setting(500, "steps between checkpoints")
    keep: int = setting(2, "checkpoints to keep, the newest ones")
    sample_every: int = setting(500, "steps between pictures; 0: none")
    tensorboard: bool = setting(False, "write TensorBoard's logs too")

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "batch_size": 1,
            "accumulate": 1,
            "warmup": 0,
            "workers": 0,
            "log_every": 1,
            "checkpoint_every": 1,
            "keep": 1,
            "sample_every": 0,
            "min_lr": 0,
            "weight_decay": 0,
            "clip": 0,
            "seed": 0,
        }
        check_least(self, **least)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if self.seed >= 1 << 23:
            raise ValueError(f"seed must be below 2^23, got {self.seed}")

    def lr_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * part)) / 2
