"""What tests/test_integrations_ranks.py runs in two processes, each of which asserts."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from patched import own_methods
from test_integrations_blocks import assert_alike
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers_of_diffusers import MODELS, randomised

from benchmarks import transformers
from mmfast.integrations import PatchReport, patch, patch_attention, unpatch
from mmfast.train.distributed import leave_processes

RANKS = 2
Model = tuple[nn.Module, dict[str, Any]]
Wrap = Callable[[nn.Module], nn.Module]


class DiT(transformers.DiT):
    """facebookresearch's blocks and, as its model has it, checkpointing."""

    checkpointing: Callable[..., Any] | None = None

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x, c) if self.checkpointing is None else self.checkpointing(block, x, c)
        return (x,)


def facebookresearch() -> Model:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 9, 48, generator=generator)
    condition = torch.randn(2, 48, generator=generator)
    return DiT(transformers.Setting("", 48, 2, 2, 2, 9)), {"x": tokens, "c": condition}


def build(name: str) -> Model:
    """A model with random weights, and inputs of two samples."""
    if name == "facebookresearch":
        model, inputs = facebookresearch()
    else:
        model, inputs = MODELS[name]()
        inputs["return_dict"] = False
    return randomised(model), inputs


def share(inputs: dict[str, Any], rank: int | None) -> dict[str, Any]:
    """One of the two samples; both where ``rank`` is None."""
    if rank is None:
        return inputs
    return {
        name: value[rank : rank + 1]
        if isinstance(value, Tensor) and not name.endswith("_ids")
        else value
        for name, value in inputs.items()
    }


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(run: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor | None]:
    """The gradients of all parameters in a second step, after a first that moved them."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for name in ("x", "hidden_states"):  # reentrant checkpoints give no gradient without it
        if name in inputs:
            inputs = {**inputs, name: inputs[name].clone().requires_grad_()}
    for step in range(2):
        optimiser.zero_grad()
        run(**inputs)[0].square().mean().backward()
        if step == 0:
            optimiser.step()
    return [whole(parameter.grad) for parameter in model.parameters()]


@functools.cache
def expected(name: str) -> list[Tensor | None]:
    """In one process, of the model as it is, on both samples."""
    model, inputs = build(name)
    return train(model, model, inputs)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is usually sharded or checkpointed one by one."""
    return [
        block for child in model.children() if isinstance(child, nn.ModuleList) for block in child
    ]


def sharded(model: nn.Module, *inside: str) -> nn.Module:
    """Each block and the model, and before them what is ``inside`` of blocks, by class."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in blocks_of(model):
        for module in reversed(list(block.modules())):
            if type(module).__name__ in inside and next(module.parameters(), None) is not None:
                fully_shard(module, mesh=mesh)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layers_sharded(model: nn.Module) -> nn.Module:
    return sharded(model, "Linear", "LayerNorm", "FP32LayerNorm", "RMSNorm")


def parts_sharded(model: nn.Module) -> nn.Module:
    return sharded(model, "Attention", "FluxAttention", "WanAttention", "Sequential", "FeedForward")


def root_sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def checkpointed(wrap: Wrap, reentrant: bool) -> Wrap:
    """Blocks run again in the backward."""

    def wrapped(model: Any) -> nn.Module:
        again = functools.partial(checkpoint, use_reentrant=reentrant)
        if isinstance(model, DiT):
            model.checkpointing = again
        else:
            model.enable_gradient_checkpointing(again)
        return wrap(model)

    return wrapped


def parts_checkpointed(model: nn.Module) -> nn.Module:
    """Attention and feed-forward, in wrappers that pass their attributes on."""
    for block in blocks_of(model):
        for name, child in block.named_children():
            if name in ("attn", "mlp"):
                setattr(block, name, checkpoint_wrapper(child))
    return DistributedDataParallel(model)


def compiled(wrap: Wrap) -> Wrap:
    """Each block is one graph, by inductor."""

    def wrapped(model: nn.Module) -> nn.Module:
        for block in blocks_of(model):
            block.compile(fullgraph=True)
        return wrap(model)

    return wrapped


def names(report: PatchReport) -> set[str]:
    """Of the classes of all that was swapped."""
    return {entry.class_name.removeprefix("FSDP") for entry in report.swapped}


def check(name: str, wrap: Wrap, rank: int, first: bool) -> None:
    """A model that is patched before or after it is wrapped trains as one process does."""
    model, inputs = build(name)
    found = names(patch(model))
    if first:
        run = wrap(model)
    else:
        unpatch(model)
        run = wrap(model)
        assert names(patch(run)) == found
    assert_alike(train(run, model, share(inputs, rank)), expected(name))
    unpatch(run)
    assert not list(own_methods(run))


def ddp(rank: int) -> None:
    for name in ("facebookresearch", *MODELS):
        check(name, DistributedDataParallel, rank, True)
    check("facebookresearch", DistributedDataParallel, rank, False)


def fsdp(rank: int) -> None:
    """The root, blocks, and what is in blocks."""
    for first in (True, False):
        for wrap in (root_sharded, sharded, layers_sharded, parts_sharded):
            check("facebookresearch", wrap, rank, first)
        check("DiT", root_sharded, rank, first)  # it reads the first block's weights outside of it
        for name in ("PixArt", "SD3", "Flux", "Wan"):
            check(name, sharded, rank, first)
    for name in ("PixArt", "Flux", "Wan"):
        check(name, layers_sharded, rank, True)
    for name in ("PixArt", "Flux"):
        check(name, parts_sharded, rank, True)


def checkpointing(rank: int) -> None:
    for name in ("facebookresearch", "PixArt", "Flux"):
        for reentrant in (True, False):
            check(name, checkpointed(DistributedDataParallel, reentrant), rank, True)
            check(name, checkpointed(sharded, reentrant), rank, True)
    for first in (True, False):
        check("facebookresearch", parts_checkpointed, rank, first)


def compiling(rank: int) -> None:
    for wrap in (DistributedDataParallel, sharded):
        check("facebookresearch", compiled(wrap), rank, True)


def context(rank: int) -> None:
    """Attention alone, for the time of a ``with`` block."""
    reentrant = checkpointed(DistributedDataParallel, True)
    for wrap in (DistributedDataParallel, sharded, reentrant, checkpointed(sharded, False)):
        model, inputs = build("facebookresearch")
        run = wrap(model)
        with patch_attention() as report:
            gradients = train(run, model, share(inputs, rank))
        assert report.served
        assert not report.left
        assert_alike(gradients, expected("facebookresearch"))


CHECKS = (ddp, fsdp, checkpointing, compiling, context)


def work(rank: int, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of views that sharded modules return, patched or not
        for run in CHECKS:
            run(rank)
    leave_processes()
