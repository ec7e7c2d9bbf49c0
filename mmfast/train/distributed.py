"""Several processes: started by ``torchrun``, with DistributedDataParallel or FSDP2."""

from __future__ import annotations

import atexit
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmfast.nn.ranks import several
from mmfast.train.task import Step, Task

T = TypeVar("T")


def rank() -> int:
    """Of this process, 0 for the first or only one."""
    return dist.get_rank() if several() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if several() else 1


def device_named(name: str) -> torch.device:
    """``"auto"``, the GPU of this process if it has one, or a device by its name.

    Raises:
        ValueError: there is no such device.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local)
    return device


def join_processes(device: torch.device) -> None:
    """Join the other processes where ``torchrun`` has started several, until this one ends."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # Not for a single training: what torchrun offers serves for joining once.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave_processes)


def leave_processes() -> None:
    """Leave the group of processes, before this one ends."""
    dist.destroy_process_group()
    # Where something else holds the group (FSDP2 does), gloo's threads outlive it, and one that
    # lets go of its last tensor while the interpreter ends aborts the process.
    time.sleep(0.5)


class Run(nn.Module):
    """A task's methods as forwards, so that wrappers see them whichever parts they call."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, method: str, batch: Mapping[str, Tensor], step: Any) -> Any:
        """``task.loss`` or ``task.begin``."""
        return getattr(self._task, method)(batch, step)


class Wrapped:
    """A task whose model is, where there are several processes, replicated or sharded.

    Args:
        task: whose model is on its device.
        kind: ``"ddp"`` or ``"fsdp"``, which shards each of the model's ``blocks`` and the rest.
    """

    def __init__(self, task: Task, kind: str) -> None:
        self._run: Any = Run(task)
        self.sharded = several() and kind == "fsdp"
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            # Blocks hand gates on as views, which nothing changes in place.
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
            for block in getattr(task.model, "blocks", ()):
                fully_shard(block)
            fully_shard(self._run)
        elif several():
            # The quantisers' buffers are the same everywhere already. The option has a new name.
            new = "forward_sync_buffers"
            known = new in inspect.signature(DistributedDataParallel).parameters
            options: dict[str, Any] = {new if known else "broadcast_buffers": False}
            self._run = DistributedDataParallel(self._run, **options)

    def begin(self, batch: Mapping[str, Tensor], step: int) -> None:
        """``task.begin``, without gradients."""
        with torch.no_grad():
            self._run("begin", batch, step)
        if self.sharded:
            self._run.reshard()

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> Mapping[str, Tensor]:
        """``task.loss``; its gradients are added up over the processes in the last micro-batch."""
        if self.sharded:
            self._run.set_requires_gradient_sync(step.last)
        elif several():
            self._run.require_backward_grad_sync = step.last
        losses: Mapping[str, Tensor] = self._run("loss", batch, step)
        if "loss" not in losses:
            raise ValueError(f"a task's losses must have 'loss', got {', '.join(losses)}")
        return losses


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of all processes' ``values``."""
    if several():
        dist.all_reduce(values)
        values /= world_size()
    return values


def objects_of_all(mine: Any) -> list[Any]:
    """All processes' objects, on the first; its own on others."""
    if not several():
        return [mine]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, mine)
    return every


def object_of_first(mine: Any) -> Any:
    """The first process's object."""
    if not several():
        return mine
    box = [mine]
    dist.broadcast_object_list(box, 0)
    return box[0]


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns on the first process, or raises there, on all of them."""
    made: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            made = make()
        except Exception as raised:
            error = raised
    made, error = object_of_first((made, error))
    if error is not None:
        raise error
    return made


def same_as_first(tensors: Iterable[Tensor]) -> None:
    """Set all processes' ``tensors`` to those of the first."""
    if several():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
