"""Lookup-free quantisation as a module."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmfast.checks import INTEGERS, check_codes, check_floating
from mmfast.nn.projections import check_last, projection, random_rotation, soft_clamp
from mmfast.nn.ranks import add_up, several, total_of
from mmfast.ops.lookup_free_quantize import (
    LookupFreeQuantized,
    batch_entropy,
    lookup_free_quantize,
)
from mmfast.results import exportable


@exportable
class LFQReturn(NamedTuple):
    """What :class:`LFQ` returns; ``entropy_aux_loss`` holds the weighted losses."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


@exportable
class LFQLossBreakdown(NamedTuple):
    """The losses of :class:`LFQ`, without their weights."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """Cosine similarities with ``dim_out`` learned directions, times ``scale``."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim_in)`` to ``(..., dim_out)``."""
        directions = functional.normalize(self.weight, dim=0)
        return functional.normalize(x, dim=-1) @ directions * self.scale


class LFQ(nn.Module):
    """The sign of every channel, with entropies as losses; takes the place of
    ``vector_quantize_pytorch.LFQ``: the same arguments, results, methods and state dict.

    The entropies need no table of vectors times codes; they are exact, where the original lets no
    probability count as less than 1e-5 in a logarithm, and with a mask averages nothing for the
    batch's. ``force_quantization_f32`` changes nothing: losses are never computed in less.
    ``codebook`` is made when it is asked for.

    Args:
        dim: channels; by default as many as a code has bits. Else there are projections.
        codebook_size: codes, a power of 2; by default 2^``dim``.
        entropy_loss_weight: of the entropies in the returned loss.
        commitment_loss_weight: of the mean squared difference to the codes.
        diversity_gamma: weight of the batch's entropy, against the vectors'.
        straight_through_activation: what the gradient goes through.
        num_codebooks: how many codes each vector has, side by side.
        keep_num_codebooks_dim: whether indices have a dimension of codebooks; by default where
            there are several.
        codebook_scale: size of the codes' entries.
        frac_per_sample_entropy: of the vectors, the random part that the entropies are of.
        has_projections: by default where ``dim`` is not the number of bits.
        projection_has_bias: of both projections.
        soft_clamp_input_value: bend the input to stay within it.
        cosine_sim_project_in: project in by cosine similarities.
        cosine_sim_project_in_scale: of these; by default ``codebook_scale``.
        channel_first: the channels are dimension 1; by default where there are four or more
            dimensions.
        experimental_softplus_entropy_loss: softplus of the entropy loss plus
            ``entropy_loss_offset``.
        spherical: binary spherical quantisation.
        orthogonal_rotation: quantise in a random rotation.
        entropy_group_bits: of :func:`mmfast.lookup_free_quantize`, for many bits.

    Raises:
        ValueError: arguments do not fit together.

    Source: see :func:`mmfast.lookup_free_quantize`.
    """

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
        entropy_group_bits: int | None = None,
    ) -> None:
        super().__init__()
        if codebook_size is None:
            if dim is None:
                raise ValueError("one of dim and codebook_size must be given")
            codebook_size = 2**dim
        if codebook_size < 2 or codebook_size.bit_count() != 1:
            raise ValueError(f"codebook_size must be a power of 2, got {codebook_size}")
        if not 0 < frac_per_sample_entropy <= 1:
            raise ValueError(
                "frac_per_sample_entropy must be above 0 and at most 1, "
                f"got {frac_per_sample_entropy}"
            )
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(
                f"soft_clamp_input_value must be at least codebook_scale = {codebook_scale}, "
                f"got {soft_clamp_input_value}"
            )
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_size.bit_length() - 1
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = (
            num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        )
        if num_codebooks > 1 and not self.keep_num_codebooks_dim:
            raise ValueError(f"keep_num_codebooks_dim must be True for {num_codebooks} codebooks")
        width = self.codebook_dim * num_codebooks
        self.dim = width if dim is None else dim
        self.has_projections = self.dim != width if has_projections is None else has_projections
        self.project_in: nn.Module
        if cosine_sim_project_in and self.has_projections:
            given = cosine_sim_project_in_scale
            similarity_scale = codebook_scale if given is None else given
            self.project_in = CosineSimLinear(self.dim, width, similarity_scale)
        else:
            self.project_in = projection(self.dim, width, projection_has_bias, self.has_projections)
        self.project_out = projection(width, self.dim, projection_has_bias, self.has_projections)
        self.channel_first = channel_first
        self.activation = straight_through_activation or nn.Identity()
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.orthogonal_rot: Tensor
            self.register_buffer("orthogonal_rot", random_rotation(self.codebook_dim))
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.entropy_group_bits = entropy_group_bits
        self.force_quantization_f32 = force_quantization_f32
        self.mask: Tensor
        self.zero: Tensor
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """All codes before normalisation, ``(K, bits)``."""
        return self._codes(torch.arange(self.codebook_size, device=self.mask.device))

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """0 and 1 to minus and plus ``codebook_scale``."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def _codes(self, indices: Tensor) -> Tensor:
        return self.bits_to_codes((indices[..., None] & self.mask != 0).to(self.dtype))

    def codes_of(self, indices: Tensor) -> Tensor:
        """Codes ``(..., bits)`` of indices ``(...)``, normalised and rotated."""
        codes = self._normalised(self._codes(indices))
        return codes @ self.orthogonal_rot.t() if self.orthogonal_rotation else codes

    def _normalised(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1) * self.codebook_scale if self.spherical else x

    def _is_first(self, dims: int, least: int) -> bool:
        return dims >= least if self.channel_first is None else self.channel_first

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """What ``forward`` made of the vectors with these indices, in its layout."""
        check_codes("indices", indices, self.codebook_size, dtypes=INTEGERS)
        first = self._is_first(indices.dim(), 3 + self.keep_num_codebooks_dim)
        codes = self.codes_of(indices)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        if project_out:
            codes = self.project_out(codes)
        return codes.movedim(-1, 1) if first else codes

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> LFQReturn | tuple[LFQReturn, LFQLossBreakdown]:
        """Quantise ``(B, L, dim)``, or images and videos ``(B, dim, ...)``.

        Args:
            inv_temperature: of the distributions that the entropies are of.
            return_loss_breakdown: return the losses one by one, too.
            mask: ``(B, L)``, or ``(B,)`` of whole samples, bool; vectors where it is False count
                for no loss.

        Returns:
            The quantised vectors in x's shape, int64 indices ``(B, L)`` or ``(B, ...)``, with a
            last dimension of codebooks if it is kept, and the weighted losses, 0 in evaluation.

        Raises:
            ValueError: x does not have ``dim`` channels.
        """
        check_floating("x", x)
        first = self._is_first(x.dim(), 4)
        if first:
            x = x.movedim(1, -1)
        check_last(x, self.dim)
        if self.has_projections:  # calling what does nothing would cost as much as few rows do
            x = self.project_in(x)
        if self.soft_clamp_input_value is not None:
            x = soft_clamp(x, self.soft_clamp_input_value)
        if self.orthogonal_rotation:
            x = x.unflatten(-1, (self.num_codebooks, -1)) @ self.orthogonal_rot
            x = x.flatten(-2)
        if mask is not None:
            if mask.shape == x.shape[:1]:
                mask = mask.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
            mask = mask.reshape(x.shape[:-1])
        wanted = self.training and (
            self.entropy_loss_weight != 0
            or self.commitment_loss_weight > 0
            or return_loss_breakdown
        )
        result = self._quantize(
            x, inv_temperature, self._sampled(x, mask), self.entropy_group_bits if wanted else 0
        )
        losses, aux = LFQLossBreakdown(*[self.zero] * 3), torch.zeros_like(self.zero)
        if wanted:
            losses = self._losses(result, x, mask)
            entropy = losses.per_sample_entropy - self.diversity_gamma * losses.batch_entropy
            if self.experimental_softplus_entropy_loss:
                entropy = functional.softplus(entropy + self.entropy_loss_offset)
            aux = entropy * self.entropy_loss_weight
            aux = aux + losses.commitment * self.commitment_loss_weight
        ret = LFQReturn(*self._outputs(x, result, first), aux)
        return (ret, losses) if return_loss_breakdown else ret

    def _quantize(
        self, x: Tensor, inv_temperature: float, mask: Tensor | None, group_bits: int | None
    ) -> LookupFreeQuantized:
        return lookup_free_quantize(
            x,
            num_codebooks=self.num_codebooks,
            scale=self.codebook_scale,
            spherical=self.spherical,
            inv_temperature=inv_temperature,
            group_bits=group_bits,
            mask=mask,
        )

    def _sampled(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of those vectors that the entropies are of."""
        if not self.training or self.frac_per_sample_entropy == 1:
            return mask
        scores = torch.randn(math.prod(x.shape[:-1]), device=x.device)
        if mask is None:
            rank = scores.argsort()  # of random numbers the order is as random as the ranks
            count = torch.ones_like(rank).sum()
        else:
            rank = torch.where(mask.flatten(), scores, math.inf).argsort().argsort()
            count = mask.sum()
        # A tensor: of a symbol the comparison would make a constant.
        sampled = (count.double() * self.frac_per_sample_entropy).floor()
        return (rank < sampled).view(x.shape[:-1])

    def _losses(
        self, result: LookupFreeQuantized, x: Tensor, mask: Tensor | None
    ) -> LFQLossBreakdown:
        commitment = self.zero
        if self.commitment_loss_weight > 0:
            commitment = result.commitment_loss
            if self.frac_per_sample_entropy != 1:
                commitment = self._quantize(x, 1.0, mask, 1).commitment_loss
        count = x[..., 0].numel() if mask is None else mask.sum()
        means = _mean_of_ranks(result.mean_probabilities, count)
        return LFQLossBreakdown(result.sample_entropy, batch_entropy(means), commitment)

    def _outputs(
        self, x: Tensor, result: LookupFreeQuantized, first: bool
    ) -> tuple[Tensor, Tensor]:
        codes, indices = result.quantized, result.indices
        if not self.training:
            codes = codes.detach()
        elif not isinstance(self.activation, nn.Identity):
            vectors = x.unflatten(-1, (self.num_codebooks, self.codebook_dim))
            active = self.activation(self._normalised(vectors)).flatten(-2)
            codes = codes.detach() + (active - active.detach())
        if self.orthogonal_rotation:
            codes = codes.unflatten(-1, (self.num_codebooks, -1)) @ self.orthogonal_rot.t()
            codes = codes.flatten(-2)
        out = self.project_out(codes) if self.has_projections else codes
        if first:
            out = out.movedim(-1, 1)
        return out, indices if self.keep_num_codebooks_dim else indices.squeeze(-1)


def _mean_of_ranks(t: Tensor, count: int | Tensor) -> Tensor:
    """The mean of ``t`` over the vectors of all ranks, of which this one has ``count``,
    differentiably."""
    if not several():
        return t
    what = "averaging probabilities"
    own = t.new_ones(()) * count
    total = add_up(own.clone(), True, what)
    return total_of(t * (own / total.clamp_min(1)), what)
