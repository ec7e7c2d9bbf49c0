"""What tests/test_nn_residual_vq.py runs in several processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.nn import ResidualVQ
from mmfast.train.distributed import leave_processes

STEPS = 6


def train(compiled: bool, rank: int) -> tuple[list[int], dict[str, Tensor]]:
    """How many stages each step used, and the last state."""
    torch.manual_seed(0)
    run = module = ResidualVQ(dim=4, num_quantizers=3, codebook_size=5, quantize_dropout=True)
    if compiled:
        run = torch.compile(module, backend="aot_eager", fullgraph=True)
    used = []
    for step in range(STEPS):
        torch.manual_seed(1000 * rank + step)
        indices = run(torch.randn(2, 6, 4))[1]
        used.append(int((indices[0, 0] >= 0).sum()))
    return used, module.state_dict()


def work(rank: int, size: int, store: str, out: str) -> None:
    """A process: its training, eager and compiled, saved in ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.save([train(compiled, rank) for compiled in (False, True)], f"{out}/{rank}.pt")
    dist.barrier()
    leave_processes()
