"""What tests/test_nn_ranks.py runs in several processes, each of which asserts."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nn_ranks
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmfast
from mmfast.nn import LFQ, ResidualVQ, VectorQuantize

RANKS = 4
TIMEOUT = datetime.timedelta(seconds=60)
LEARNS = {"learnable_codebook": True, "ema_update": False}
MODELS: dict[str, dict[str, Any]] = {
    "ema": {"threshold_ema_dead_code": 1},
    "learnable": LEARNS,
    "learnable_dead": {"threshold_ema_dead_code": 1, **LEARNS},
    "learnable_kmeans": {"kmeans_init": True, **LEARNS},
    "orthogonal": {"orthogonal_reg_weight": 0.1},
    "in_place": {"in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1), **LEARNS},
}


def bits(*tensors: Tensor) -> None:
    """All ranks hold the same bits."""
    for tensor in tensors:
        every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(every, tensor.contiguous())
        for other in every:
            torch.testing.assert_close(other, tensor, rtol=0, atol=0, equal_nan=True)


def state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, of plain tensors."""
    return {
        name: t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in module.state_dict().items()
    }


# Modules and their statistics.


def joined_batches(rank: int) -> None:
    """Uneven batches, one of them empty, and masks: as one process."""
    bounds = (0, 1, 1, 3, 4)
    own = slice(bounds[rank], bounds[rank + 1])
    for case in ("ema", "kmeans", "dead", "affine"):
        indices, got = nn_ranks.train(case, own)
        one_indices, one = nn_ranks.train(case, slice(None), sync_codebook=False)
        for mine, all_of_them in zip(indices, one_indices, strict=True):
            assert torch.equal(mine, all_of_them[own]), case
        for name, tensor in got.items():
            bits(tensor)
            torch.testing.assert_close(tensor, one[name], msg=f"{case}, {name}")


RESIDUALS: list[dict[str, Any]] = [
    {},
    {"quantize_dropout": True},
    {"shared_codebook": True},
    {"kmeans_init": True, "kmeans_iters": 2},
]


def joined_residuals(rank: int) -> None:
    """The same of all stages of a residual quantiser."""
    alone = {"sync_codebook": False}
    for given in RESIDUALS:
        states = []
        for part, options in ((rank, given), (None, given | alone)):
            torch.manual_seed(0)
            module = ResidualVQ(
                dim=4, num_quantizers=3, codebook_size=7, threshold_ema_dead_code=1, **options
            )
            for step in range(3):
                torch.manual_seed(step if rank == 0 or part is None else 1000)
                x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(step))
                mask = x[:, :, 0] < 1
                own = (
                    slice(None) if part is None else slice(*[(0, 3), (3, 3), (3, 4), (4, 6)][part])
                )
                module(x[own], mask=mask[own])
            states.append(state(module))
        for name, tensor in states[0].items():
            bits(tensor)
            torch.testing.assert_close(tensor, states[1][name], msg=f"{given}, {name}")


def joined_entropy(rank: int) -> None:
    """The batch entropy is that of all vectors, however they are spread, and so is its gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 5, 6, generator=generator) / 10
    together = x.clone().requires_grad_()
    alone = mmfast.lookup_free_quantize(together, inv_temperature=100.0).batch_entropy
    alone.backward()
    sizes = [1, 0, 6, 3]
    module = LFQ(dim=6)
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        own = x.split(sizes)[rank].clone().requires_grad_()
        entropy = run(own, return_loss_breakdown=True)[1].batch_entropy
        torch.testing.assert_close(entropy, alone)
        (entropy / RANKS).backward()
        torch.testing.assert_close(own.grad, together.grad.split(sizes)[rank])


def of_kind(kind: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (3, 5, D) and a mask of it: as it is, empty, with NaN and little of it, or all ones."""
    mask = torch.ones(3, 5, dtype=torch.bool)
    if kind == 1:
        return x[:0], mask[:0]
    if kind == 2:
        x[0, 0, 0] = torch.nan
        mask[1:] = False
    elif kind == 3:
        x = torch.ones_like(x)
    return x, mask


def run_recorded(
    modules: Sequence[nn.Module], x: Tensor, mask: Tensor, log: list[tuple[Any, ...]]
) -> None:
    """Run modules with and without the mask, and note their collectives in ``log``."""
    for module in modules:
        with recorded(log), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(x)
            module(x, mask=mask)


@contextlib.contextmanager
def recorded(log: list[tuple[Any, ...]]) -> Iterator[None]:
    """Note the collectives of modules."""
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        ranks = range(RANKS) if group is None else dist.get_process_group_ranks(group)
        log.append((tuple(ranks), tuple(tensor.shape), tensor.dtype))
        return real(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = real


def same_collectives(rank: int) -> None:
    """Ranks make the same calls whatever they see: nothing, NaN, one vector again and again (so
    that alone they would have dead codes), or ordinary vectors."""
    dead = {"threshold_ema_dead_code": 2}
    modules = [
        VectorQuantize(4, 6, kmeans_init=True, **dead),
        VectorQuantize(4, 6, affine_param=True, sync_affine_param=True, **dead),
        VectorQuantize(4, 6, heads=2, separate_codebook_per_head=True, codebook_dim=2, **dead),
        ResidualVQ(dim=4, num_quantizers=3, codebook_size=5, quantize_dropout=True, **dead),
        ResidualVQ(dim=4, num_quantizers=2, codebook_size=5, shared_codebook=True, **dead),
        LFQ(dim=4),
    ]
    log: list[tuple[Any, ...]] = []
    for step in range(RANKS):
        torch.manual_seed(100 * step + rank)
        x = torch.randn(3, 5, 4)
        run_recorded(modules, *of_kind((rank + step) % RANKS, x), log)
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, log)
    assert len(log) > 100
    assert all(other == log for other in everyone)
    for module in modules:
        bits(*state(module).values())


def who_is_initialised(rank: int) -> None:
    """Ranks of which some have loaded a codebook and others not say so, all of them."""
    module = VectorQuantize(4, 6, kmeans_init=True)
    if rank == 1:
        module.load_state_dict(VectorQuantize(4, 6).state_dict())
    with pytest.raises(RuntimeError, match=r"initialised on ranks \[1\] of 4 only"):
        module(torch.randn(1, 8, 4))
    # The broadcast of DistributedDataParallel settles it.
    for loaded in (0, 1):
        module = VectorQuantize(4, 6, kmeans_init=True, **LEARNS)
        if rank == loaded:
            module.load_state_dict(VectorQuantize(4, 6, **LEARNS).state_dict())
        DistributedDataParallel(module)(torch.randn(1, 8, 4))
        bits(*state(module).values())
    # A rank may evaluate alone.
    if rank == 2:
        module.eval()(torch.randn(1, 8, 4))


def told_of_nan(rank: int) -> None:
    """One rank's NaN is counted on all, and all are told."""
    torch.manual_seed(0)
    module = VectorQuantize(4, 6)
    x = torch.randn(1, 8, 4)
    if rank == 3:
        x[0, 2] = torch.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = module(x)[2]
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "nonfinite_batches" in str(caught[0].message)
    assert loss.isfinite() == (rank != 3)
    assert module._codebook.nonfinite_batches == 1
    assert module.codebook.isfinite().all()


# Training under the wrappers.


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.quantiser = VectorQuantize(6, 12, **options)
        self.decoder = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.quantiser(self.encoder(x).tanh())
        return (self.decoder(quantized) - x).square().mean() + loss


def train(
    wrap: Callable[[nn.Module], nn.Module],
    make: Callable[[], nn.Module],
    parts: int,
    part: int,
    accumulate: Callable[[nn.Module, bool], contextlib.AbstractContextManager] | None,
) -> nn.Module:
    """Two steps of two micro-batches on a share of 8 samples each."""
    torch.manual_seed(0)
    model = make()
    run = wrap(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        batches = torch.randn(2, 8, 5, 6, generator=generator)
        for micro, x in enumerate(batches):
            torch.manual_seed(step if part == 0 else 1000)
            with accumulate(run, micro == 1) if accumulate else contextlib.nullcontext():
                (run(x.chunk(parts)[part]) / 2).backward()
            if accumulate is None or micro == 1:
                optimiser.step()
                optimiser.zero_grad()
    return model


def ddp_accumulates(run: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if last else run.no_sync()


def fsdp_accumulates(run: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    run.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def wrapped(rank: int) -> None:
    """Steps under each wrapper are those of one process with the joined batch."""
    mesh = init_device_mesh("cpu", (RANKS,))

    def whole(model: nn.Module) -> nn.Module:
        return fully_shard(model, mesh=mesh)

    def nested(model: nn.Module) -> nn.Module:
        fully_shard(model.quantiser, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def static(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)

    def bucketed(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(
            model, bucket_cap_mb=1e-5, gradient_as_bucket_view=True, find_unused_parameters=True
        )

    wraps: list[tuple[Any, Any, tuple[str, ...]]] = [
        (DistributedDataParallel, None, tuple(MODELS)),
        (DistributedDataParallel, ddp_accumulates, ("ema", "learnable_dead", "in_place")),
        (static, None, ("learnable_dead", "in_place")),
        (bucketed, None, ("ema", "in_place")),
        (whole, None, tuple(MODELS)[:-1]),
        (whole, fsdp_accumulates, ("ema", "learnable_dead")),
        (nested, None, ("ema", "learnable_dead")),
    ]

    def named(name: str, **options: Any) -> Callable[[], nn.Module]:
        return functools.partial(Model, **MODELS[name], **options)

    ones: dict[Any, dict[str, Tensor]] = {}
    for wrap, accumulate, names in wraps:
        for name in names:
            key = name, accumulate is None
            if key not in ones:
                none = None if accumulate is None else lambda *_: contextlib.nullcontext()
                ones[key] = state(train(lambda m: m, named(name, sync_codebook=False), 1, 0, none))
            model = train(wrap, named(name), RANKS, rank, accumulate)
            for entry, tensor in state(model).items():
                bits(tensor)
                message = f"{wrap}, {name}, {entry}"
                torch.testing.assert_close(tensor, ones[key][entry], msg=message)
            quantiser = model.quantiser
            names = list(model.state_dict())
            model.eval()(torch.zeros(1, 2, 6))  # the root stays gathered
            assert list(model.state_dict()) == names == list(ones[key])
            assert not isinstance(quantiser.codebook, DTensor)
            indices = torch.arange(12)[None]
            codes = quantiser.get_codes_from_indices(indices)[0]
            assert torch.equal(codes, quantiser.codebook)
            quantiser.codebook = codes + 1
            assert torch.equal(quantiser.codebook, codes + 1)

    with pytest.raises(RuntimeError, match="leave the codebook's out by ignored_params"):
        train(whole, named("in_place"), RANKS, rank, None)

    def half(model: nn.Module) -> nn.Module:
        return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))

    model = train(half, named("learnable_dead"), RANKS, rank, None)
    bits(*state(model).values())
    codes = model.quantiser.codebook
    assert codes.dtype == torch.float32
    assert not torch.equal(codes, codes.bfloat16().float())


CHECKS = (
    joined_batches,
    joined_residuals,
    joined_entropy,
    same_collectives,
    who_is_initialised,
    told_of_nan,
    wrapped,
)


def work(rank: int, folder: str, checks: Sequence[Callable[[int], None]]) -> None:
    """One of the processes; writes what went wrong, or ``done``, to a file of its own."""
    torch.set_num_threads(1)
    os.environ["MMFAST_TEST_FOLDER"] = folder
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    report = Path(folder) / f"{rank}.txt"
    for check in checks:
        try:
            check(rank)
        except Exception:
            report.write_text(f"{check.__name__}:\n{traceback.format_exc()}")
            break
    else:
        report.write_text("done")
    os._exit(0)  # an orderly end would wait for one that has failed
