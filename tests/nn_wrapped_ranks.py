"""What tests/test_nn_ranks.py runs in several processes: all quantisers under the wrappers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from nn_many_ranks import LEARNS, RANKS, bits, ddp_accumulates, fsdp_accumulates, state, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmfast.nn import FSQ, LFQ, ResidualLFQ, ResidualSimVQ, ResidualVQ, SimVQ, VectorQuantize

BASE = {"dim": 6, "codebook_size": 8}
STAGES = {**BASE, "num_quantizers": 3}
DROPOUT = {"quantize_dropout": True}
QUANTISERS: dict[str, Callable[..., nn.Module]] = {
    "dropout": functools.partial(ResidualVQ, **STAGES, **DROPOUT, threshold_ema_dead_code=1),
    "kmeans": functools.partial(ResidualVQ, **STAGES, kmeans_init=True, shared_codebook=True),
    "learnable": functools.partial(ResidualVQ, **STAGES, **DROPOUT, **LEARNS),
    "LFQ": functools.partial(LFQ, **BASE, commitment_loss_weight=0.5),
    "ResidualLFQ": functools.partial(ResidualLFQ, **STAGES, **DROPOUT),
    "FSQ": functools.partial(FSQ, [5, 4, 3], dim=6),
    "SimVQ": functools.partial(SimVQ, **BASE),
    "ResidualSimVQ": functools.partial(ResidualSimVQ, **STAGES, **DROPOUT),
    "ema": functools.partial(VectorQuantize, **BASE),
    "by_gradient": functools.partial(VectorQuantize, **BASE, **LEARNS),
}

SYNCHRONISED = {"dropout", "kmeans", "learnable", "ema", "by_gradient"}
MOVING = {"dropout", "kmeans", "ema"}


class Model(nn.Module):
    """A quantiser between linear layers."""

    def __init__(self, make: Callable[[], nn.Module], checkpointing: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.quantiser = make()
        self.decoder = nn.Linear(6, 6)
        self.checkpointing = checkpointing

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, *losses = self.quantiser(self.encoder(x).tanh())
        return quantized, sum(loss.sum() for loss in losses)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing:
            quantized, loss = checkpoint(self.encode, x, use_reentrant=False)
        else:
            quantized, loss = self.encode(x)
        return (self.decoder(quantized) - x).square().mean() + loss


def ddp(model: nn.Module) -> nn.Module:
    """Stages that are left out have no gradients."""
    return DistributedDataParallel(model, find_unused_parameters=True)


def whole(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def one_process(name: str, accumulate: Any) -> dict[str, Tensor]:
    """The last state of a training on all of the batches."""
    alone = {"sync_codebook": False} if name in SYNCHRONISED else {}
    make = functools.partial(Model, functools.partial(QUANTISERS[name], **alone))
    return state(train(lambda model: model, make, 1, 0, accumulate))


def quantisers_wrapped(rank: int) -> None:
    """Steps on a share of the batches are those of one process with all."""
    for name, make in QUANTISERS.items():
        ones = {}
        for accumulates in (False, True):
            none = (lambda *_: contextlib.nullcontext()) if accumulates else None
            ones[accumulates] = one_process(name, none)
        for wrap, accumulate, checkpointing in (
            (ddp, ddp_accumulates, False),
            (whole, fsdp_accumulates, False),
            (ddp, None, True),
            (whole, None, True),
        ):
            if checkpointing and name in MOVING:
                continue
            model = train(
                wrap, functools.partial(Model, make, checkpointing), RANKS, rank, accumulate
            )
            for entry, tensor in state(model).items():
                bits(tensor)
                message = f"{name}, {wrap.__name__}, {accumulate}, {checkpointing}, {entry}"
                expected = ones[accumulate is not None][entry]
                torch.testing.assert_close(tensor, expected, msg=message)


def quantisers_compiled(rank: int) -> None:
    """By inductor, without a break in the model, under either wrapper."""

    def compiled_in_ddp(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(torch.compile(model, fullgraph=True))

    def compiled_in_fsdp(model: nn.Module) -> nn.Module:
        model.compile(fullgraph=True)
        return whole(model)

    for name, wrap in (("ema", compiled_in_ddp), ("by_gradient", compiled_in_fsdp)):
        model = train(wrap, functools.partial(Model, QUANTISERS[name]), RANKS, rank, None)
        expected = one_process(name, None)
        for entry, tensor in state(model).items():
            bits(tensor)
            torch.testing.assert_close(tensor, expected[entry], msg=f"{name}, {entry}")


CHECKS = (quantisers_wrapped, quantisers_compiled)
