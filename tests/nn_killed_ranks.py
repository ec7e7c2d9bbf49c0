"""What tests/test_nn_ranks.py runs in processes of which one is killed."""

from __future__ import annotations

import datetime
import os
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # once, and not in every process
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmfast.nn import (
    LFQ,
    ResidualVQ,
    ShardedVectorQuantize,
    VectorQuantize,
    ranks,
    sharded_look_up,
    sharded_parameter,
)

RANKS = 4
VICTIM = RANKS - 1
HUNG = 60.0  # seconds after which a case has failed
DEAD = {"threshold_ema_dead_code": 2}
KMEANS = {"kmeans_init": True}
LEARNS = {"learnable_codebook": True, "ema_update": False}


class Case(NamedTuple):
    """A process ends where it should take part in a collective.

    Attributes:
        what: is being done there, as the others' message has it.
        times: which such collective it is, from 1 on.
        make: the module. run: what is done with it.
        stay: the others do not end before all have heard; else each ends when it has.
    """

    what: str
    times: int
    make: Callable[[], nn.Module]
    run: Callable[[Any], None]
    stay: bool = False


def train(module: nn.Module) -> None:
    for step in range(3):
        x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(step))
        loss = module(x.requires_grad_())[2]
        if loss.requires_grad:
            loss.sum().backward()


def evaluate(module: nn.Module) -> None:
    train(module.eval())


def gather(model: Any) -> None:
    """The whole of a codebook that ``fully_shard`` has spread."""
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    for _ in range(3):
        assert model[0].codebook.shape == (6, 4)


def train_compiled(module: nn.Module) -> None:
    """What is compiled has nobody to say what it did."""
    run = torch.compile(module, backend="eager", fullgraph=True)
    train(run)
    if dist.get_rank() == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    train(run)


def quantiser(**options: Any) -> Callable[[], nn.Module]:
    return lambda: VectorQuantize(4, 6, **options)


def sharded(**options: Any) -> Callable[[], nn.Module]:
    return lambda: ShardedVectorQuantize(4, 6, **options)


def residual() -> nn.Module:
    return ResidualVQ(dim=4, num_quantizers=3, codebook_size=6, quantize_dropout=True)


def lookup_free() -> nn.Module:
    return LFQ(dim=4)


def learnable() -> nn.Module:
    return nn.Sequential(VectorQuantize(4, 6, **LEARNS))


SUMS, DRAWING = "adding up the sizes and sums of codes", "drawing vectors for dead codes"
START, GRADIENT = "initialising a codebook", "the gradient of averaging probabilities"
CASES = {
    "agreement": Case("comparing whether codebooks are initialised", 1, quantiser(), train),
    "kmeans_draw": Case(START, 2, quantiser(**KMEANS), train),
    "kmeans": Case(START, 8, quantiser(**KMEANS), train),
    "ema": Case(SUMS, 4, quantiser(), train),
    "ema_stay": Case(SUMS, 4, quantiser(), train, stay=True),
    "dead_counts": Case(DRAWING, 1, quantiser(**DEAD), train),
    "dead_vectors": Case(DRAWING, 6, quantiser(**DEAD), train),
    "dropout": Case("drawing the number of stages", 2, residual, train),
    "entropy": Case("averaging probabilities", 3, lookup_free, train),
    "entropy_backward": Case(GRADIENT, 2, lookup_free, train),
    "gather": Case("gathering a codebook", 2, learnable, gather),
    "compiled": Case("", 0, quantiser(), train_compiled),
    "sharded_eval": Case("looking up sharded codes", 3, sharded(), evaluate),
    "sharded_gather": Case("gathering sharded codes", 2, sharded(), train),
    "sharded_kmeans": Case(START, 1, sharded(**KMEANS), train),
    "sharded_ema": Case("adding up the sizes of sharded codes", 2, sharded(), train),
    "sharded_dead": Case("comparing sharded codes", 2, sharded(**DEAD), train),
}


def dies_in(case: Case) -> None:
    """Arrange the end of this process in the place of a collective."""
    seen = 0
    reduce, reported = ranks.reduce, sharded_parameter.reported

    def look(what: str) -> None:
        nonlocal seen
        seen += what == case.what
        if seen == case.times:
            os.kill(os.getpid(), signal.SIGKILL)

    def reduce_(tensor: Tensor, by: Any, what: str, group: Any = None) -> Tensor:
        look(what)
        return reduce(tensor, by, what, group)

    def reported_(what: str, group: Any = None) -> Any:
        look(what)
        return reported(what, group)

    ranks.reduce = sharded_look_up.reduce = reduce_
    sharded_parameter.reported = reported_


def take_part(rank: int, folder: Path, case: Case) -> str:
    """One process of a case: what was wrong."""
    torch.manual_seed(rank)
    warnings.simplefilter("ignore")
    timeout = datetime.timedelta(seconds=10 if case.stay else 2 * HUNG)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout
    )
    module = case.make()
    if rank == VICTIM and case.times:
        dies_in(case)
    try:
        case.run(module)
    except RuntimeError as error:
        message = f"{case.what} over {RANKS} ranks failed on rank {rank}: " if case.times else ""
        if not re.match(re.escape(message), str(error)):
            return traceback.format_exc()
        (folder / f"{rank}.heard").touch()
        while case.stay and len(list(folder.glob("*.heard"))) < RANKS - 1:
            time.sleep(0.02)
        return ""
    return "nothing was raised"


def start(rank: int, folder: Path, case: Case) -> int:
    """Fork a process of a case."""
    process = os.fork()
    if process:
        return process
    try:
        wrong = take_part(rank, folder, case)
    except BaseException:
        wrong = traceback.format_exc()
    (folder / f"{rank}.txt").write_text(wrong or "done")
    os._exit(0)  # an orderly end would wait for the others


def outcome(processes: list[int], folder: Path) -> list[str]:
    """What became of the processes, the last of which is to be killed."""
    ends: dict[int, int] = {}
    limit = time.monotonic() + HUNG
    while len(ends) < len(processes) and time.monotonic() < limit:
        for process in set(processes) - set(ends):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                ends[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    found = []
    for rank, process in enumerate(processes):
        report = folder / f"{rank}.txt"
        if process not in ends:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            found.append("hung")
        elif report.exists():
            found.append(report.read_text())
        else:
            found.append(f"ended with {ends[process]}")
    return found


def work(folder: str) -> None:
    """All cases, one after another; writes what went wrong, or ``done``."""
    torch.set_num_threads(1)  # a process with threads cannot be forked
    failures = []
    for name, case in CASES.items():
        at = Path(folder) / name
        at.mkdir()
        expected = ["done"] * (RANKS - 1) + [f"ended with {-signal.SIGKILL}"]
        found = outcome([start(rank, at, case) for rank in range(RANKS)], at)
        if found != expected:
            failures.append("\n".join([name, *found]))
    (Path(folder) / "report.txt").write_text("\n".join(failures) or "done")
