"""What tests/test_nn_ranks.py runs in several processes, each of which asserts."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nn_ranks
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import mmfast
from mmfast.nn import LFQ, ResidualVQ, ShardedVectorQuantize, VectorQuantize, nearest_code_sharded

RANKS = 4
TIMEOUT = datetime.timedelta(seconds=30)
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


def joined_residuals(rank: int) -> None:
    """The same of all stages of a residual quantiser."""
    states = []
    for part, options in ((rank, {}), (None, {"sync_codebook": False})):
        torch.manual_seed(0)
        module = ResidualVQ(
            dim=4, num_quantizers=3, codebook_size=7, threshold_ema_dead_code=1, **options
        )
        for step in range(3):
            torch.manual_seed(step if part in (None, 0) else 1000)
            x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(step))
            mask = x[:, :, 0] < 1
            own = slice(None) if part is None else slice(*[(0, 3), (3, 3), (3, 4), (4, 6)][part])
            module(x[own], mask=mask[own])
        states.append(state(module))
    for name, tensor in states[0].items():
        bits(tensor)
        torch.testing.assert_close(tensor, states[1][name], msg=name)


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


@contextlib.contextmanager
def recorded(log: list[tuple[Any, ...]]) -> Iterator[None]:
    """Note the collectives of modules."""
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        log.append((tuple(tensor.shape), tensor.dtype))
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
        kind = (rank + step) % RANKS
        masked = torch.ones(3, 5, dtype=torch.bool)
        if kind == 1:
            x, masked = x[:0], masked[:0]
        elif kind == 2:
            x[0, 0, 0] = torch.nan
            masked[1:] = False
        elif kind == 3:
            x = torch.ones_like(x)
        for module in modules:
            with recorded(log), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module(x)
                module(x, mask=masked)
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
    options: dict[str, Any],
    parts: int,
    part: int,
    accumulate: Callable[[nn.Module, bool], contextlib.AbstractContextManager] | None,
) -> nn.Module:
    """Two steps of two micro-batches on a share of 8 samples each."""
    torch.manual_seed(0)
    model = Model(**options)
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
    alone = {"sync_codebook": False}
    ones: dict[Any, dict[str, Tensor]] = {}
    for wrap, accumulate, names in wraps:
        for name in names:
            key = name, accumulate is None
            if key not in ones:
                none = None if accumulate is None else lambda *_: contextlib.nullcontext()
                ones[key] = state(train(lambda m: m, MODELS[name] | alone, 1, 0, none))
            model = train(wrap, MODELS[name], RANKS, rank, accumulate)
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
        train(whole, MODELS["in_place"], RANKS, rank, None)

    def half(model: nn.Module) -> nn.Module:
        return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))

    model = train(half, MODELS["learnable_dead"], RANKS, rank, None)
    bits(*state(model).values())
    codes = model.quantiser.codebook
    assert codes.dtype == torch.float32
    assert not torch.equal(codes, codes.bfloat16().float())


# Codebooks sharded by code.


def near_ties(metric: str, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors and codes with ties, differences below float32, NaN, infinities and zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(13, 5, generator=generator)
    x = torch.randn(40, 5, generator=generator)
    codes[7] = codes[2]
    codes[12] = codes[2]
    codes[9] = codes[4] * (1 + 2.0**-23)
    codes[11] = codes[4].nextafter(torch.tensor(torch.inf))
    x[:8] = codes[[2, 4, 9, 11, 7, 12, 4, 4]]
    x[8:16] = 100 * codes[4] + 1e-3 * x[8:16]
    x[16:20] = 0
    x[20, 3], x[21, 0], x[22, 1] = torch.nan, torch.inf, -torch.inf
    if seed % 3 == 1:
        codes[10] = 0
    if seed % 3 == 2:
        codes[6, 1], codes[8, 2] = torch.nan, torch.inf
    return x, codes


def check_sharded(x: Tensor, codes: Tensor, shard: Tensor, group: Any, metric: str) -> None:
    indices, distances = nearest_code_sharded(x, shard, group, metric=metric)
    expected = mmfast.nearest_code(x, codes, metric=metric)
    assert torch.equal(indices, expected[0]), (metric, indices, expected[0])
    op = mmfast.ops.nearest_code
    assert not op.compare((indices, distances), (x, codes, metric)), metric


def sharded_look_up(rank: int) -> None:
    """Indices are those of the whole codebook, to ties and near-ties, over 2, 3 and 4 ranks."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "codes"))
    four = init_device_mesh("cpu", (4,))
    three = dist.new_group([0, 1, 2])
    for metric in ("euclidean", "cosine", "dot"):
        for seed in range(6):
            x, codes = near_ties(metric, seed)
            check_sharded(x, codes, codes.split([6, 0, 5, 2])[rank], None, metric)
            check_sharded(x, codes, codes.split([9, 4])[rank % 2], pairs["codes"], metric)
            if rank < 3:
                check_sharded(x, codes, codes.tensor_split(3)[rank], three, metric)
            for mesh, placements in ((four, [Shard(0)]), (pairs, [Replicate(), Shard(0)])):
                check_sharded(x, codes, distribute_tensor(codes, mesh, placements), None, metric)
    x, codes = near_ties("euclidean", 0)
    few = distribute_tensor(codes[:3].double(), four, [Shard(0)])
    check_sharded(x.view(2, 4, 5, 5), codes[:3].double(), few, None, "euclidean")
    check_sharded(x[:0], codes, distribute_tensor(codes, four, [Shard(0)]), None, "dot")
    empty = nearest_code_sharded(x, codes[:0])
    assert (empty[0] == -1).all()
    assert empty[1].isnan().all()


def sharded_refusals(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    x, codes = torch.randn(3, 4), torch.randn(6, 4)
    sharded = distribute_tensor(codes, mesh, [Replicate(), Shard(0)])
    for placements in ([Replicate(), Replicate()], [Shard(0), Shard(0)], [Replicate(), Shard(1)]):
        refused(ValueError, "placement Shard", x, distribute_tensor(codes, mesh, placements))
    refused(ValueError, "group must be None", x, sharded, mesh)
    refused(ValueError, "mesh of one dimension", x, codes, mesh)
    refused(ValueError, "D = 4", x[:, :3], sharded)
    refused(ValueError, r"shard must be \(P, D\)", x, codes[0])
    refused(TypeError, "shard must be float", x, codes.int())
    refused(ValueError, "metric must be", x, sharded, metric="l1")
    everyone = init_device_mesh("cpu", (RANKS,))
    module = DistributedDataParallel(Between(ShardedVectorQuantize(4, 8, everyone)))
    with pytest.raises(RuntimeError, match=r"3 of 4 shards.*DataParallel broadcasts"):
        module(torch.randn(2, 4))


def refused(kind: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind, match=match):
        nearest_code_sharded(*args, **kwargs)


class Between(nn.Module):
    """A quantiser behind a linear layer."""

    def __init__(self, quantiser: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.quantiser = quantiser

    def forward(self, x: Tensor) -> Any:
        return self.quantiser(self.linear(x))


def sharded_step(module: nn.Module, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    quantized, indices, loss = module(x, mask=mask)
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
    ((quantized * weights).sum() + loss).backward()
    return [quantized, indices, loss, x.grad]


def sharded_training(rank: int) -> None:
    """Steps are those of VectorQuantize with the whole codebook."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "codes"))
    four = init_device_mesh("cpu", (4,))
    for num_codes, options in (
        (13, {}),
        (5, {"use_cosine_sim": True, "commitment_weight": 0.25}),
        (8, {"rotation_trick": False, "decay": 0.9}),
    ):
        torch.manual_seed(0)
        one = VectorQuantize(4, num_codes, sync_codebook=False, **options)
        torch.manual_seed(0)
        own = ShardedVectorQuantize(4, num_codes, four, **options)
        torch.manual_seed(0)
        pair = ShardedVectorQuantize(4, num_codes, mesh["codes"], data_mesh=mesh["data"], **options)
        for step in range(4):
            x = torch.randn(6, 7, 4, generator=torch.Generator().manual_seed(step))
            mask = None if step < 2 else x[:, :, 0] > -0.5
            if step == 3:
                x[1, 1] = x[4, 2] = torch.nan
                mask = mask.clone()
                mask[1, 1], mask[4, 2] = False, True
            half = slice(0, 3) if rank < 2 else slice(3, 6)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = sharded_step(one, x, mask)
                got = sharded_step(own, x, mask)
                part = sharded_step(pair, x[half], None if mask is None else mask[half])
            assert torch.equal(got[1], expected[1])
            assert torch.equal(part[1], expected[1][half])
            bits(*got[:3])
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)
            torch.testing.assert_close(part[0], expected[0][half], equal_nan=True)
            for module in (own, pair):
                for name, tensor in state(module).items():
                    bits(tensor)
                    torch.testing.assert_close(tensor, one.state_dict()[name], msg=name)
                assert module._codebook.nonfinite_batches == (step == 3)
                torch.testing.assert_close(module.codebook, one.codebook)
        one.eval(), own.eval()
        own.load_state_dict(one.state_dict())
        x = torch.randn(50, 4)
        dist.broadcast(x, 0)
        for a, b in zip(own(x), one(x), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(
            own.get_codes_from_indices(torch.tensor([-1, 1])),
            one.get_codes_from_indices(torch.tensor([[-1, 1]]))[0],
        )
        again = copy.deepcopy(own)
        assert torch.equal(again(x)[1], one(x)[1])


def sharded_checkpoints(rank: int) -> None:
    """State dicts go to and from whole ones, and other numbers of ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "codes"))
    torch.manual_seed(rank)
    one = VectorQuantize(4, 13)
    own = ShardedVectorQuantize(4, 13)
    pair = ShardedVectorQuantize(4, 13, mesh["codes"])
    full = get_model_state_dict(own, options=StateDictOptions(full_state_dict=True))
    assert list(full) == list(one.state_dict()) if rank == 0 else True
    one.load_state_dict(state(own))
    assert torch.equal(one.codebook, own.codebook)
    folder = os.environ["MMFAST_TEST_FOLDER"]
    dist.checkpoint.save({"model": own.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
    loaded = {"model": pair.state_dict()}
    dist.checkpoint.load(loaded, checkpoint_id=f"{folder}/checkpoint")
    assert torch.equal(pair.codebook, own.codebook)
    other = ShardedVectorQuantize(4, 13, mesh["codes"])
    other.load_state_dict(loaded["model"])
    assert torch.equal(other.codebook, own.codebook)
    other.load_state_dict(own.state_dict())
    with pytest.raises(RuntimeError, match=r"expected \(1, 13, ...\) of all codes, got \(1, 12"):
        own.load_state_dict(VectorQuantize(4, 12).state_dict())


def sharded_compiled(rank: int) -> None:
    """One graph, the same results."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "codes"))["codes"]
    if rank > 1:
        return
    torch.manual_seed(0)
    module = ShardedVectorQuantize(4, 9, mesh)
    eager = copy.deepcopy(module)
    x = torch.randn(3, 7, 4)
    got = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    for a, b in zip(got, eager(x), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(module.codebook, eager.codebook)


# Failures.


def train_on(module: nn.Module, steps: int) -> None:
    for _ in range(steps):
        module(torch.randn(1, 8, 4))


def killed(rank: int) -> None:
    """A rank dies in the middle of training: the others raise soon, and say at what."""
    module = VectorQuantize(4, 6, threshold_ema_dead_code=1)
    train_on(module, 2)
    if rank == RANKS - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    message = f"^(adding up the sizes|drawing vectors).* over {RANKS} ranks failed on rank {rank}: "
    with pytest.raises(RuntimeError, match=message) as caught:
        train_on(module, 3)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert time.monotonic() - start < TIMEOUT.total_seconds() / 2


CHECKS = (
    joined_batches,
    joined_residuals,
    joined_entropy,
    same_collectives,
    who_is_initialised,
    told_of_nan,
    wrapped,
    sharded_look_up,
    sharded_refusals,
    sharded_training,
    sharded_checkpoints,
    sharded_compiled,
    killed,
)


def work(rank: int, folder: str) -> None:
    """One of the processes; writes what went wrong, or ``done``, to a file of its own."""
    torch.set_num_threads(1)
    os.environ["MMFAST_TEST_FOLDER"] = folder
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    report = Path(folder) / f"{rank}.txt"
    for check in CHECKS:
        try:
            check(rank)
        except Exception:
            report.write_text(f"{check.__name__}:\n{traceback.format_exc()}")
            break
    else:
        report.write_text("done")
    os._exit(0)  # an orderly end would wait for the one that was killed
