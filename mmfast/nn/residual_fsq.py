"""Residual finite scalar quantisation: each stage quantises what the stages before left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmfast.checks import check_codes, check_floating
from mmfast.nn import quantize_dropout as dropout
from mmfast.nn.fsq import FSQ
from mmfast.nn.grouped_residual import GroupedResidual
from mmfast.nn.projections import check_last, check_stages, projection, soft_clamp
from mmfast.nn.residual_codes import with_all_stages, without_dropped


class ResidualFSQ(nn.Module):
    """Stages of :class:`mmfast.nn.FSQ` of ever finer scales; takes the place of
    ``vector_quantize_pytorch.ResidualFSQ``: the same arguments, results and state dict.

    ``get_codes_from_indices`` takes indices as ``forward`` returns them, and its codes sum to what
    ``forward`` quantised to, rotation included. They are int32, also in those steps that leave out
    stages, in which the model's are int64.

    Args:
        levels: of the D dimensions, each at least 2.
        num_quantizers: Q.
        dim: channels; by default D, else there are projections.
        is_channel_first: the channels are dimension 1, and the stages that of the indices.
        quantize_dropout: in training, use only as many stages as a draw says.
        quantize_dropout_cutoff_index: the stages up to it are always used.
        quantize_dropout_multiple_of: so many stages come and go together.
        soft_clamp_input_value: bend the input to stay within it; only without
            ``bound_hard_clamp``, which has a value of its own.
        bound_hard_clamp: of the stages.
        **kwargs: of every stage, but for ``num_codebooks``, ``channel_first`` and
            ``return_indices``.

    Raises:
        ValueError: arguments do not fit together.

    Source: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec" (2021), algorithm 1;
    Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2023).
    """

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_stages(
            kwargs, {"num_codebooks": (1,), "channel_first": (False,), "return_indices": (True,)}
        )
        codebook_dim = len(levels)
        dim = codebook_dim if dim is None else dim
        self.has_projections = codebook_dim != dim
        self.project_in = projection(dim, codebook_dim, True, self.has_projections)
        self.project_out = projection(codebook_dim, dim, True, self.has_projections)
        self.dim = dim
        self.is_channel_first = is_channel_first
        self.num_quantizers = num_quantizers
        self.levels = list(levels)
        layers = [
            FSQ(
                levels=levels,
                dim=codebook_dim,
                preserve_symmetry=True,
                bound_hard_clamp=bound_hard_clamp,
                **kwargs,
            )
            for _ in range(num_quantizers)
        ]
        self.layers: Any = nn.ModuleList(layers)
        self.codebook_size = layers[0].codebook_size
        sizes = torch.tensor(self.levels)
        scales = torch.stack([sizes.float() ** -stage for stage in range(num_quantizers)])
        self.scales: Tensor
        self.register_buffer("scales", scales, persistent=False)
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        dropout.check_dropout(
            self.quantize_dropout,
            num_quantizers,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        if bound_hard_clamp:
            if soft_clamp_input_value is not None:
                raise ValueError("soft_clamp_input_value needs bound_hard_clamp=False")
            soft_clamp_input_value = 1 + 1 / (sizes - 1)
        if soft_clamp_input_value is not None:
            soft_clamp_input_value = torch.as_tensor(soft_clamp_input_value)
        self.soft_clamp_input_value: Tensor | None
        self.register_buffer("soft_clamp_input_value", soft_clamp_input_value, persistent=False)

    @property
    def codebooks(self) -> Tensor:
        """The stages' codes before scaling, ``(Q, K, D)``."""
        return torch.stack([layer.implicit_codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The stages' codes ``(Q, B, ..., D)``; zero where an index is -1.

        Args:
            indices: as ``forward`` returns them; of fewer stages with quantize dropout.

        Raises:
            ValueError: they are of too many stages, or of too few.
        """
        if self.is_channel_first:
            indices = indices.movedim(1, -1)
        indices = with_all_stages(indices, self.num_quantizers, self.quantize_dropout)
        check_codes("indices", indices, self.codebook_size, least=-1)
        codes = []
        for stage, layer in enumerate(self.layers):
            index = indices[..., stage]
            own = layer._indices_to_codes(index.clamp_min(0))
            if layer.orthogonal_rotation:
                own = own @ layer.orthogonal_rot.t()
            codes.append(without_dropped(own * self.scales[stage], index))
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` made of the vectors with these indices, in its layout."""
        out = self.project_out(self.get_codes_from_indices(indices).sum(0))
        return out.movedim(-1, 1) if self.is_channel_first else out

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise ``(B, ..., dim)``, or ``(B, dim, ...)`` with ``is_channel_first``.

        Args:
            return_all_codes: return the stages' codes, too.
            rand_quantize_dropout_fixed_seed: of the draw of quantize dropout.

        Returns:
            The quantised vectors in x's shape, indices ``(B, ..., Q)``, or ``(B, Q, ...)`` with
            ``is_channel_first``, -1 for stages left out; and codes ``(Q, B, ..., D)``.

        Raises:
            ValueError: x does not have ``dim`` channels.
        """
        check_floating("x", x)
        if self.is_channel_first:
            x = x.movedim(1, -1)
        check_last(x, self.dim)
        shape = x.shape
        length = math.prod(shape[1:-1])
        residual = self.project_in(x).reshape(shape[0], length, len(self.levels))
        if self.soft_clamp_input_value is not None:
            residual = soft_clamp(residual, self.soft_clamp_input_value)
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
        indices = []
        for stage, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            if dropout.is_dropped(stage, num_stages):
                break
            quantized, index = layer(residual / scale)
            quantized, index, _ = dropout.undo_dropped(
                stage, num_stages, quantized * scale, index, scale
            )
            residual = residual - quantized.detach()
            out = out + quantized
            indices.append(index)
        missing = (0, self.num_quantizers - len(indices))
        all_indices = functional.pad(torch.stack(indices, -1), missing, value=-1)
        all_indices = all_indices.view(*shape[:-1], *all_indices.shape[2:])
        out = self.project_out(out).view(shape)
        if self.is_channel_first:
            out, all_indices = out.movedim(-1, 1), all_indices.movedim(-1, 1)
        if not return_all_codes:
            return out, all_indices
        return out, all_indices, self.get_codes_from_indices(all_indices)


class GroupedResidualFSQ(GroupedResidual):
    """:class:`ResidualFSQ` on each of ``groups`` parts of the channels; takes the place of
    ``vector_quantize_pytorch.GroupedResidualFSQ``.

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
        kwargs.setdefault("is_channel_first", accept_image_fmap)
        super().__init__(
            dim, groups, accept_image_fmap, lambda width: ResidualFSQ(dim=width, **kwargs)
        )
        self.codebook_size = self.rvqs[0].codebook_size

    def forward(self, x: Tensor, return_all_codes: bool = False) -> tuple[Any, ...]:
        """As :meth:`ResidualFSQ.forward`. Indices have a first
        dimension of groups, codes are a tuple of the groups'."""
        return self._each(x, return_all_codes)
