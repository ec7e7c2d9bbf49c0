"""A vector quantiser whose codebook is sharded by code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfast.checks import check_codebook, check_floating, check_mask
from mmfast.nn.initialisation import unit
from mmfast.nn.losses import passed
from mmfast.nn.nonfinite import NonFiniteBatches
from mmfast.nn.ranks import add_up, gathered
from mmfast.nn.sharded_look_up import Part, bounds, codes_at, look_up, own_indices
from mmfast.nn.sharded_parameter import is_sharded, whole
from mmfast.ops.code_statistics import code_statistics
from mmfast.ops.ema_update import codes_of
from mmfast.ops.nearest_code import output_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SHARDED = ("cluster_size", "embed_avg", "embed")


class _Valued(torch.autograd.Function):
    """``value``, with the gradient of ``carried``, which is the same up to rounding."""

    @staticmethod
    def forward(ctx: Any, carried: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class CodebookShard(nn.Module):
    """A process's part of the buffers of :class:`mmfast.nn.codebook.Codebook`, with its names.

    ``cluster_size`` (1, P), ``embed_avg`` and ``embed`` (1, P, D) are plain tensors. The state
    dict has them as DTensors of K codes with placement ``Shard(1)``, over the same memory; loading
    takes such ones, DTensors of other placements, and plain tensors of all K codes.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor
    nonfinite_batches: Tensor
    first_code: Tensor

    def __init__(self, embed: Tensor, mesh: DeviceMesh) -> None:
        """embed: all codes, ``(1, K, D)``. mesh: of one dimension."""
        super().__init__()
        self.mesh = mesh
        self.codebook_size = embed.shape[1]
        self.start, size = bounds(embed.shape[1], mesh.size(), mesh.get_local_rank())
        own = embed[:, self.start : self.start + size].clone()
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("cluster_size", own.new_ones(1, size))
        self.register_buffer("embed_avg", own.clone())
        self.register_buffer("embed", own)
        zero = torch.zeros((), dtype=torch.int64)
        self.register_buffer("nonfinite_batches", zero, persistent=False)
        self._watch = NonFiniteBatches()
        first = torch.tensor(self.start)
        self.register_buffer("first_code", first, persistent=False)
        self._checked = False

    def check_own(self) -> None:
        """At the first forward, no process's codes have been overwritten by another's.

        Raises:
            RuntimeError: some have.
        """
        if self._checked or torch.compiler.is_compiling():
            return
        own = (self.first_code != self.start).long()
        foreign = gathered(own, "comparing shards", self.mesh.get_group())
        if foreign.any():
            raise RuntimeError(
                f"{int(foreign.sum())} of {len(foreign)} shards hold the codes of another one: "
                "DistributedDataParallel broadcasts buffers; let it run over the processes with "
                "the same codes only"
            )
        self._checked = True

    @property
    def part(self) -> Part:
        """This process's codes."""
        return Part(self.embed[0], self.start, self.mesh.get_group())

    def of_all(self, name: str) -> Tensor:
        """The buffer ``name`` of all processes as a DTensor over this one's memory."""
        from torch.distributed.tensor import DTensor, Shard

        own = getattr(self, name)
        shape = torch.Size((1, self.codebook_size, *own.shape[2:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            own, self.mesh, [Shard(1)], run_check=False, shape=shape, stride=stride
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _SHARDED:
            destination[prefix + name] = self.of_all(name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = dict(state_dict)
        for name in _SHARDED:
            given = own.get(prefix + name)
            if given is None:
                continue
            if given.shape[1:2] == (self.codebook_size,):
                own[prefix + name] = self._own_of(given)
            else:
                error_msgs.append(
                    f"size mismatch for {prefix + name}: expected (1, {self.codebook_size}, ...) "
                    f"of all codes, got {tuple(given.shape)}"
                )
                del own[prefix + name]
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _own_of(self, given: Any) -> Tensor:
        from torch.distributed.tensor import Shard

        if is_sharded(given):
            if given.device_mesh == self.mesh and given.placements == (Shard(1),):
                return given.to_local()
            given = whole(given)
        return given.narrow(1, self.start, self.embed.shape[1])

    @torch.no_grad()
    def update_(
        self,
        x: Tensor,
        indices: Tensor,
        *,
        decay: float,
        eps: float,
        normalize: bool,
        data_mesh: DeviceMesh | None,
    ) -> None:
        """Follow the vectors ``x`` (N, D) and their codes ``indices`` (N,), -1 for none, as
        :func:`mmfast.ema_update_` does; of all processes of ``data_mesh``."""
        size = self.embed.shape[1]
        local = own_indices(indices, self.part)
        counts, sums = (t[None, :size] for t in code_statistics(x, local, max(size, 1)))
        if data_mesh is not None:
            what, group = "adding up the sizes and sums of codes", data_mesh.get_group()
            counts = add_up(counts.contiguous(), True, what, group)
            sums = add_up(sums.contiguous(), True, what, group)
        finite = sums.isfinite().all(2)  # [1, P]
        counts = torch.where(finite, counts.to(self.cluster_size), self.cluster_size)
        sums = torch.where(finite[:, :, None], sums.to(self.embed_avg), self.embed_avg)
        sizes = torch.lerp(counts.double(), self.cluster_size.double(), decay)  # [1, P]
        total_sums = torch.lerp(sums.double(), self.embed_avg.double(), decay)  # [1, P, D]
        # What all share: the sum of the sizes, and whether there was a sum that is not finite.
        shared = torch.stack([sizes.sum(), (~finite.all()).double()])
        add_up(shared, True, "adding up the sizes of sharded codes", self.mesh.get_group())
        total = shared[:1, None]  # [1, 1]
        codes = codes_of(self.embed, sizes, total_sums, total, self.codebook_size, eps, normalize)
        self.embed.copy_(codes)
        self.cluster_size.copy_(sizes)
        self.embed_avg.copy_(total_sums)
        self.nonfinite_batches += shared[1] > 0
        self._watch.look(self.nonfinite_batches)


class ShardedVectorQuantize(nn.Module):
    """:class:`mmfast.nn.VectorQuantize` with a codebook sharded by code over processes.

    For codebooks that one device should not hold or search alone. All processes of the mesh get
    the same vectors and give the same results: the exact indices of the whole codebook, lowest
    index on ties, as :func:`mmfast.nn.nearest_code_sharded` finds them. Each updates its own codes
    from the vectors that chose them; the sums need no reduction.

    Names and shapes of the state dict are those of :class:`mmfast.nn.VectorQuantize` with the
    same ``dim`` and K, as DTensors: ``torch.distributed.checkpoint`` saves and loads them on any
    number of processes, and ``load_state_dict`` takes an unsharded checkpoint as it is.

    Every forward communicates, in eval mode too. It has one head, no projection, no learnable
    codebook, no replacement of dead codes and no k-means initialisation.

    Args:
        dim: D, channels of the input.
        codebook_size: K; the first processes hold ceil(K / R) codes each, of R.
        mesh: of one dimension, the processes that share the codebook; all if None.
        data_mesh: of one dimension, the processes that hold the same codes and get other
            vectors: their statistics are added up. None if there are no such ones.
        decay, eps, commitment_weight, use_cosine_sim, freeze_codebook, rotation_trick: as in
            :class:`mmfast.nn.VectorQuantize`.

    Raises:
        ValueError: a mesh has more than one dimension.

    Source: see :class:`mmfast.nn.VectorQuantize`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        mesh: DeviceMesh | None = None,
        *,
        data_mesh: DeviceMesh | None = None,
        decay: float = 0.8,
        eps: float = 1e-5,
        commitment_weight: float = 1.0,
        use_cosine_sim: bool = False,
        freeze_codebook: bool = False,
        rotation_trick: bool | None = None,
    ) -> None:
        super().__init__()
        if mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            mesh = init_device_mesh(device, (dist.get_world_size(),))
        for name, given in (("mesh", mesh), ("data_mesh", data_mesh)):
            if given is not None and given.ndim != 1:
                raise ValueError(f"{name} must have one dimension, got {given}")
        self.dim = dim
        self.codebook_size = codebook_size
        self.data_mesh = data_mesh
        self.decay = decay
        self.eps = eps
        self.commitment_weight = commitment_weight
        self.use_cosine_sim = use_cosine_sim
        self.freeze_codebook = freeze_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        embed = torch.empty(1, codebook_size, dim)
        nn.init.kaiming_uniform_(embed)
        self._codebook = CodebookShard(unit(embed) if use_cosine_sim else embed, mesh)

    @property
    def codebook(self) -> Tensor:
        """All codes, ``(K, D)``, gathered: all processes must ask for them."""
        return whole(self._codebook.of_all("embed"))[0]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes ``(..., D)`` of ``indices`` (...), zeros where they are -1."""
        part = self._codebook.part
        return codes_at(indices, part, part.codes.dtype)

    get_output_from_indices = get_codes_from_indices

    def forward(
        self, x: Tensor, mask: Tensor | None = None, freeze_codebook: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise ``x``, and while training let the codebook follow.

        Args:
            x: ``(..., dim)``, the same in all processes of the mesh.
            mask: ``x.shape[:-1]``, bool; where it is False the output is 0, the index -1, and
                nothing counts.
            freeze_codebook: instead of the module's.

        Returns:
            ``(quantized, indices, loss)``: x's shape and dtype; ``x.shape[:-1]``, int64; ``()``,
            0 in eval mode.

        Raises:
            TypeError: an argument has another dtype.
            ValueError: shapes do not fit.
            RuntimeError: a reduction failed, for one because a process has ended.
        """
        check_floating("x", x)
        check_codebook(x, self._codebook.embed.new_empty(1, self.dim))
        if mask is not None:
            check_mask(x, mask)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        with torch.autocast(x.device.type, enabled=False):
            return self._quantize(x, mask, self.training and not frozen)

    def _quantize(
        self, x: Tensor, mask: Tensor | None, update: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._codebook.check_own()
        part = self._codebook.part
        vectors = unit(x) if self.use_cosine_sim else x
        rows = vectors.flatten(0, -2)  # [N, D]
        if mask is not None:
            rows = torch.where(mask.flatten()[:, None], rows, 0)
        indices, _ = look_up(rows.detach(), part, "dot" if self.use_cosine_sim else "euclidean")
        if mask is not None:
            indices = torch.where(mask.flatten(), indices, -1)
        codes = codes_at(indices, part, part.codes.dtype)  # [N, D]
        if update:
            self._codebook.update_(
                rows.detach(),
                indices,
                decay=self.decay,
                eps=self.eps,
                normalize=self.use_cosine_sim,
                data_mesh=self.data_mesh,
            )
        loss = rows.new_zeros((), dtype=output_dtype(rows, codes))
        if self.training:
            square = (codes - rows).to(loss.dtype).square().sum()  # masked ones are 0 on both sides
            count = (indices >= 0).sum().clamp_min(1) * self.dim
            loss = square / count * self.commitment_weight
        quantized = codes.to(x.dtype)
        if self.training and x.requires_grad:
            gradient = "rotation" if self.rotation_trick else "straight_through"
            quantized = _Valued.apply(passed(rows, quantized, gradient, 0.0), quantized)
        if mask is not None:
            quantized = torch.where(mask.flatten()[:, None], quantized, 0)
        return quantized.view(x.shape), indices.view(x.shape[:-1]), loss
