"""Stages of vector quantisation, each quantising what the ones before it left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast.checks import check_dtype, check_floating, check_least
from mmfast.nn.beam_search import Candidates, beam_search
from mmfast.nn.checkpointing import check_not_repeated
from mmfast.nn.implicit_codebook import Chosen, ImplicitCodebook
from mmfast.nn.losses import passed
from mmfast.nn.quantize_dropout import (
    check_dropout,
    draw_num_stages,
    is_dropped,
    restore,
    stack_stages,
    state_before,
    undo_dropped,
)
from mmfast.nn.residual_codes import codes_at, with_all_stages, without_dropped
from mmfast.nn.vector_quantize import VectorQuantize
from mmfast.ops.residual_quantize import residual_quantize

_NOISE_VARIANCE = 5e-3  # of DiVeQ's direction

# What an implicit codebook cannot serve: all K codes of every vector are made in pieces only, and
# the gradient of a stage's codes runs through the stages before it.
_NOT_WITH_IMPLICIT = (
    "stochastic_sample_codes",
    "straight_through",
    "commitment_use_cross_entropy_loss",
    "codebook_diversity_loss_weight",
    "threshold_ema_dead_code",
    "in_place_codebook_optimizer",
)


class ResidualVQ(nn.Module):
    """Residual quantisation with Q stages of :class:`VectorQuantize`.

    Takes the place of ``vector_quantize_pytorch.ResidualVQ`` (1.32): arguments, results, state
    dict, and from the same seed the same parameters.

    ``torch.compile(fullgraph=True)`` takes the forward without a break. With quantize dropout all
    stages then run, and those left out are undone: the device draws their number. Eager, they do
    not run, and one number is drawn on the host, which with several processes waits for the
    device. All processes drop the same stages.

    With an implicit codebook all K codes of every vector are made in pieces and without gradient;
    only the nearest of each is made again with one.

    Where it differs from its model:

    - images, given indices, and ``freeze_codebook`` of the constructor work; an image's indices
      are (B, height, width, Q);
    - each stage's cross-entropy is that of what the earlier stages left over;
    - a beam search moves the codebooks of all stages, not the first one's alone, and none that
      is frozen; its diversity loss is that of the batch, and not of each vector's beams;
    - a shared codebook that learns by an in-place optimizer takes its step, and its dead codes
      are replaced by vectors of all samples, masked ones left out;
    - ``diveq`` adds no noise in eval mode.

    Args:
        dim: of the vectors.
        num_quantizers: Q; the length of codebook_size if None.
        codebook_size: K, or a tuple of each stage's.
        codebook_dim: D, of the codes; vectors are projected if it is not ``dim``.
        shared_codebook: all stages have the same codebook, which moves once a step.
        diveq: learn codebooks by gradients through the directional reparametrisation of the sum
            of codes. Only training adds its noise.
        heads: 1.
        quantize_dropout: each training batch uses a random number of the first stages.
        quantize_dropout_cutoff_index: the last stage that is always used.
        quantize_dropout_multiple_of: the number of stages used is a multiple of this, or Q.
        accept_image_fmap: vectors are ``(B, dim, height, width)`` instead of ``(B, L, dim)``.
        implicit_neural_codebook: codes of later stages depend on the sum of the earlier ones
            (:class:`mmfast.nn.implicit_codebook.ImplicitCodebook`).
        mlp_kwargs: of its networks: dim_hidden, depth.
        beam_size: keep this many choices of codes while searching for the best one.
        eval_beam_size: that outside training; beam_size if None.
        beam_score_quantizer_weights: of each stage's loss in the search; 1 if None.
        quant_grad_frac: how much of a stage's gradient reaches the stages before it, 0 to 1.
        return_zeros_for_masked_padding: vectors where the mask is False become 0, else they
            pass unchanged.
        vq_kwargs: for :class:`VectorQuantize`.

    Raises:
        ValueError: arguments that are out of range or contradict each other.
        NotImplementedError: an implicit codebook together with beam search, sampling, dead codes,
            an in-place optimizer, or the losses that compare with all codes.

    Source: Zeghidour et al., "SoundStream" (2021), algorithm 1, and for the dropout sec. 3.3.
    """

    beam_score_weights: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | Sequence[int],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: Mapping[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads must be 1 in a residual quantiser, got {heads}")
        sizes = _sizes(codebook_size, num_quantizers)
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size must be one number if shared_codebook, got {sizes}")
        if eval_beam_size is not None and beam_size is None:
            raise ValueError(f"eval_beam_size {eval_beam_size} needs a beam_size, got None")
        for name in ("accept_3d_fmap", "channel_last"):
            if name in vq_kwargs:
                raise ValueError(f"{name} is not an option of a residual quantiser")
        if implicit_neural_codebook:
            _check_implicit(beam_size, vq_kwargs)
            vq_kwargs |= {"learnable_codebook": True, "ema_update": False}
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        if diveq:
            vq_kwargs |= {
                "ema_update": False,
                "learnable_codebook": True,
                "route_gradients_to_input": False,
                "commitment_weight": 0.0,
            }
        self.dim = dim
        self.num_quantizers = len(sizes)
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.codebook_sizes = sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.accept_image_fmap = accept_image_fmap
        self.implicit_neural_codebook = implicit_neural_codebook
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        check_dropout(
            self.quantize_dropout,
            len(sizes),
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of

        self.has_projections = self.codebook_dim != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, self.codebook_dim)
            self.project_out = nn.Linear(self.codebook_dim, dim)
        self.layers = nn.ModuleList(
            VectorQuantize(
                dim=self.codebook_dim,
                codebook_size=size,
                codebook_dim=self.codebook_dim,
                accept_image_fmap=accept_image_fmap,
                return_zeros_for_masked_padding=return_zeros_for_masked_padding,
                **vq_kwargs,
            )
            for size in sizes
        )
        weights = beam_score_quantizer_weights or [1.0] * len(sizes)
        if len(weights) != len(sizes):
            raise ValueError(
                f"beam_score_quantizer_weights must be one for each of {len(sizes)} stages, "
                f"got {len(weights)}"
            )
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        self.mlps: nn.ModuleList | None = None
        if implicit_neural_codebook:
            self.mlps = nn.ModuleList(
                ImplicitCodebook(dim=self.codebook_dim, **(mlp_kwargs or {}))
                for _ in range(len(sizes) - 1)
            )
        if shared_codebook:
            for layer in self._stages[1:]:
                layer._codebook = self._stages[0]._codebook

    @property
    def _stages(self) -> list[VectorQuantize]:
        return cast(list[VectorQuantize], list(self.layers))

    @property
    def codebook_size(self) -> int:
        """K, of the first stage."""
        return self._stages[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """``(Q, K, D)``, or a tuple of ``(K, D)`` if their sizes differ."""
        codebooks = tuple(layer._codebook.plain_embed[0] for layer in self._stages)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes ``(Q, ..., D)`` of each stage at ``indices`` (..., Q), zero where they are -1.

        Raises:
            ValueError: indices are of more than Q stages, or of fewer without quantize_dropout.
        """
        indices = with_all_stages(indices, self.num_quantizers, self.quantize_dropout)
        all_codes: list[Tensor] = []
        total: Tensor | None = None
        for stage, (layer, index) in enumerate(zip(self._stages, indices.unbind(-1), strict=True)):
            codes = codes_at(layer._codebook.plain_embed[0], index)
            if self.mlps is not None and total is not None:
                codes = self.mlps[stage - 1](codes, condition=total)
            codes = without_dropped(codes, index)
            total = codes if total is None else total + codes
            all_codes.append(codes)
        return torch.stack(all_codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum over the stages of :meth:`get_codes_from_indices`, projected: (..., dim)."""
        return self.project_out(self.get_codes_from_indices(indices).sum(0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise ``x``: (B, L, dim), (B, dim), or (B, dim, height, width) of images.

        Args:
            mask: ``(B, L)``, bool; vectors where it is False get index -1 and count for nothing.
            indices: ``(B, L, Q)``; return the cross-entropy of each stage's similarities with
                them, and use all stages.
            return_all_codes: also return what :meth:`get_codes_from_indices` gives.
            sample_codebook_temp: of sampling codes, if that is on.
            freeze_codebook: leave the codebooks as they are; as constructed if None.
            beam_size: instead of the constructed one.
            rand_quantize_dropout_fixed_seed: of the number of stages that a training batch uses;
                a ``()`` int64 tensor is never read back to the host.

        Returns:
            Quantised vectors of x's shape; indices ``(B, L, Q)``, ``(B, Q)`` or
            ``(B, height, width, Q)``, int64, -1 for stages not used; losses ``(Q,)``; and the
            codes if asked for. If indices are given: quantised vectors and the loss ``()``.

        Raises:
            TypeError: mask is not bool.
            ValueError: shapes do not fit, or given indices are -1, which is not looked for while
                tracing.
            NotImplementedError: given indices with beam search or an implicit codebook; beam
                search with an implicit codebook, or with a number of stages on the device.
        """
        self._check(x, mask)
        width = beam_size
        if width is None:
            width = self.beam_size if self.training else self.eval_beam_size
        tokens = self.project_in(self._tokens(x))  # [B, L, D]
        call = {
            "mask": mask,
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
        }
        if indices is not None:
            targets = self._targets(indices, x, mask, width)
            total, loss, inputs = self._score(tokens, targets, call)
        else:
            num_stages = self._num_stages(rand_quantize_dropout_fixed_seed, x.device)
            if width is not None and width > 1:
                total, chosen, losses, inputs = self._search(tokens, num_stages, width, call)
            else:
                total, chosen, losses, inputs = self._quantize(tokens, num_stages, call)
        if self.training and self.shared_codebook:
            self._move_shared_codebook(inputs, mask, freeze_codebook)
        if self.diveq and self.training:
            total = passed(tokens, total, "directional", _NOISE_VARIANCE)
        quantized = self.project_out(total)
        if mask is not None:
            padding = torch.zeros_like(x) if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask[:, :, None], quantized, padding)
        quantized = self._positions(quantized, x)
        if self.accept_image_fmap:
            quantized = quantized.movedim(-1, 1)
        if indices is not None:
            return quantized, loss
        chosen = self._positions(chosen, x)
        if not return_all_codes:
            return quantized, chosen, losses
        return quantized, chosen, losses, self.get_codes_from_indices(chosen)

    def _quantize(
        self, x: Tensor, num_stages: int | Tensor, call: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """All stages one after another, each taking the nearest code.

        Returns:
            The sum of the codes (B, L, D) of ``x`` (B, L, D), indices (B, L, Q), losses (Q,), and
            what each stage had to quantise if a shared codebook will move.
        """
        if self._fused_serves(x):
            return self._quantize_fused(x, call["mask"])
        residual, total = x, torch.zeros_like(x)
        all_indices, all_losses, inputs = [], [], []
        keep = self.training and self.shared_codebook
        for stage, layer in enumerate(self._stages):
            if is_dropped(stage, num_stages):
                break
            if keep:
                inputs.append(residual)
            before = state_before(layer, num_stages)
            if self.mlps is None or stage == 0:
                quantized, indices, loss = self._stage(layer, residual, **call)
            else:
                codes = Chosen(cast(ImplicitCodebook, self.mlps[stage - 1]), residual, total)
                quantized, indices, loss = self._stage(
                    layer, residual, codebook_transform_fn=codes, **call
                )
                indices = torch.where(indices < 0, indices, codes.indices)
            restore(before, stage, num_stages)
            quantized, indices, loss = undo_dropped(stage, num_stages, quantized, indices, loss)
            residual = residual - self._passed_on(quantized)
            total = total + quantized
            all_indices.append(indices)
            all_losses.append(loss)
        indices, losses = stack_stages(self.num_quantizers, all_indices, all_losses)
        return total, indices, losses, inputs

    def _fused_serves(self, x: Tensor) -> bool:
        """Whether :func:`mmfast.residual_quantize` gives what the stages would, bit for bit: they
        are plain ones, nothing learns from the call, and nobody listens to it."""
        layers = self._stages
        codebooks = [layer._codebook for layer in layers]
        return (
            self.mlps is None
            and not any(layer.training for layer in layers)
            and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
            and all(
                codebook._ready
                and codebook.metric == "euclidean"
                and codebook.vq_bridge is None
                and not codebook.affine_param
                and not (torch.is_grad_enabled() and codebook.embed.requires_grad)
                and x.dtype == codebook.embed.dtype
                for codebook in codebooks
            )
            and x.dtype in (torch.float32, torch.float64)
        )

    def _quantize_fused(
        self, x: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """:meth:`_quantize` by one op, without the residuals in memory."""
        first, *rest = (layer._codebook.plain_embed[0].detach() for layer in self._stages)
        result = residual_quantize(
            x,
            first if self.shared_codebook else [first, *rest],
            num_quantizers=self.num_quantizers,
            gradient="none",
            mask=mask,
        )
        losses = x.new_zeros(self.num_quantizers, dtype=torch.float32)
        return result.quantized, result.indices, losses, []

    def _search(
        self, x: Tensor, num_stages: int | Tensor, width: int, call: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """As :meth:`_quantize`, keeping the ``width`` best choices of codes after each stage."""
        if self.implicit_neural_codebook:
            raise NotImplementedError("beam search with implicit_neural_codebook is not supported")
        if isinstance(num_stages, Tensor):
            raise NotImplementedError(
                "beam search with quantize_dropout needs the number of stages on the host: not "
                "while tracing, nor with a tensor as rand_quantize_dropout_fixed_seed"
            )
        if self.training and not self._stages[0].has_commitment_loss:
            raise ValueError("beam search while training needs a commitment_weight above 0")
        mask = call["mask"]
        moved = self.training and not self._frozen(call["freeze_codebook"])
        if moved and any(layer._codebook.follows() for layer in self._stages):
            check_not_repeated()

        def candidates(layer: VectorQuantize, residual: Tensor) -> Candidates:
            beams = residual.shape[2]
            spread = None if mask is None else mask.repeat_interleave(beams, 1)
            found = self._stage(
                layer, residual.flatten(1, 2), topk=width, **(call | {"mask": spread})
            )
            return Candidates(*(t.unflatten(1, (-1, beams)) for t in found))

        layers = self._stages[:num_stages]
        path = beam_search(
            x,
            [partial(candidates, layer) for layer in layers],
            self.beam_score_weights,
            width,
            self._passed_on,
        )
        if moved:
            for layer, residual, indices in zip(layers, path.inputs, path.indices, strict=True):
                layer.update_indices(self._arranged(residual), indices, mask=mask)
        if mask is None:
            losses = [loss.sum() / max(loss.numel(), 1) for loss in path.losses]
        else:
            count = mask.sum().clamp_min(1)
            losses = [torch.where(mask, loss, 0).sum() / count for loss in path.losses]
        indices, all_losses = stack_stages(self.num_quantizers, path.indices, losses)
        return path.quantized, indices, all_losses, path.inputs

    def _score(
        self, x: Tensor, targets: Tensor, call: dict[str, Any]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The sum of the nearest codes, the cross-entropy () with ``targets`` (B, L, Q) summed
        over the stages, and what each stage had to quantise."""
        residual, total = x, torch.zeros_like(x)
        loss = torch.zeros((), device=x.device)
        inputs = []
        for layer, target in zip(self._stages, targets.unbind(-1), strict=True):
            inputs.append(residual)
            quantized, cross_entropy = layer(self._arranged(residual), indices=target, **call)
            residual = residual - self._passed_on(quantized)
            total = total + quantized
            loss = loss + cross_entropy
        return total, loss, inputs

    def _stage(
        self, layer: VectorQuantize, x: Tensor, **call: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a stage makes of ``x`` (B, L, D): codes (B, L, ..., D), indices (B, L, ...)."""
        quantized, indices, loss = layer(self._arranged(x), **call)
        if not self.accept_image_fmap:
            return quantized, indices, loss
        loss = loss[:, :, 0] if loss.dim() else loss
        return quantized.movedim(1, -1)[:, :, 0], indices[:, :, 0], loss

    def _arranged(self, x: Tensor) -> Tensor:
        """``x`` (B, L, D) as a stage takes it: (B, D, L, 1) if those are for images."""
        return x.mT[..., None] if self.accept_image_fmap else x

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, L, dim) of the input."""
        if self.accept_image_fmap:
            return x.flatten(2).mT.contiguous()
        return x[:, None] if x.dim() == 2 else x

    def _positions(self, t: Tensor, x: Tensor) -> Tensor:
        """``t`` (B, L, ...) with the positions of the input ``x``."""
        if self.accept_image_fmap:
            return t.unflatten(1, x.shape[2:])
        return t[:, 0] if x.dim() == 2 else t

    def _passed_on(self, quantized: Tensor) -> Tensor:
        """``quantized`` as the next stage's residual sees it."""
        detached = quantized.detach()
        fraction = self.quant_grad_frac
        return detached if fraction <= 0 else torch.lerp(detached, quantized, fraction)

    def _frozen(self, freeze_codebook: bool | None) -> bool:
        return self._stages[0].freeze_codebook if freeze_codebook is None else freeze_codebook

    def _num_stages(self, seed: int | Tensor | None, device: torch.device) -> int | Tensor:
        """How many stages take part in this call."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        return draw_num_stages(
            seed,
            self.num_quantizers,
            self.quantize_dropout_cutoff_index,
            self.quantize_dropout_multiple_of,
            device,
        )

    def _move_shared_codebook(
        self, inputs: list[Tensor], mask: Tensor | None, freeze_codebook: bool | None
    ) -> None:
        """The step of the shared codebook, after all stages have added to its averages."""
        if self._frozen(freeze_codebook):
            return
        first = self._stages[0]
        codebook = first._codebook
        if codebook.ema_update:
            codebook.update_ema()
        first.update_in_place_optimizer()
        if not codebook.replaces_dead_codes:
            return
        pool = codebook.transform_input(torch.stack(inputs)).flatten(0, 2)  # [q B L, D]
        inside = None if mask is None else mask.flatten().repeat(len(inputs))[None]
        codebook.expire_codes_(pool[None], inside)

    def _targets(
        self, indices: Tensor | list[Tensor], x: Tensor, mask: Tensor | None, width: int | None
    ) -> Tensor:
        """Given indices as (B, L, Q), -1 where the mask is False."""
        if self.implicit_neural_codebook or (width is not None and width > 1):
            other = "implicit_neural_codebook" if self.implicit_neural_codebook else "beam search"
            raise NotImplementedError(f"indices together with {other} are not supported")
        if isinstance(indices, list):
            indices = torch.stack(indices)
        lead = (x.shape[0], *x.shape[2:]) if self.accept_image_fmap else x.shape[:-1]
        if indices.shape != (*lead, self.num_quantizers):
            raise ValueError(
                f"indices must have shape {(*lead, self.num_quantizers)}, "
                f"got {tuple(indices.shape)}"
            )
        indices = indices.reshape(x.shape[0], -1, self.num_quantizers)
        dropped = indices < 0
        if mask is not None:
            indices = indices.masked_fill(~mask[:, :, None], -1)
            dropped = dropped & mask[:, :, None]
        if not torch.compiler.is_compiling() and bool(dropped.any()):
            raise ValueError(
                "indices must be those of all stages, as eval mode gives them; got -1, of stages "
                "that quantize dropout left out"
            )
        return indices

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        check_floating("x", x)
        if self.accept_image_fmap:
            expected, fits = f"(B, {self.dim}, height, width)", x.dim() == 4
        else:
            expected, fits = f"(B, L, {self.dim}) or (B, {self.dim})", x.dim() in (2, 3)
        if not fits or x.shape[1 if self.accept_image_fmap else -1] != self.dim:
            raise ValueError(f"x must be {expected}, got shape {tuple(x.shape)}")
        if mask is None:
            return
        if self.accept_image_fmap or x.dim() == 2:
            raise ValueError("mask is for x of shape (B, L, dim) only")
        check_dtype("mask", mask, (torch.bool,))
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask must have shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")


def _sizes(codebook_size: int | Sequence[int], num_quantizers: int | None) -> tuple[int, ...]:
    """The number of codes of each stage."""
    if isinstance(codebook_size, int):
        if num_quantizers is None:
            raise ValueError("num_quantizers must be given if codebook_size is one number")
        check_least(1, num_quantizers=num_quantizers)
        return (codebook_size,) * num_quantizers
    if num_quantizers not in (None, len(codebook_size)):
        raise ValueError(
            f"codebook_size must be of num_quantizers = {num_quantizers} stages, "
            f"got {len(codebook_size)}"
        )
    return tuple(codebook_size)


def _check_implicit(beam_size: int | None, vq_kwargs: Mapping[str, Any]) -> None:
    refused = [name for name in _NOT_WITH_IMPLICIT if vq_kwargs.get(name)]
    refused += ["beam_size"] if beam_size is not None and beam_size > 1 else []
    if refused:
        raise NotImplementedError(
            f"implicit_neural_codebook together with {', '.join(refused)} is not supported"
        )
