"""A process's part of a codebook that is sharded by code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfast.nn.code_buffers import CodeBuffers
from mmfast.nn.dead_codes import replacements
from mmfast.nn.initialisation import lloyd
from mmfast.nn.ranks import Sharing, add_up, check_agreement, gathered
from mmfast.nn.sharded_look_up import Part, bounds, look_up, own_indices
from mmfast.nn.sharded_parameter import is_sharded, whole
from mmfast.ops.code_statistics import code_statistics
from mmfast.ops.ema_update import codes_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_SHARDED = ("cluster_size", "embed_avg", "embed")


class CodebookShard(CodeBuffers):
    """A process's part of the buffers of :class:`mmfast.nn.codebook.Codebook`, with its names.

    ``cluster_size`` (H, P), ``embed_avg`` and ``embed`` (H, P, D) are plain tensors. The state
    dict has them as DTensors of K codes with placement ``Shard(1)``, over the same memory; loading
    takes such ones, DTensors of other placements, and plain tensors of all K codes.

    Args: as those of :class:`mmfast.nn.ShardedVectorQuantize`; ``num_codebooks`` is H.
    """

    first_code: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        mesh: DeviceMesh,
        data_mesh: DeviceMesh | None,
        *,
        num_codebooks: int,
        kmeans_init: bool,
        kmeans_iters: int,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        use_cosine_sim: bool,
    ) -> None:
        super().__init__()
        self.mesh = mesh
        self.data_mesh = data_mesh
        self.codebook_size = codebook_size
        self.kmeans_iters = kmeans_iters
        self.decay = decay
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.use_cosine_sim = use_cosine_sim
        self.start, size = bounds(codebook_size, mesh.size(), mesh.get_local_rank())
        self._register_codes(
            num_codebooks,
            codebook_size,
            dim,
            kmeans_init=kmeans_init,
            part=slice(self.start, self.start + size),
        )
        first = torch.tensor(self.start)
        self.register_buffer("first_code", first, persistent=False)
        self._checked = False
        # Those with the other codes may have compared ``initted`` before the others.
        self._compared = False

    @property
    def _data(self) -> ProcessGroup | None:
        """The processes with the same codes and other vectors, if there are any."""
        return None if self.data_mesh is None else self.data_mesh.get_group()

    @property
    def _sharing(self) -> Sharing:
        own = slice(self.start, self.start + self.embed.shape[1])
        codes = self.mesh.get_group()
        return Sharing(self.data_mesh is not None, self._data, others=(codes,), codes=own)

    @property
    def metric(self) -> str:
        """As of :class:`mmfast.nn.codebook.Codebook`."""
        return "dot" if self.use_cosine_sim else "euclidean"

    def ensure_initialised(self, x: Tensor, mask: Tensor | None) -> None:
        """Initialise from ``x`` (H, N, D), transformed, where ``mask`` (H, N) is True, if nothing
        else has.

        Raises:
            RuntimeError: that is needed now, and the call is being traced; or only some processes
                are initialised.
        """
        compiling = torch.compiler.is_compiling()
        if self._ready and (compiling or self._agreed or (not self.training and self._compared)):
            return
        if compiling:
            raise RuntimeError(
                "the codebook is not known to be initialised, which cannot be traced: before "
                "compiling or exporting, forward once"
            )
        self._ready = bool(self.initted)
        check_agreement(self.initted, self.mesh.get_group())
        self._compared = True
        # In eval mode processes with other data may have nothing to do.
        if self.training or not self._ready:
            if self.data_mesh is not None:
                check_agreement(self.initted, self._data)
            self._agreed = True
        if not self._ready:
            self._init_embed(x, mask)

    @torch.compiler.disable
    @torch.no_grad()
    def _init_embed(self, x: Tensor, mask: Tensor | None) -> None:
        def own_of(x: Tensor, codes: Tensor) -> Tensor:
            part = self.part._replace(codes=codes)
            return own_indices(look_up(x, part, self.metric)[0], part)

        codes, counts = lloyd(
            x.detach(),
            self.codebook_size,
            self.kmeans_iters,
            metric=self.metric,
            inside=mask,
            sharing=self._sharing,
            look_up=own_of,
        )
        counts = counts.double()
        self._move(counts, codes.double() * counts[:, :, None], torch.ones_like(counts).bool())
        self.initted.fill_(True)
        self._ready = True

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
        return Part(self.embed, self.start, self.mesh.get_group())

    def of_all(self, name: str) -> Tensor:
        """The buffer ``name`` of all processes as a DTensor over this one's memory."""
        from torch.distributed.tensor import DTensor, Shard

        own = getattr(self, name)
        shape = torch.Size((len(own), self.codebook_size, *own.shape[2:]))
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
            if given.shape[:2] == (len(self.embed), self.codebook_size):
                own[prefix + name] = self._own_of(given)
            else:
                error_msgs.append(
                    f"size mismatch for {prefix + name}: expected ({len(self.embed)}, "
                    f"{self.codebook_size}, ...) of all codes, got {tuple(given.shape)}"
                )
                del own[prefix + name]
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._ready = not self.initted.is_meta and bool(self.initted)
        self._agreed = self._agreed and self._ready
        self._compared = self._compared and self._ready

    def _own_of(self, given: Any) -> Tensor:
        from torch.distributed.tensor import Shard

        if is_sharded(given):
            if given.device_mesh == self.mesh and given.placements == (Shard(1),):
                return given.to_local()
            given = whole(given)
        return given.narrow(1, self.start, self.embed.shape[1])

    @torch.no_grad()
    def update_(self, x: Tensor, indices: Tensor) -> None:
        """Follow the vectors ``x`` (H, N, D) and their codes ``indices`` (H, N), -1 for none, of
        all processes of ``data_mesh``, and replace codes that few have, as
        :class:`mmfast.nn.codebook.Codebook` does."""
        size = self.embed.shape[1]
        local = own_indices(indices, self.part)
        counts, sums = (t[:, :size] for t in code_statistics(x, local, max(size, 1)))
        if self.data_mesh is not None:
            what = "adding up the sizes and sums of codes"
            counts = add_up(counts.contiguous(), True, what, self._data)
            sums = add_up(sums.contiguous(), True, what, self._data)
        finite = sums.isfinite().all(2)  # [H, P]
        counts = torch.where(finite, counts.to(self.cluster_size), self.cluster_size)
        sums = torch.where(finite[:, :, None], sums.to(self.embed_avg), self.embed_avg)
        sizes = torch.lerp(counts.double(), self.cluster_size.double(), self.decay)
        self.nonfinite_batches += self._move(
            sizes, torch.lerp(sums.double(), self.embed_avg.double(), self.decay), finite
        )
        if self.threshold_ema_dead_code > 0:
            self._replace_dead(x, indices >= 0)
        self._watch.look(self.nonfinite_batches)

    def _move(self, sizes: Tensor, sums: Tensor, finite: Tensor) -> Tensor:
        """Set averages and codes to new averages in float64, of sizes (H, P) and sums (H, P, D).

        Returns:
            Whether any of ``finite`` (H, P) is False in a process, ().
        """
        # What all share: the sums of the sizes, and whether there was a sum that is not finite.
        shared = torch.cat([sizes.sum(1), (~finite.all()).double()[None]])  # [H + 1]
        add_up(shared, True, "adding up the sizes of sharded codes", self.mesh.get_group())
        total = shared[:-1, None]  # [H, 1]
        codes = codes_of(
            self.embed, sizes, sums, total, self.codebook_size, self.eps, self.use_cosine_sim
        )
        self.embed.copy_(codes)
        self.cluster_size.copy_(sizes)
        self.embed_avg.copy_(sums)
        return shared[-1] > 0

    def _replace_dead(self, x: Tensor, inside: Tensor) -> None:
        dead = torch.zeros(
            len(self.embed), self.codebook_size, dtype=torch.uint8, device=x.device
        )  # [H, K]
        own, reset = self._sharing.codes, self.threshold_ema_dead_code
        dead[:, own] = self.cluster_size < reset
        add_up(dead, True, "comparing sharded codes", self.mesh.get_group())
        vectors, chosen = replacements(x, dead.bool(), inside, self._sharing)
        at, vectors = chosen[:, :, None], vectors.to(self.embed)
        self.embed.copy_(torch.where(at, vectors, self.embed))
        self.embed_avg.copy_(torch.where(at, vectors * reset, self.embed_avg))
        self.cluster_size.masked_fill_(chosen, reset)
