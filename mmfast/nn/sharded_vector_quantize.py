"""A vector quantiser whose codebook is sharded by code."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfast.checks import check_codebook, check_floating, check_mask
from mmfast.nn.checkpointing import check_not_repeated
from mmfast.nn.initialisation import unit
from mmfast.nn.layouts import Heads
from mmfast.nn.losses import passed
from mmfast.nn.sharded_codebook import CodebookShard
from mmfast.nn.sharded_look_up import check_mesh, codes_at, look_up
from mmfast.nn.sharded_parameter import whole
from mmfast.ops.nearest_code import output_dtype
from mmfast.regions import without_autocast

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Valued(torch.autograd.Function):
    """``value``, with the gradient of ``carried``, which is the same up to rounding."""

    @staticmethod
    def forward(ctx: Any, carried: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class ShardedVectorQuantize(nn.Module):
    """:class:`mmfast.nn.VectorQuantize` with a codebook sharded by code over processes.

    For codebooks that one device should not hold or search alone. All processes of the mesh get
    the same vectors and give the same results: the exact indices of the whole codebook, lowest
    index on ties, as :func:`mmfast.nn.nearest_code_sharded` finds them. Each updates its own codes
    from the vectors that chose them; the sums need no reduction.

    Names and shapes of the state dict are those of :class:`mmfast.nn.VectorQuantize` with the
    same ``dim`` and K, as DTensors: ``torch.distributed.checkpoint`` saves and loads them on any
    number of processes, and ``load_state_dict`` takes an unsharded checkpoint as it is.

    Heads, k-means initialisation and the replacement of dead codes are those of the unsharded
    module with the batch of all processes; no process holds all codes for them. Every forward
    communicates, in eval mode too. There are no projections and no learnable codebook.

    Args:
        dim: channels of the input.
        codebook_size: K; the first processes hold ceil(K / R) codes each, of R.
        mesh: of one dimension, the processes that share the codebook; all if None.
        data_mesh: of one dimension, the processes that hold the same codes and get other
            vectors: their statistics are added up. None if there are no such ones.
        heads: H parts that each vector is split into, each with a code of its own of D = dim / H
            dimensions: ``VectorQuantize`` with ``codebook_dim=dim // heads``.
        separate_codebook_per_head, decay, eps, commitment_weight, use_cosine_sim, freeze_codebook,
            rotation_trick, threshold_ema_dead_code, kmeans_init, kmeans_iters: as in
            :class:`mmfast.nn.VectorQuantize`.

    Raises:
        ValueError: a mesh has more than one dimension, does not have this process, or not all in
            the order of their ranks; or heads do not divide dim.

    Source: see :class:`mmfast.nn.VectorQuantize`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        mesh: DeviceMesh | None = None,
        *,
        data_mesh: DeviceMesh | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        commitment_weight: float = 1.0,
        use_cosine_sim: bool = False,
        freeze_codebook: bool = False,
        rotation_trick: bool | None = None,
        threshold_ema_dead_code: float = 0,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
    ) -> None:
        super().__init__()
        if mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            mesh = init_device_mesh(device, (dist.get_world_size(),))
        for name, given in (("mesh", mesh), ("data_mesh", data_mesh)):
            if given is None:
                continue
            if given.ndim != 1:
                raise ValueError(f"{name} must have one dimension, got {given}")
            check_mesh(name, given)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        self.dim = dim
        self.codebook_size = codebook_size
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.commitment_weight = commitment_weight
        self.use_cosine_sim = use_cosine_sim
        self.freeze_codebook = freeze_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self._codebook = CodebookShard(
            dim // heads,
            codebook_size,
            mesh,
            data_mesh,
            num_codebooks=heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_cosine_sim=use_cosine_sim,
        )

    @property
    def _heads(self) -> Heads:
        return Heads(self.heads, self.separate_codebook_per_head)

    @property
    def codebook(self) -> Tensor:
        """All codes, ``(K, D)``, or ``(H, K, D)`` with a codebook for each head, gathered: all
        processes must ask for them."""
        embed = whole(self._codebook.of_all("embed"))
        return embed if self.separate_codebook_per_head else embed[0]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of ``indices`` as the forward returns them, zeros where they are -1: ``(..., D)``,
        ``(..., H D)`` of separate codebooks, ``(..., H, D)`` of heads that share one."""
        codes = self._codes_of(indices)
        return codes.flatten(-2) if self.separate_codebook_per_head and self.heads > 1 else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the forward gives out where it gives ``indices``."""
        codes = self._codes_of(indices)
        return codes.flatten(-2) if self.heads > 1 else codes

    def _codes_of(self, indices: Tensor) -> Tensor:
        part = self._codebook.part
        books, _, dim = part.codes.shape
        rows = indices.reshape(-1, books).T  # [C, N]
        return codes_at(rows, part, part.codes.dtype).transpose(0, 1).reshape(*indices.shape, dim)

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
            ``(quantized, indices, loss)``: x's shape and dtype; ``x.shape[:-1]``, with heads
            ``(..., H)``, int64; ``()``, 0 in eval mode.

        Raises:
            TypeError: an argument has another dtype.
            ValueError: shapes do not fit, or there is nothing to initialise the codebook from.
            RuntimeError: a reduction failed, for one because a process has ended; or compiling
                with a codebook that is not initialised; or the codebook would move where
                activation checkpointing repeats the forward.
        """
        check_floating("x", x)
        check_codebook(x, self._codebook.embed.new_empty(1, self.dim))
        if mask is not None:
            check_mask(x, mask)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        with without_autocast(x.device.type):
            return self._quantize(x, mask, self.training and not frozen)

    def _quantize(
        self, x: Tensor, mask: Tensor | None, update: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if update:
            check_not_repeated()
        self._codebook.check_own()
        batch = x.shape[0] if x.dim() > 1 else 1
        length = math.prod(x.shape[1:-1])
        vectors = self._heads.split(x.reshape(batch, length, self.dim))  # [C, M, D]
        vectors = unit(vectors) if self.use_cosine_sim else vectors
        inside = None
        if mask is not None:
            inside = self._heads.spread(mask.reshape(batch, length))  # [C, M]
            vectors = torch.where(inside[:, :, None], vectors, 0)
        self._codebook.ensure_initialised(vectors, inside)
        part = self._codebook.part
        indices, _ = look_up(vectors.detach(), part, self._codebook.metric)
        if inside is not None:
            indices = torch.where(inside, indices, -1)
        codes = codes_at(indices, part, part.codes.dtype)  # [C, M, D]
        if update:
            self._codebook.update_(vectors.detach(), indices)
        # The gradients of both outputs meet in this dtype, and are rounded once.
        wide = vectors.to(output_dtype(vectors, codes))
        loss = wide.new_zeros(())
        if self.training:
            # Masked ones are 0 on both sides.
            square = (codes.to(wide.dtype) - wide).square().sum()
            count = (indices >= 0).sum().clamp_min(1) * codes.shape[2]
            loss = square / count * self.commitment_weight
        quantized = codes.to(x.dtype)
        if self.training and x.requires_grad:
            gradient = "rotation" if self.rotation_trick else "straight_through"
            carried = passed(wide, codes, gradient, 0.0).to(x.dtype)
            quantized = _Valued.apply(carried, quantized)
        if inside is not None:
            quantized = torch.where(inside[:, :, None], quantized, 0)
        quantized = self._heads.join(quantized, batch, length)
        index = self._heads.join_indices(indices, batch, length)
        each = x.shape[:-1] if self.heads == 1 else (*x.shape[:-1], self.heads)
        return quantized.reshape(x.shape), index.reshape(each), loss
