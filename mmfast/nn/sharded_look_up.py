"""The exact nearest code in a codebook whose codes are spread over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.checks import check_choice, check_codebook, check_device, check_floating
from mmfast.nn.ranks import add_up, gathered, reduce
from mmfast.nn.sharded_parameter import is_sharded
from mmfast.ops.nearest_code import METRICS, float64_metric, nearest_code, output_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Elements of a piece's temporaries: what a CPU's cache holds, or few launches on a GPU.
_CACHED, _FEW = 1 << 18, 1 << 24
_LARGEST = torch.iinfo(torch.int64).max


class Part(NamedTuple):
    """What a process holds of H codebooks of K codes.

    Attributes:
        codes: ``(H, P, D)``, P from 0.
        start: index of the first of them among all; a number, or () int64.
        group: the processes that hold the others. A process of higher rank holds codes of
            higher index.
    """

    codes: Tensor
    start: int | Tensor
    group: ProcessGroup | None


def nearest_code_sharded(
    x: Tensor,
    shard: Tensor,
    group: ProcessGroup | DeviceMesh | None = None,
    *,
    metric: str = "euclidean",
) -> tuple[Tensor, Tensor]:
    """:func:`mmfast.nearest_code` for a codebook that is sharded by code.

    Each process looks up its own codes, evaluates the metric of the one it found in float64, and
    two reductions of 8 bytes a vector take the smallest, then the lowest index. Every process
    returns the same. Nothing waits for the device.

    Args:
        x: vectors, ``(..., D)``, the same in all processes of the group.
        shard: this process's codes, ``(P, D)``, the next after those of the process of the next
            lower rank; P may differ, and be 0. Or a DTensor ``(K, D)`` with placement
            ``Shard(0)`` on one dimension of its mesh and ``Replicate()`` on the others.
        group: the processes that share the codebook: a process group, or a mesh of one dimension;
            all if None. Not to be given with a DTensor.
        metric: as in :func:`mmfast.nearest_code`.

    Returns:
        ``(indices, distances)`` of the whole codebook, as :func:`mmfast.nearest_code` defines
        them, ties and NaN included; the distances are the float64 metric, rounded once. If no
        process has a code, the indices are -1 and the distances NaN.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices, placements or ``metric`` do not fit.
        RuntimeError: a reduction failed, for one because a process has ended.
    """
    check_floating("x", x)
    check_floating("shard", shard)
    check_choice("metric", metric, METRICS)
    part = part_of_dtensor(shard, group) if is_sharded(shard) else _part(shard, group)
    check_device(x=x, shard=part.codes)
    check_part(x, part.codes[0])
    lead = x.shape[:-1]
    indices, distances = look_up(x.reshape(1, -1, x.shape[-1]), part, metric)
    return indices.view(lead), distances.view(lead)


def check_part(x: Tensor, codes: Tensor) -> None:
    """Shapes of vectors (..., D) and codes (P, D) fit together, else ValueError."""
    if codes.dim() != 2:
        raise ValueError(f"shard must be (P, D), got shape {tuple(codes.shape)}")
    check_codebook(x, codes if len(codes) else codes.new_empty(1, codes.shape[1]))


def look_up(x: Tensor, part: Part, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest codes of vectors ``x`` (H, N, D), and distances, both (H, N), as
    :func:`nearest_code_sharded` gives them for one codebook."""
    own = torch.zeros_like(x[:, :, 0], dtype=torch.int64)
    key = torch.full_like(own, _LARGEST)
    if part.codes.shape[1]:
        own, _ = nearest_code(x, part.codes, metric=metric)  # [H, N]
        heads = zip(x, part.codes, own, strict=True)
        key = _key(torch.stack([_paired(*head, metric) for head in heads]))
    least = reduce(key.clone(), dist.ReduceOp.MIN, "looking up sharded codes", part.group)
    chosen = (key == least) & (key != _LARGEST)
    index = torch.where(chosen, own + part.start, _LARGEST)
    reduce(index, dist.ReduceOp.MIN, "looking up sharded codes", part.group)
    index = torch.where(index == _LARGEST, -1, index)
    value = _value(least)
    distances = value if metric == "euclidean" else -value
    return index, distances.to(output_dtype(x, part.codes))


def codes_at(indices: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """Codes (H, N, D) at ``indices`` (H, N) of the whole codebooks, zeros where they are -1, in
    ``dtype``; the same in all processes."""
    local = own_indices(indices, part)
    found = part.codes.new_zeros(*indices.shape, part.codes.shape[2], dtype=dtype)
    if part.codes.shape[1]:
        heads = zip(part.codes, local.clamp_min(0), strict=True)
        codes = torch.stack([own[at] for own, at in heads]).to(dtype)
        found = torch.where((local >= 0)[..., None], codes, found)
    # All but one add zero: the order does not matter.
    return add_up(found, True, "gathering sharded codes", part.group)


def own_indices(indices: Tensor, part: Part) -> Tensor:
    """Which of the process's codes the ``indices`` mean, -1 for others."""
    local = indices - part.start
    own = (indices >= 0) & (local >= 0) & (local < part.codes.shape[1])
    return torch.where(own, local, -1)


def bounds(num_codes: int, ranks: int, rank: int) -> tuple[int, int]:
    """First and number of the codes of a process, as ``Shard`` splits them."""
    step = -(-num_codes // ranks)
    start = min(step * rank, num_codes)
    return start, min(step, num_codes - start)


def check_mesh(name: str, mesh: DeviceMesh, dim: int = 0) -> None:
    """This process is in the mesh, whose ranks ascend along ``dim``, else ValueError: a process
    group has its processes by rank, whatever the order in a mesh."""
    if torch.compiler.is_compiling():
        return
    if mesh.get_coordinate() is None:
        ranks = mesh.mesh.tolist()
        raise ValueError(f"{name} must have this process, rank {dist.get_rank()}, got {ranks}")
    if (mesh.mesh.diff(dim=dim) < 0).any():
        raise ValueError(f"ranks must ascend in {name}, got {mesh.mesh.tolist()}")


def part_of_dtensor(codes: Any, group: object = None) -> Part:
    """What this process holds of a DTensor of codes (K, D).

    Raises:
        ValueError: it is not sharded by code, or by a mesh that does not fit, or a group is
            given, too.
    """
    from torch.distributed.tensor import Replicate, Shard

    if group is not None:
        raise ValueError(f"group must be None for a DTensor, which has its own, got {group}")
    placements = codes.placements
    sharded = [i for i, p in enumerate(placements) if type(p) is Shard and p.dim == 0]
    rest = [p for i, p in enumerate(placements) if i not in sharded]
    if len(sharded) != 1 or any(type(p) is not Replicate for p in rest):
        raise ValueError(
            "codes must have placement Shard(0) on one dimension of their mesh, and "
            f"Replicate() on the others, got {placements}"
        )
    mesh = codes.device_mesh
    check_mesh("the codes' mesh", mesh, sharded[0])
    ranks, rank = mesh.size(sharded[0]), mesh.get_local_rank(sharded[0])
    start, size = bounds(codes.shape[0], ranks, rank)
    local = codes.to_local()
    assert local.shape[0] == size
    return Part(local[None], start, mesh.get_group(sharded[0]))


def _part(codes: Tensor, group: ProcessGroup | DeviceMesh | None) -> Part:
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, got {group}")
        check_mesh("group", group)
        group = group.get_group()
    elif group is not None and dist.get_rank(group) < 0:
        raise ValueError(f"group must have this process, rank {dist.get_rank()} of all")
    own = torch.full((), codes.shape[0], dtype=torch.int64, device=codes.device)
    sizes = gathered(own, "counting sharded codes", group)
    return Part(codes[None], sizes[: dist.get_rank(group)].sum(), group)


def _paired(x: Tensor, codes: Tensor, indices: Tensor, metric: str) -> Tensor:
    """The float64 metric (N,) of vectors (N, D) and their codes: smaller is nearer."""
    value = x.new_empty(x.shape[0], dtype=torch.float64)
    step = max(1, (_CACHED if x.device.type == "cpu" else _FEW) // x.shape[1])
    for start in range(0, x.shape[0], step):
        piece = slice(start, start + step)
        # The sum goes dimension by dimension: these are to lie together.
        a, b = (t.mT.double().contiguous().mT for t in (x[piece], codes[indices[piece]]))
        value[piece] = float64_metric(a, b, metric)
    return value


def _key(value: Tensor) -> Tensor:
    """Integers in the order of float64 numbers, NaN before all, all zeros the same: integers are
    what every communication library compares exactly."""
    bits = torch.where(value == 0, 0.0, value).view(torch.int64)
    key = bits ^ ((bits >> 63) & _LARGEST)
    return torch.where(value.isnan(), ~_LARGEST, key)


def _value(key: Tensor) -> Tensor:
    """What :func:`_key` had."""
    return (key ^ ((key >> 63) & _LARGEST)).view(torch.float64)
