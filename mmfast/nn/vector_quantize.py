"""The vector quantiser as a module, a drop-in for vector-quantize-pytorch's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mmfast.checks import check_codes, check_dtype, check_floating, check_least, check_possible
from mmfast.nn import losses, similarity
from mmfast.nn.checkpointing import check_not_repeated
from mmfast.nn.codebook import Codebook, Weight
from mmfast.nn.layouts import Heads, Layout, mask_of_lens
from mmfast.nn.look_up import Chosen, in_pieces, nearest
from mmfast.nn.losses import LossBreakdown
from mmfast.nn.ranks import add_up
from mmfast.regions import without_autocast, without_gradients


class _Call(NamedTuple):
    """The options of one forward that its look-ups need."""

    mask: Tensor | None  # [C, M]
    topk: int | None
    temperature: float
    frozen: bool
    codebook_transform_fn: Callable[[Tensor], Tensor] | None
    batch: int
    length: int


class VectorQuantize(nn.Module):
    """Replace vectors by codes of a codebook that learns.

    Takes the arguments of vector-quantize-pytorch's ``VectorQuantize`` (1.32), with its defaults,
    its parameters, buffers and initial numbers, so that checkpoints load both ways. Look-up,
    losses and statistics are :func:`mmfast.vector_quantize`, :func:`mmfast.code_statistics` and
    :func:`mmfast.soft_assignment_statistics`: indices are exact, and nothing of N x K is in
    memory (the diversity loss needs mean probabilities of L x K). The following compare a vector
    with all codes and do so in pieces of 4 M similarities, which a gradient computes again:
    ``topk``, ``stochastic_sample_codes``, ``straight_through`` and the cross-entropy loss.
    ``codebook_transform_fn`` gets the codebook and returns the codes of each vector,
    (H, B, L, K, D), which is its own to afford.

    ``torch.compile(fullgraph=True)`` and ``torch.export`` take the forward without a break.
    Nothing is read back to the host, but for a k-means initialisation, before compiling:
    :meth:`init_codebook_`, or the first forward. The in-place optimiser needs eager mode.

    A batch with a NaN or an infinity gives a loss that is not finite; the codes that such
    vectors choose keep their averages in that step, and the codebook stays finite. A
    RuntimeWarning says so: on a GPU some steps later, as nothing waits for it. Compiled, such
    batches are counted only, in ``_codebook.nonfinite_batches``.

    Where it differs from its model:

    - gradients are those of the codes that were compared with; the model overwrites them in the
      forward, before losses on distances take theirs;
    - a masked commitment loss compares the codes with what was quantised, after projection and
      normalisation, as the one without a mask does; the model takes the raw input;
    - ``orthogonal_reg_active_codes_only`` leaves out the codes of masked vectors;
    - ``lens`` counts positions also where channels are first;
    - index -1 stands for no code: zeros in :meth:`get_codes_from_indices`, left out of
      :meth:`update_indices`;
    - whether there are several ranks is asked at each step, not when the module is made;
    - across ranks dead codes are replaced by the same vectors everywhere, drawn from all ranks'
      batches, whatever ``sync_kmeans`` is;
    - random numbers for dead codes are drawn in every training step that could need them;
    - an empty batch has loss 0.

    Args:
        dim: channels of the input.
        codebook_size: K.
        codebook_dim: D; by default dim. Where heads x D is not dim, linear layers lead there and
            back.
        heads: parts that each vector is split into, each with a code of its own.
        separate_codebook_per_head: else the heads share one codebook.
        decay: of the moving averages of sizes and sums.
        eps: of the smoothing of the sizes.
        freeze_codebook: no updates; also for a single forward.
        kmeans_init, kmeans_iters: start from a k-means of the first batch.
        sync_kmeans: that of all ranks.
        use_cosine_sim: codes and vectors on the sphere.
        layernorm_after_project_in: normalise the layers after projecting.
        threshold_ema_dead_code: replace codes whose averaged size is below; 0 never does.
        channel_last: sequences are (B, L, C), else (B, C, L).
        accept_image_fmap, accept_3d_fmap: the input is (B, C, H, W), or (B, C, T, H, W).
        commitment_weight: of the loss that pulls vectors to their codes (and learnable codes to
            their vectors).
        commitment_use_cross_entropy_loss: which then is the cross entropy of minus the distances.
        orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: the
            loss that pushes codes apart.
        codebook_diversity_loss_weight, codebook_diversity_temperature: the loss that spreads the
            use of codes.
        stochastic_sample_codes, sample_codebook_temp: while training, draw codes by their
            distances.
        straight_through: with a gradient through the softmax of the distances.
        rotation_trick: the gradient of rotation and scaling; by default where dim is above 1 and
            no other gradient is asked for.
        directional_reparam, directional_reparam_variance: the directional gradient, to both the
            vectors and a learnable codebook.
        sync_codebook: add up the statistics of all ranks; by default where there are several.
        sync_affine_param: those of ``affine_param``.
        ema_update: codes follow moving averages; by default unless they learn by gradients.
        vq_bridge: a module that the codebook goes through.
        manual_ema_update: averages move, and the codes only by ``_codebook.update_ema()``.
        learnable_codebook: the codebook is a parameter.
        in_place_codebook_optimizer: makes the optimiser, of the codebook's parameters, whose step
            each training forward takes before it quantises.
        manual_in_place_optimizer_update: that step is left to :meth:`update_in_place_optimizer`.
        affine_param, affine_param_batch_decay, affine_param_codebook_decay: shift and scale the
            codes by running moments of vectors and codes. Those of the vectors also run in eval
            mode.
        sync_update_v: how much further the quantised output's gradient goes.
        return_zeros_for_masked_padding: else what is masked passes through.
        route_gradients_to_input: else only the losses have gradients for the input.

    Raises:
        ValueError: options contradict each other.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017); the options'
    papers are named where they are computed.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        by_gradient = directional_reparam or vq_bridge is not None
        ema_update = not by_gradient if ema_update is None else ema_update
        learnable_codebook = by_gradient if learnable_codebook is None else learnable_codebook
        if rotation_trick is None:
            rotation_trick = dim > 1 and not directional_reparam and not straight_through
        orthogonal = orthogonal_reg_weight > 0
        check_possible(
            {
                "use_cosine_sim with learnable_codebook": use_cosine_sim and learnable_codebook,
                "use_cosine_sim with affine_param": use_cosine_sim and affine_param,
                "more than one of straight_through, rotation_trick and directional_reparam": (
                    straight_through + rotation_trick + directional_reparam > 1
                ),
                "directional_reparam without threshold_ema_dead_code": (
                    directional_reparam and threshold_ema_dead_code == 0
                ),
                "straight_through with learnable_codebook": straight_through and learnable_codebook,
                "ema_update with learnable_codebook": ema_update and learnable_codebook,
                "ema_update with vq_bridge": ema_update and vq_bridge is not None,
                "vq_bridge without learnable_codebook": (
                    vq_bridge is not None and not learnable_codebook
                ),
                "sync_update_v without learnable_codebook": (
                    sync_update_v > 0 and not learnable_codebook
                ),
                "accept_image_fmap with accept_3d_fmap": accept_image_fmap and accept_3d_fmap,
                "orthogonal_reg_active_codes_only with separate_codebook_per_head": (
                    orthogonal
                    and orthogonal_reg_active_codes_only
                    and separate_codebook_per_head
                    and heads > 1
                ),
            }
        )
        check_least(1, dim=dim, codebook_size=codebook_size, heads=heads)
        if codebook_dim is not None:
            check_least(1, codebook_dim=codebook_dim)
        if not commitment_weight >= 0:
            raise ValueError(f"commitment_weight must be at least 0, got {commitment_weight}")
        if not 0 <= sync_update_v <= 1:
            raise ValueError(f"sync_update_v must be from 0 to 1, got {sync_update_v}")
        if codebook_diversity_loss_weight > 0 and not codebook_diversity_temperature > 0:
            raise ValueError(
                "codebook_diversity_temperature must be above 0, "
                f"got {codebook_diversity_temperature}"
            )

        self.dim = dim
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)

        self.eps = eps
        self.commitment_weight = commitment_weight
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.learnable_codebook = learnable_codebook
        self.has_codebook_orthogonal_loss = orthogonal
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes = stochastic_sample_codes
        self.sample_codebook_temp = sample_codebook_temp
        self.straight_through = straight_through
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.route_gradients_to_input = route_gradients_to_input
        self.sync_update_v = sync_update_v
        self.use_cosine_sim = use_cosine_sim
        self.codebook_size = codebook_size
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.channel_last = channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.freeze_codebook = freeze_codebook

        num_codebooks = heads if separate_codebook_per_head else 1
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            num_codebooks=num_codebooks,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_ddp=sync_codebook,
            learnable_codebook=orthogonal or learnable_codebook,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            vq_bridge=vq_bridge,
        )
        if affine_param:
            self._codebook.register_affine(
                (num_codebooks, 1, codebook_dim),
                sync_affine_param,
                affine_param_batch_decay,
                affine_param_codebook_decay,
            )
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.in_place_codebook_optimizer: Optimizer | None = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(
                self._codebook.parameters()
            )

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes, ``(K, D)``, or ``(H, K, D)`` with a codebook for each head."""
        embed = self._codebook.plain_embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        check_floating("codebook", codes)
        self._codebook.set_embed(codes if self.separate_codebook_per_head else codes[None])

    @property
    def _gradient(self) -> str:
        if self.rotation_trick:
            return "rotation"
        return "directional" if self.directional_reparam else "straight_through"

    @property
    def _layout(self) -> Layout:
        spatial = 2 if self.accept_image_fmap else 3 if self.accept_3d_fmap else 1
        return Layout(spatial, spatial > 1 or not self.channel_last)

    @property
    def _heads(self) -> Heads:
        return Heads(self.heads, self.separate_codebook_per_head)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of ``indices``, arranged as the input, before ``project_out``.

        Args:
            indices: as the forward returns them; -1 gives zeros. With separate codebooks
                ``(B, ..., H)``.

        Returns:
            ``(B, ..., D)``, ``(B, ..., H D)`` with separate codebooks, ``(B, ..., H, D)`` with
            heads that share one; channels first where the input has them so.
        """
        return self._layout.channels(self._codes_of(indices))

    def _codes_of(self, indices: Tensor) -> Tensor:
        """Codes (B, ..., D) of the indices (B, ...); with separate codebooks (B, ..., H D)."""
        embed = self._codebook.plain_embed
        check_codes("indices", indices, embed.shape[1], least=-1)
        known = indices.clamp_min(0)
        if embed.shape[0] > 1:
            head = torch.arange(embed.shape[0], device=indices.device)
            codes = embed[head, known]
        else:
            codes = embed[0][known]
        codes = torch.where((indices >= 0)[..., None], codes, 0)
        return codes.flatten(-2) if self.separate_codebook_per_head and self.heads > 1 else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the forward gives out where it gives ``indices``."""
        codes = self._codes_of(indices)
        if self.heads > 1 and not self.separate_codebook_per_head:
            codes = codes.flatten(-2)
        return self._layout.channels(self.project_out(codes))

    def init_codebook_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the codebook to a k-means of ``x``, arranged as the forward's input; it does so by
        itself at the first forward with ``kmeans_init``.

        Raises:
            ValueError: x has no finite vector.
        """
        with torch.no_grad():
            vectors, _ = self._vectors(x)
        self._codebook.init_embed_(vectors, None if mask is None else self._heads.spread(mask))

    def expire_codes_(self, x: Tensor) -> None:
        """While training, replace codes that are hardly used by random ones of ``x``
        (..., heads D), vectors after ``project_in``."""
        vectors = self._heads.split(x.flatten(0, -2)[None])
        self._codebook.expire_codes_(self._codebook.transform_input(vectors))

    @without_gradients
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Let the codebook follow vectors that have been given codes elsewhere.

        Args:
            x: as the forward's input. indices: as it returns them; -1 is left out.
            mask: ``(B, L)``, the vectors that count.
        """
        vectors, _ = self._vectors(x)
        rows = self._rows_of(indices)
        if mask is not None:
            rows = torch.where(self._heads.spread(mask), rows, -1)
        self._codebook.update_(vectors, rows)

    update_ema_indices = update_indices

    def update_in_place_optimizer(self) -> None:
        """A step of the in-place optimiser, with the mean of the ranks' gradients."""
        optimizer = self.in_place_codebook_optimizer
        if optimizer is None:
            return
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in known for p in self._codebook.parameters()):
            raise RuntimeError(
                "in_place_codebook_optimizer was made for other parameters than the codebook now "
                "has; with fully_shard, leave the codebook's out by ignored_params"
            )
        if self._codebook.use_ddp:
            for parameter in self._codebook.parameters():
                if parameter.grad is not None:
                    add_up(parameter.grad, True, "adding up a codebook's gradients")
                    parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()

    def _add_gradients(self, loss: Tensor) -> None:
        """``loss.backward()`` for the codebook, unseen by the hooks of DistributedDataParallel,
        which expect one backward of the whole model."""
        parameters = [p for p in self._codebook.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, new in zip(parameters, gradients, strict=True):
            if new is not None:
                parameter.grad = new if parameter.grad is None else parameter.grad + new

    def _vectors(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """What is quantised of the input: (C, M, D), and the sizes of its positions."""
        tokens, sizes = self._layout.tokens(x)
        if tokens.shape[2] != self.dim:
            raise ValueError(f"x must have dim = {self.dim} channels, got shape {tuple(x.shape)}")
        vectors = self._heads.split(self.project_in(tokens)).to(x.dtype)
        with without_autocast(x.device.type):
            return self._codebook.transform_input(vectors), sizes

    def _rows_of(self, indices: Tensor) -> Tensor:
        """Indices (C, M) of those (B, ...), with heads (B, ..., H), of a forward."""
        shape = (indices.shape[0], -1, self.heads) if indices.numel() else (0, 0, self.heads)
        return self._heads.split_indices(indices.reshape(shape))

    def _effective_codes(self, call: _Call) -> Tensor:
        """(C, K, D), or (C, M, K, D) after ``codebook_transform_fn``."""
        codes = self._codebook.codes()
        if call.codebook_transform_fn is None:
            return codes
        codes = call.codebook_transform_fn(codes).flatten(1, 2)  # [C, M, K, D]
        return self._codebook.transform_input(codes)

    def _look_up(self, x: Tensor, codes: Tensor, call: _Call, gradient: str) -> Chosen:
        """Codes of the vectors ``x`` (C, M, D)."""
        metric, variance = self._codebook.metric, self.directional_reparam_variance
        random = self.training and call.temperature > 0
        drawn = call.temperature if random and self.stochastic_sample_codes else None
        soft = call.temperature if random and self.straight_through else None
        if drawn is None and soft is None and call.topk is None and codes.dim() == 3:
            return nearest(x, codes, metric, gradient, variance, call.mask)
        return in_pieces(
            x, codes, metric, gradient, variance, call.mask, topk=call.topk, drawn=drawn, soft=soft
        )

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: Weight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        """Quantise ``x``, and while training let the codebook follow.

        Args:
            x: ``(B, L, dim)`` or ``(B, dim)``; ``(B, dim, L)``, ``(B, dim, H, W)`` or
                ``(B, dim, T, H, W)`` if the module was made for that. float16, bfloat16, float32
                or float64.
            indices: of codes to be predicted, as returned: the result is ``(codes, loss)``, the
                codes before ``project_out`` and the cross entropy of minus the distances.
            mask: ``(B, L)``, bool; where it is False the output is 0 or the input, the index -1,
                and nothing counts. lens: ``(B,)``, the same by lengths.
            topk: the k nearest codes, nearest first: outputs (B, L, k, dim), indices and loss
                (B, L, k). The codebook stays.
            sample_codebook_temp, freeze_codebook, ema_update: instead of the module's.
            return_loss_breakdown: add a :class:`LossBreakdown`.
            codebook_transform_fn: codes (H, B, L, K, D) from the codebook (H, K, D).
            ema_update_weight: of each code's new averages, ``(K,)`` or ``(H, K)``, or a function
                of the batch's sums and counts.
            accum_ema_update: keep this batch's statistics for the next update.

        Returns:
            ``(quantized, indices, loss)``: x's shape and dtype; ``(B, L)`` or the shape of the
            positions, with heads ``(B, L, H)``, int64; ``()``, 0 in eval mode.

        Raises:
            ValueError: shapes or options do not fit.
            RuntimeError: compiling with a codebook that is not initialised; or the codebook would
                move where activation checkpointing repeats the forward.
        """
        self._check_call(x, mask, lens, topk)
        vectors, sizes = self._vectors(x)
        batch, length = x.shape[0], math.prod(sizes)
        if lens is not None:
            mask = mask_of_lens(lens, length)
        call = _Call(
            None if mask is None else self._heads.spread(mask),
            None if topk is None else min(int(topk), self.codebook_size),
            self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp,
            self.freeze_codebook if freeze_codebook is None else freeze_codebook,
            codebook_transform_fn,
            batch,
            length,
        )
        if self._moves(call, ema_update):
            check_not_repeated()
        routed = self.training and x.requires_grad and self.route_gradients_to_input
        with without_autocast(x.device.type):
            self._codebook.ensure_initialised(vectors, call.mask)
            if self._codebook.affine_param:
                self._codebook.update_affine(vectors, self._codebook.plain_embed, call.mask)
            update = functools.partial(
                self._codebook.update_,
                weight=ema_update_weight,
                accumulate=accum_ema_update,
                ema_update=ema_update,
            )
            codes, chosen, optimised = self._quantize(vectors, call, routed, update)
            if indices is not None:
                target = self._rows_of(indices)
                loss = similarity.cross_entropy(vectors, codes, target, self._codebook.metric)
                grouped = self._heads.grouped(chosen.quantized, batch, length)
                return grouped if self.heads > 1 else grouped[0], loss
            loss, breakdown = self._loss(vectors, codes, chosen, call, optimised)
        quantized = self.project_out(self._heads.join(chosen.quantized, batch, length))
        index = self._heads.join_indices(chosen.indices, batch, length)
        if mask is not None:
            padding, _ = self._layout.tokens(x)
            if self.return_zeros_for_masked_padding:
                padding = torch.zeros_like(padding)
            padding = padding if topk is None else padding[:, :, None]
            quantized = torch.where(_beside(mask, quantized), quantized, padding)
            index = torch.where(_beside(mask, index), index, -1)
        outputs = (
            self._layout.outputs(quantized, sizes),
            self._layout.positions(index, sizes),
            self._layout.positions(loss, sizes) if loss.dim() else loss,
        )
        return (*outputs, breakdown) if return_loss_breakdown else outputs

    def _moves(self, call: _Call, ema_update: bool | None) -> bool:
        """Whether the forward moves more than it has to initialise."""
        moved = self.in_place_codebook_optimizer is not None or (
            call.topk is None and self._codebook.follows(ema_update)
        )
        return self._codebook.affine_param or (self.training and not call.frozen and moved)

    def _check_call(
        self, x: Tensor, mask: Tensor | None, lens: Tensor | None, topk: int | None
    ) -> None:
        check_floating("x", x)
        masked = mask is not None or lens is not None
        check_possible(
            {
                "mask with lens": mask is not None and lens is not None,
                "mask or lens with images or volumes": masked and self._layout.spatial > 1,
                "mask or lens with one vector per sample": masked and x.dim() == 2,
            }
        )
        if mask is not None:
            check_dtype("mask", mask, (torch.bool,))
            channel_first = self._layout.channel_first
            expected = (x.shape[0], x.shape[2 if channel_first else 1])
            if mask.shape != expected:
                raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
        if topk is None:
            return
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        check_possible(
            {
                "topk with more than one head": self.heads > 1,
                "topk with commitment_use_cross_entropy_loss while training": (
                    self.training and self.commitment_use_cross_entropy_loss
                ),
                "topk with in_place_codebook_optimizer while training": (
                    self.training and self.in_place_codebook_optimizer is not None
                ),
            }
        )
        if self.training and self.straight_through:
            raise NotImplementedError("topk with straight_through while training")

    def _quantize(
        self, x: Tensor, call: _Call, routed: bool, update: Callable[[Tensor, Tensor], None]
    ) -> tuple[Tensor, Chosen, Tensor]:
        """The codes compared with, those chosen, and the in-place optimiser's loss."""
        gradient = self._gradient if routed else "none"
        trained = self.training and not call.frozen
        optimise = trained and self.in_place_codebook_optimizer is not None
        codes = self._effective_codes(call)
        if optimise:
            chosen = self._look_up(x.detach(), codes, call, "none")
        else:
            chosen = self._look_up(x, codes, call, gradient)
        if trained and call.topk is None:
            update(x.detach(), chosen.indices)
        loss = x.new_zeros((), dtype=torch.float32)
        if optimise:
            self._add_gradients(chosen.codebook)
            if not self.manual_in_place_optimizer_update:
                self.update_in_place_optimizer()
            loss = chosen.codebook.detach()
            codes = self._effective_codes(call)
            chosen = self._look_up(x, codes, call, gradient)
        if self.training and self.sync_update_v > 0:
            further = self.sync_update_v * (chosen.quantized - chosen.quantized.detach())
            chosen = chosen._replace(quantized=chosen.quantized + further)
        return codes, chosen, loss

    def _loss(
        self, x: Tensor, codes: Tensor, chosen: Chosen, call: _Call, optimised: Tensor
    ) -> tuple[Tensor, LossBreakdown]:
        """The weighted sum of the losses, and these."""
        metric, layout = self._codebook.metric, (call.batch, call.length)
        loss = commitment = diversity = orthogonal = x.new_zeros((), dtype=torch.float32)
        if self.training and self.has_codebook_diversity_loss:
            own = codes if codes.dim() == 3 else self._heads.grouped(codes, *layout)
            rows = x
            if torch.compiler.is_exporting():
                # The strides of a view are a minimum there, which makes a guard on the length.
                rows = x.clone(memory_format=torch.contiguous_format)
            diversity = similarity.diversity(
                self._heads.grouped(rows, *layout), own, metric, self.codebook_diversity_temperature
            )
            loss = loss + diversity * self.codebook_diversity_loss_weight
        if call.topk is not None and not self.training:
            commitment = chosen.commitment
            if self._codebook.learnable_codebook:
                commitment = commitment + (chosen.codebook - chosen.codebook.detach())
            commitment = self._heads.join_indices(commitment, *layout)
            loss = commitment * self.commitment_weight if self.has_commitment_loss else commitment
        elif self.training and self.has_commitment_loss:
            if self.commitment_use_cross_entropy_loss:
                commitment = similarity.cross_entropy(x, codes, chosen.indices, metric)
            else:
                commitment = chosen.commitment
                if self.learnable_codebook and not call.frozen:
                    commitment = commitment + (chosen.codebook - chosen.codebook.detach())
                if call.topk is not None:
                    commitment = self._heads.join_indices(commitment, *layout)
            loss = loss + commitment * self.commitment_weight
        if self.training and self.has_codebook_orthogonal_loss:
            active = None
            if self.orthogonal_reg_active_codes_only:
                active = losses.active(chosen.indices, self.codebook_size)
            orthogonal = losses.orthogonal(
                self._codebook.plain_embed, active, self.orthogonal_reg_max_codes
            )
            loss = loss + orthogonal * self.orthogonal_reg_weight
        # A loop that calls loss.backward() may train a part that no loss depends on.
        if (
            self.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not loss.requires_grad
        ):
            loss.requires_grad_()
        return loss, LossBreakdown(commitment, diversity, orthogonal, optimised)


def _beside(mask: Tensor, t: Tensor) -> Tensor:
    """``mask`` (B, L) to broadcast with ``t`` (B, L, ...)."""
    return mask.reshape(*mask.shape, *(1,) * (t.dim() - 2))
