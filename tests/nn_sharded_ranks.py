"""What tests/test_nn_ranks.py runs in several processes of codebooks sharded by code."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nn_many_ranks import RANKS, bits, of_kind, run_recorded, state
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import mmfast
from mmfast.nn import ShardedVectorQuantize, VectorQuantize, nearest_code_sharded

DEAD = {"threshold_ema_dead_code": 1.5}
HEADS = {"heads": 2}
SEPARATE = {**HEADS, "separate_codebook_per_head": True}


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


def sharded_half(rank: int) -> None:
    """Half precision, of vectors, codes or both, changes neither the indices nor where the
    gradients and the loss are computed."""
    half = (torch.bfloat16, torch.float16)
    pairs = [(a, a) for a in half] + [(half[0], torch.float32), (torch.float32, half[0])]
    for number, (kind, codes_kind) in enumerate(pairs):
        for metric in ("euclidean", "cosine", "dot"):
            x, codes = near_ties(metric, number)
            x, codes = x.to(kind), codes.to(codes_kind)
            check_sharded(x, codes, codes.split([6, 0, 5, 2])[rank], None, metric)
            check_sharded(x, codes[:2], codes[:2].split([0, 1, 0, 1])[rank], None, metric)
    for kind, module_kind, autocast in (
        (half[0], torch.float32, None),
        (half[0], torch.float32, half[0]),
        (torch.float32, torch.float32, half[1]),
        *((kind, kind, None) for kind in half),
    ):
        torch.manual_seed(0)
        one = unsharded(13, **DEAD).to(module_kind)
        torch.manual_seed(0)
        own = ShardedVectorQuantize(4, 13, **DEAD).to(module_kind)
        for step in range(2):
            x = 3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(step))
            results = []
            for module in (one, own):
                seed(step, module is one or rank == 0)
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    results.append(sharded_step(module, x.to(kind), None))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)
        assert own.codebook.dtype == module_kind
        torch.testing.assert_close(own.codebook, one.codebook)


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
    backwards = DeviceMesh("cpu", [3, 2, 1, 0])
    refused(ValueError, "ranks must ascend in group", x, codes, backwards)
    wrong = distribute_tensor(codes, backwards, [Shard(0)])
    refused(ValueError, "ranks must ascend in the codes' mesh", x, wrong)
    few = dist.new_group([0, 1]), DeviceMesh("cpu", [0, 1])
    if rank > 1:
        for group in few:
            refused(ValueError, f"must have this process, rank {rank}", x, codes, group)
    for mesh in (backwards, few[1]) if rank > 1 else (backwards,):
        with pytest.raises(ValueError, match=r"must (ascend in|have)"):
            ShardedVectorQuantize(4, 8, mesh)
        with pytest.raises(ValueError, match="data_mesh"):
            ShardedVectorQuantize(4, 8, data_mesh=mesh)
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
        torch.manual_seed(0)
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


def unsharded(num_codes: int, **options: Any) -> VectorQuantize:
    dim = 4 // options.get("heads", 1)
    return VectorQuantize(4, num_codes, codebook_dim=dim, sync_codebook=False, **options)


def seed(number: int, first: bool) -> None:
    """One process has the random numbers of a single one."""
    torch.manual_seed(number if first else 1000 + dist.get_rank())


def sharded_training(rank: int) -> None:
    """Steps are those of VectorQuantize with the whole codebook: over four ranks with the same
    vectors, and over two that have the same codes, for each of two halves of the codes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "codes"))
    four = init_device_mesh("cpu", (4,))
    for num_codes, options in (
        (13, {}),
        (5, {"use_cosine_sim": True, "commitment_weight": 0.25}),
        (8, {"rotation_trick": False, "decay": 0.9}),
        (9, {**DEAD, **HEADS}),
        (7, {**DEAD, **SEPARATE, "use_cosine_sim": True, "kmeans_init": True}),
        (40, DEAD),  # of which most are dead, more than there are vectors
        (3, {**DEAD, "kmeans_init": True, "kmeans_iters": 3}),  # a rank has none
        (11, SEPARATE),
    ):
        torch.manual_seed(0)
        one = unsharded(num_codes, **options)
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
                seed(step, True)
                expected = sharded_step(one, x, mask)
                seed(step, rank == 0)
                got = sharded_step(own, x, mask)
                seed(step, rank == 0)
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
        indices = torch.tensor([[-1, 1], [2, 0], [1, 1]])
        if one.heads == 1:
            indices = indices[:1]
        for name in ("get_codes_from_indices", "get_output_from_indices"):
            assert torch.equal(getattr(own, name)(indices), getattr(one, name)(indices)), name
        again = copy.deepcopy(own)
        assert torch.equal(again(x)[1], one(x)[1])


def sharded_wrapped(rank: int) -> None:
    """Inside a model under DistributedDataParallel or FSDP2 over the ranks with the same codes, or
    FSDP2 over all: as one process with the joined batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "codes"))
    four = init_device_mesh("cpu", (4,))

    def ddp(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, process_group=mesh["data"].get_group())

    for options in ({}, {**DEAD, "kmeans_init": True}):
        for wrap in (
            ddp,
            functools.partial(fully_shard, mesh=mesh["data"]),
            functools.partial(fully_shard, mesh=four),
        ):
            over_all = isinstance(wrap, functools.partial) and wrap.keywords["mesh"] is four
            torch.manual_seed(0)
            one = Between(unsharded(9, **options))
            torch.manual_seed(0)
            where = {} if over_all else {"mesh": mesh["codes"], "data_mesh": mesh["data"]}
            model = Between(ShardedVectorQuantize(4, 9, **where, **options))
            runs = (one, wrap(model))
            optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, model)]
            for step in range(2):
                x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(step))
                for trained, optimiser in zip(runs, optimisers, strict=True):
                    seed(step, trained is one or rank == 0)
                    own = x if trained is one or over_all else x.chunk(2)[rank // 2]
                    quantized, _, loss = trained(own)
                    (quantized.square().mean() + loss).backward()
                    optimiser.step()
                    optimiser.zero_grad()
            for name, tensor in state(model).items():
                bits(tensor)
                torch.testing.assert_close(tensor, state(one)[name], msg=name)


def sharded_shapes(rank: int) -> None:
    """Any leading dimensions, none, and no vectors."""
    module = ShardedVectorQuantize(4, 6, **HEADS, **DEAD)
    for shape in ((4,), (3, 4), (2, 3, 5, 4), (0, 4), (2, 0, 4)):
        x = torch.randn(shape)
        dist.broadcast(x, 0)
        assert module.train()(x)[2].isfinite()
        quantized, indices, loss = module.eval()(x)
        assert quantized.shape == shape
        assert indices.shape == (*shape[:-1], 2)
        assert loss == 0
        assert torch.equal(module.get_output_from_indices(indices), quantized)
    with pytest.raises(ValueError, match="heads must divide dim = 4, got 3"):
        ShardedVectorQuantize(4, 6, heads=3)


def sharded_collectives(rank: int) -> None:
    """The same calls whatever there is to see: nothing, NaN, one vector again and again, or
    ordinary vectors."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "codes"))
    where = mesh["codes"], mesh["data"]
    torch.manual_seed(0)
    modules = [
        ShardedVectorQuantize(4, 7, where[0], data_mesh=where[1], **DEAD, **options)
        for options in ({}, SEPARATE, {"kmeans_init": True})
    ]
    log: list[tuple[Any, ...]] = []
    for step in range(8):
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(step))
        kind = (step // 2 + (rank // 2) * (1 + step % 2)) % 4  # the same on ranks 2 i and 2 i + 1
        run_recorded(modules, *of_kind(kind, x), log)
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, log)
    assert len(log) > 100
    for other, theirs in enumerate(everyone):
        mine = [call for call in log if other in call[0]]
        assert [call for call in theirs if rank in call[0]] == mine
    for module in modules:
        for name, tensor in state(module).items():
            bits(tensor)
            assert tensor.isfinite().all(), name


def sharded_initialisation(rank: int) -> None:
    """Where only some ranks have loaded a codebook, all of them say so; eval mode initialises."""
    module = ShardedVectorQuantize(4, 6, kmeans_init=True)
    if rank == 1:
        module.load_state_dict(VectorQuantize(4, 6).state_dict())
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"initialised on ranks \[1\] of 4 only"):
        module(x)
    with pytest.raises(ValueError, match="at least one finite vector"):
        ShardedVectorQuantize(4, 6, kmeans_init=True)(x * torch.nan)
    module = ShardedVectorQuantize(4, 6, kmeans_init=True).eval()
    _, indices, _ = module(x)
    assert module._codebook.initted
    assert len(indices.unique()) > 1
    again = ShardedVectorQuantize(4, 6, kmeans_init=True)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x)[1], indices)


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
    for num_codes in (1, 3, 5):  # some ranks have none
        few = VectorQuantize(4, num_codes)
        dist.broadcast(few._codebook.embed, 0)
        path = f"{folder}/{num_codes}"
        dist.checkpoint.save({"model": few.state_dict()}, checkpoint_id=path)
        for where in (mesh["codes"], None):
            loaded = ShardedVectorQuantize(4, num_codes, where)
            own_state = {"model": loaded.state_dict()}
            dist.checkpoint.load(own_state, checkpoint_id=path)
            loaded.load_state_dict(own_state["model"])
            assert torch.equal(loaded.codebook, few.codebook)
        dist.checkpoint.save(own_state, checkpoint_id=path + "again")
        again = {"model": VectorQuantize(4, num_codes).state_dict()}
        dist.checkpoint.load(again, checkpoint_id=path + "again")
        assert torch.equal(again["model"]["_codebook.embed"], few._codebook.embed)
    with pytest.raises(RuntimeError, match=r"expected \(1, 13, ...\) of all codes, got \(1, 12"):
        own.load_state_dict(VectorQuantize(4, 12).state_dict())


def sharded_compiled(rank: int) -> None:
    """One graph, the same results."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "codes"))["codes"]
    if rank > 1:
        return
    for options in ({}, {**DEAD, **SEPARATE}):
        torch.manual_seed(0)
        module = ShardedVectorQuantize(4, 9, mesh, **options)
        eager = copy.deepcopy(module)
        x = torch.randn(3, 7, 4)
        torch.manual_seed(1)
        got = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
        torch.manual_seed(1)
        for a, b in zip(got, eager(x), strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(module.codebook, eager.codebook)
    module = ShardedVectorQuantize(4, 9, mesh, kmeans_init=True)
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="before compiling or exporting, forward once"):
        whole(x)
    module(x)
    whole(x)


CHECKS = (
    sharded_look_up,
    sharded_half,
    sharded_refusals,
    sharded_training,
    sharded_wrapped,
    sharded_shapes,
    sharded_collectives,
    sharded_initialisation,
    sharded_checkpoints,
    sharded_compiled,
)
