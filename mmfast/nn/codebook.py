"""The codebook of a vector quantiser: its buffers and how they follow the vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.library import copied
from mmfast.nn.affine import Affine
from mmfast.nn.code_buffers import CodeBuffers
from mmfast.nn.dead_codes import replacements
from mmfast.nn.initialisation import lloyd, unit
from mmfast.nn.ranks import Sharing, add_up, check_agreement, several
from mmfast.nn.sharded_parameter import is_sharded, set_whole, whole
from mmfast.ops.code_statistics import code_statistics
from mmfast.ops.ema_update import ema_update_from_statistics_
from mmfast.regions import without_gradients

Weight = Tensor | Callable[[Tensor, Tensor], Tensor]


class Codebook(CodeBuffers, Affine):
    """H codebooks of K codes of D dimensions, and their moving averages.

    What is averaged stays float32 under autocast.

    A code whose batch has a vector that is not finite keeps its averages; ``nonfinite_batches``
    (), a buffer that is not in the state dict, counts such batches.

    A learnable ``embed`` may be sharded by ``fully_shard``: what is set in place then is also set
    in the shard, which is all that remains of it after a forward.

    Args: as those of :class:`mmfast.nn.VectorQuantize`; ``use_ddp`` is its ``sync_codebook``,
    ``num_codebooks`` H.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        num_codebooks: int,
        kmeans_init: bool,
        kmeans_iters: int,
        sync_kmeans: bool,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        use_ddp: bool | None,
        learnable_codebook: bool,
        ema_update: bool,
        manual_ema_update: bool,
        use_cosine_sim: bool,
        vq_bridge: nn.Module | None,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.kmeans_iters = kmeans_iters
        self._sync_kmeans = sync_kmeans
        self.decay = decay
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.reset_cluster_size = threshold_ema_dead_code
        self._use_ddp = use_ddp
        self.learnable_codebook = learnable_codebook
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.use_cosine_sim = use_cosine_sim
        self.affine_param = False
        self._shard: Tensor | None = None
        self._register_codes(
            num_codebooks,
            codebook_size,
            dim,
            kmeans_init=kmeans_init,
            learnable=learnable_codebook,
        )
        self.vq_bridge = vq_bridge

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard puts the gathered parameter in the place of its shard for a forward.
        if name == "embed" and isinstance(value, nn.Parameter):
            before = self._parameters.get("embed")
            shard = before if is_sharded(before) and not is_sharded(value) else None
            object.__setattr__(self, "_shard", shard)  # not to be found as a parameter
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._ready = not self.initted.is_meta and bool(self.initted)
        self._agreed = self._agreed and self._ready

    @property
    def use_ddp(self) -> bool:
        """Whether statistics are those of all ranks."""
        return several() if self._use_ddp is None else self._use_ddp

    @property
    def sync_kmeans(self) -> bool:
        """Whether the initialisation is that of all ranks."""
        return self._sync_kmeans and self.use_ddp

    @property
    def plain_embed(self) -> Tensor:
        """The codes as a plain tensor. While ``embed`` is sharded, outside of a forward, it is
        gathered: all ranks must ask for it."""
        return whole(self.embed)

    def set_embed(self, codes: Tensor, at: Tensor | None = None) -> None:
        """Set the codes to those (H, K, D) given, the same on all ranks, where ``at`` is True."""
        set_whole(self.embed, codes, at)
        if self._shard is not None:
            set_whole(self._shard, codes, at)

    @property
    def metric(self) -> str:
        """What is nearest. The vectors come normalised, so that the largest inner product is the
        largest cosine similarity."""
        return "dot" if self.use_cosine_sim else "euclidean"

    @property
    def replaces_dead_codes(self) -> bool:
        """Whether codes that few vectors choose are replaced."""
        return self.threshold_ema_dead_code > 0

    def follows(self, ema_update: bool | None = None) -> bool:
        """Whether :meth:`update_` moves anything."""
        ema_update = self.ema_update if ema_update is None else ema_update
        return ema_update or self.replaces_dead_codes

    def transform_input(self, x: Tensor) -> Tensor:
        """Vectors as the codebook compares them: normalised for the cosine."""
        return unit(x) if self.use_cosine_sim else x

    def ensure_initialised(self, x: Tensor, mask: Tensor | None) -> None:
        """Initialise from ``x`` (H, N, D) if nothing else has.

        Raises:
            RuntimeError: that is needed now, and the call is being traced; or only some ranks
                are initialised.
        """
        agreed = self._agreed or not self.training or not self.use_ddp
        if self._ready and (agreed or torch.compiler.is_compiling()):
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the codebook is not known to be initialised, which cannot be traced: before "
                "compiling or exporting, call init_codebook_(x), or forward once"
            )
        self._ready = bool(self.initted)
        if self.use_ddp and (self.training or self.sync_kmeans):
            check_agreement(self.initted)
            self._agreed = True
        if not self._ready:
            self.init_embed_(x, mask)

    @torch.compiler.disable
    @torch.no_grad()
    def init_embed_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """k-means on the vectors ``x`` (H, N, D), transformed, where ``mask`` (H, N) is True."""
        codes, counts = lloyd(
            x.detach(),
            self.codebook_size,
            self.kmeans_iters,
            metric=self.metric,
            inside=mask,
            sharing=Sharing(self.sync_kmeans),
        )
        self.embed_avg.copy_(codes * counts[:, :, None])
        self.cluster_size.copy_(counts)
        self.update_ema()
        self.initted.fill_(True)
        self._ready = True

    def codes(self) -> Tensor:
        """The codes (H, K, D) that vectors are compared with. Changes of ``embed`` in place do not
        reach them, so that gradients taken later are those of the codes that were chosen."""
        embed = self.plain_embed if self.learnable_codebook else self.plain_embed.detach()
        embed = copied(embed) if self.training else embed
        if self.vq_bridge is not None:
            embed = self.vq_bridge(embed)
        return self.carried(embed) if self.affine_param else embed

    @without_gradients
    def update_(
        self,
        x: Tensor,
        indices: Tensor,
        *,
        weight: Weight | None = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Follow the vectors ``x`` (H, N, D) and their codes ``indices`` (H, N), -1 for none.

        Args:
            weight: of the new values of each code, ``(K,)`` or ``(H, K)``, times 1 - decay; or
                what gives it from the batch's sums (H, K, D) and counts (H, K).
            accumulate: only add to what the next update will take: the sums are kept in ``grad``
                of the two averages.
            ema_update: whether the codes follow the averages; by default the codebook's own.
        """
        if not self.follows(ema_update):
            return
        ema_update = self.ema_update if ema_update is None else ema_update
        counts, sums = code_statistics(x, indices, self.codebook_size)
        if self.affine_param:
            sums = self.carried_back(sums, counts)
        what = "adding up the sizes and sums of codes"
        add_up(counts, self.use_ddp, what)
        add_up(sums, self.use_ddp, what)
        counts, sums = counts.to(self.cluster_size), sums.to(self.embed_avg)
        scale = weight(sums, counts) if callable(weight) else weight
        if accumulate:
            _accumulate(self.cluster_size, counts)
            _accumulate(self.embed_avg, sums)
            return
        counts = _with_accumulated(self.cluster_size, counts)
        sums = _with_accumulated(self.embed_avg, sums)
        # These say it of all numbers in one pass: they are NaN if one is.
        least, largest = sums.aminmax(dim=2)
        finite = least.isfinite() & largest.isfinite()  # [H, K]
        self.nonfinite_batches += ~finite.all()
        counts = torch.where(finite, counts, self.cluster_size)
        torch.where(finite[:, :, None], sums, self.embed_avg, out=sums)
        if scale is not None:
            # Moving by scale (1 - decay) is moving by 1 - decay to a point on the way.
            scale = scale.to(counts).expand_as(counts)
            counts = torch.lerp(self.cluster_size, counts, scale)
            sums = torch.lerp(self.embed_avg, sums, scale[:, :, None])
        if ema_update and not self.manual_ema_update:
            self._follow_statistics(counts, sums, self.decay)
        else:
            self.cluster_size.lerp_(counts, 1 - self.decay)
            self.embed_avg.lerp_(sums, 1 - self.decay)
        self.expire_codes_(x, indices >= 0)
        self._watch.look(self.nonfinite_batches)

    def _follow_statistics(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        # A parameter may be gathered in a lower precision, or not at all.
        plain = self._shard is None and not is_sharded(self.embed)
        codes = self.embed if plain else self.plain_embed.to(self.embed_avg.dtype, copy=True)
        ema_update_from_statistics_(
            codes,
            self.cluster_size,
            self.embed_avg,
            counts,
            sums,
            decay=decay,
            eps=self.eps,
            normalize=self.use_cosine_sim,
        )
        if not plain:
            self.set_embed(codes)

    def update_ema(self) -> None:
        """Set the codes to the means that the averages say."""
        self._follow_statistics(self.cluster_size, self.embed_avg, 1.0)

    @without_gradients
    def expire_codes_(self, x: Tensor, inside: Tensor | None = None) -> None:
        """While training, put random ones of the vectors ``x`` (H, ..., D), transformed, in the
        place of codes whose ``cluster_size`` is below the threshold.

        Args:
            inside: ``(H, N)``, the vectors to take from; all if None.
        """
        if not self.replaces_dead_codes or not self.training:
            return
        x = x.detach().flatten(1, -2)
        dead = self.cluster_size < self.threshold_ema_dead_code  # [H, K]
        vectors, chosen = replacements(x, dead, inside, Sharing(self.use_ddp))
        if self.affine_param:
            vectors = self.carried_back(vectors, torch.ones_like(self.cluster_size))
        at = chosen[:, :, None]
        size = self.reset_cluster_size
        self.set_embed(vectors, at.expand_as(vectors))
        self.embed_avg.copy_(torch.where(at, vectors.to(self.embed_avg) * size, self.embed_avg))
        self.cluster_size.masked_fill_(chosen, size)


def _accumulate(average: Tensor, new: Tensor) -> None:
    average.grad = new if average.grad is None else average.grad + new


def _with_accumulated(average: Tensor, new: Tensor) -> Tensor:
    """``new`` and what has been kept for it, which is forgotten."""
    kept, average.grad = average.grad, None
    return new if kept is None else new + kept
