"""Residual lookup-free quantisation: each stage quantises what the stages before left."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.checks import check_codes, check_floating
from mmfast.nn import quantize_dropout as dropout
from mmfast.nn.grouped_residual import GroupedResidual
from mmfast.nn.lfq import LFQ
from mmfast.nn.projections import check_last, check_stages, projection
from mmfast.nn.residual_codes import with_all_stages, without_dropped


class ResidualLFQ(nn.Module):
    """Stages of :class:`mmfast.nn.LFQ` of ever smaller scales; takes the place of
    ``vector_quantize_pytorch.ResidualLFQ``: the same arguments, results and state dict.

    The codes of ``get_codes_from_indices`` sum to what ``forward`` quantised to, normalisation and
    rotation included.

    Args:
        dim: channels; where a code does not have as many bits there are projections.
        num_quantizers: Q.
        codebook_size: codes of a stage, a power of 2.
        quantize_dropout: in training, use only as many stages as a draw says.
        quantize_dropout_cutoff_index: the stages up to it are always used.
        quantize_dropout_multiple_of: so many stages come and go together.
        soft_clamp_input_value: of the first stage; halved from stage to stage.
        channel_first: the channels are dimension 1; by default where there are four or more
            dimensions.
        **kwargs: of every stage, but for ``num_codebooks`` and ``has_projections``.

    Raises:
        ValueError: arguments do not fit together.

    Source: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec" (2021), algorithm 1;
    Yu et al., "Language Model Beats Diffusion -- Tokenizer is Key to Visual Generation" (2023).
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_stages(kwargs, {"num_codebooks": (1,), "has_projections": (False, None)})
        bits = codebook_size.bit_length() - 1
        self.has_projections = bits != dim
        self.project_in = projection(dim, bits, True, self.has_projections)
        self.project_out = projection(bits, dim, True, self.has_projections)
        self.dim = dim
        self.channel_first = channel_first
        self.num_quantizers = num_quantizers
        layers = []
        for stage in range(num_quantizers):
            scale = 2.0**-stage
            clamp = None if soft_clamp_input_value is None else soft_clamp_input_value * scale
            layers.append(
                LFQ(
                    dim=bits,
                    codebook_size=codebook_size,
                    codebook_scale=scale,
                    soft_clamp_input_value=clamp,
                    channel_first=False,
                    **kwargs,
                )
            )
        self.layers: Any = nn.ModuleList(layers)
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        dropout.check_dropout(
            self.quantize_dropout,
            num_quantizers,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of

    @property
    def codebooks(self) -> Tensor:
        """The stages' codes before normalisation, ``(Q, K, bits)``."""
        return torch.stack([layer.codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The stages' codes ``(Q, B, ..., bits)``; zero where an index is -1.

        Args:
            indices: ``(B, ..., Q)``, or of fewer stages with quantize dropout.

        Raises:
            ValueError: they are of too many stages, or of too few.
        """
        indices = with_all_stages(indices, self.num_quantizers, self.quantize_dropout)
        check_codes("indices", indices, self.layers[0].codebook_size, least=-1)
        codes = []
        for stage, layer in enumerate(self.layers):
            index = indices[..., stage]
            codes.append(without_dropped(layer.codes_of(index.clamp_min(0)), index))
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` made of the vectors with these indices, ``(B, ..., dim)``."""
        return self.project_out(self.get_codes_from_indices(indices).sum(0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise ``(B, L, dim)``, or ``(B, dim, ...)`` where channels are first.

        Args:
            mask: ``(B, L)``, bool; vectors where it is False count for no loss.
            return_all_codes: return the stages' codes, too.
            rand_quantize_dropout_fixed_seed: of the draw of quantize dropout.

        Returns:
            The quantised vectors in x's shape, indices ``(B, ..., Q)``, -1 for stages left out,
            losses ``(Q,)``; and codes ``(Q, B, ..., bits)``.

        Raises:
            ValueError: x does not have ``dim`` channels.
        """
        check_floating("x", x)
        first = x.dim() >= 4 if self.channel_first is None else self.channel_first
        if first:
            x = x.movedim(1, -1)
        check_last(x, self.dim)
        shape = x.shape
        residual = self.project_in(x.reshape(shape[0], math.prod(shape[1:-1]), self.dim))
        if mask is not None:
            mask = mask.reshape(residual.shape[:-1])
        num_stages: int | Tensor = self.num_quantizers
        if self.training and self.quantize_dropout and torch.is_grad_enabled():
            num_stages = dropout.draw_num_stages(
                rand_quantize_dropout_fixed_seed,
                self.num_quantizers,
                self.quantize_dropout_cutoff_index,
                self.quantize_dropout_multiple_of,
                x.device,
            )
        out = torch.zeros_like(residual)
        indices, losses = [], []
        for stage, layer in enumerate(self.layers):
            if dropout.is_dropped(stage, num_stages):
                break
            quantized, index, loss = dropout.undo_dropped(
                stage, num_stages, *layer(residual, mask=mask)
            )
            residual = residual - quantized.detach()
            out = out + quantized
            indices.append(index)
            losses.append(loss)
        all_indices, all_losses = dropout.stack_stages(self.num_quantizers, indices, losses)
        all_indices = all_indices.view(*shape[:-1], *all_indices.shape[2:])
        out = self.project_out(out).view(shape)
        if first:
            out = out.movedim(-1, 1)
        if not return_all_codes:
            return out, all_indices, all_losses
        return out, all_indices, all_losses, self.get_codes_from_indices(all_indices)


class GroupedResidualLFQ(GroupedResidual):
    """:class:`ResidualLFQ` on each of ``groups`` parts of the channels; takes the place of
    ``vector_quantize_pytorch.GroupedResidualLFQ``.

    Args:
        dim: channels, a multiple of ``groups``.
        groups: G.
        accept_image_fmap: the channels are dimension 1.
        **kwargs: of every group.

    Raises:
        ValueError: arguments do not fit together.
    """

    def __init__(
        self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any
    ) -> None:
        if accept_image_fmap:
            kwargs.setdefault("channel_first", True)
        super().__init__(
            dim, groups, accept_image_fmap, lambda width: ResidualLFQ(dim=width, **kwargs)
        )

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The vectors ``(B, ..., dim)`` with these indices; channels are last, of images too."""
        pairs = zip(self.rvqs, indices, strict=True)
        return torch.cat([rvq.get_output_from_indices(index) for rvq, index in pairs], -1)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False
    ) -> tuple[Any, ...]:
        """As :meth:`ResidualLFQ.forward`. Indices and losses have a first
        dimension of groups, codes are a tuple of the groups'."""
        return self._each(x, mask, return_all_codes)
