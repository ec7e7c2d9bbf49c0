"""What tests/test_nn_vector_quantize.py runs in several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.nn import VectorQuantize
from mmfast.train.distributed import leave_processes

STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "ema": {},
    "kmeans": {"kmeans_init": True, "heads": 2, "separate_codebook_per_head": True},
    "dead": {"threshold_ema_dead_code": 2, "use_cosine_sim": True, "kmeans_init": True},
    "compiled": {"threshold_ema_dead_code": 2},
    "affine": {"affine_param": True, "sync_affine_param": True, "threshold_ema_dead_code": 2},
    "in_place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
    },
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Four samples of a step, and a mask that keeps as many vectors of either half."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 9, 6, generator=generator) * torch.tensor([1, 1, 3, 3]).view(4, 1, 1)
    mask = torch.rand(4, 9, generator=generator) < 0.8
    mask[2:] = mask[:2].flip(1)
    return x, mask


def train(case: str, part: slice, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Indices of each step on ``part`` of the batches, and the last state."""
    torch.manual_seed(0)
    run = module = VectorQuantize(6, 12, **CASES[case], **options)
    if case == "compiled":
        run = torch.compile(module, backend="aot_eager", fullgraph=True)
    indices = []
    for step in range(STEPS):
        # Only the first process has the random numbers of a single one.
        torch.manual_seed(step if part.start in (None, 0) else 1000)
        x, mask = batch(step)
        indices.append(run(x[part], mask=mask[part])[1])
    return indices, module.state_dict()


def work(rank: int, store: str, out: str) -> None:
    """One of two processes: its share of every case, saved in ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {}
    for case in CASES:
        # The in-place optimiser takes the mean of the ranks' gradients, whatever their batches.
        first = 2 if case == "in_place" else 1
        results[case] = train(case, (slice(None, first), slice(first, None))[rank])
    torch.save(results, f"{out}/{rank}.pt")
    dist.barrier()
    leave_processes()
