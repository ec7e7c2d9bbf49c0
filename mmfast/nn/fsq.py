"""Finite scalar quantisation as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.checks import INTEGERS, check_codes, check_floating
from mmfast.nn.projections import check_last, projection, random_rotation
from mmfast.ops.finite_scalar_quantize import finite_scalar_quantize


class FSQ(nn.Module):
    """Every channel rounded to one of its own few levels; takes the place of
    ``vector_quantize_pytorch.FSQ``: the same arguments, results, methods and state dict.

    Levels are exact and ``quantized`` is rounded once, in any dtype, so that
    ``force_quantization_f32`` and ``allowed_dtypes`` change nothing. ``implicit_codebook`` is made
    when it is asked for.

    Args:
        levels: of the D dimensions of a codebook, each at least 3, or 2 with
            ``preserve_symmetry``.
        dim: channels; by default D * ``num_codebooks``, else there are projections.
        num_codebooks: how many codes each vector has, side by side.
        keep_num_codebooks_dim: whether indices have a dimension of codebooks; by default where
            there are several.
        scale: is kept as an attribute.
        channel_first: the channels are dimension 1, as they are of every input with four or more
            dimensions.
        projection_has_bias: of both projections.
        return_indices: whether ``forward`` returns them; else None.
        preserve_symmetry: evenly spread levels, the op's ``"symmetric"`` variant.
        noise_dropout: probability with which, in training, noise from -1/2 to 1/2 is added to a
            quantised number; needs ``preserve_symmetry``.
        bound_hard_clamp: clamp instead of tanh.
        orthogonal_rotation: quantise in a random rotation.

    Raises:
        ValueError: arguments do not fit together.

    Source: see :func:`mmfast.finite_scalar_quantize`.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(levels, int):
            raise TypeError(f"levels must be ints, one for each channel, got {levels}")
        self.levels = tuple(levels)
        if not self.levels or min(self.levels) < (2 if preserve_symmetry else 3):
            raise ValueError(
                "levels must be at least 3, or 2 with preserve_symmetry=True, "
                f"got {list(self.levels)}"
            )
        if noise_dropout > 0 and not preserve_symmetry:
            raise ValueError("noise_dropout needs preserve_symmetry=True")
        basis = [math.prod(self.levels[:d]) for d in range(len(self.levels))]
        self._levels: Tensor
        self._basis: Tensor
        self.register_buffer(
            "_levels", torch.tensor(self.levels, dtype=torch.int32), persistent=False
        )
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int32), persistent=False)
        self.scale = scale
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.codebook_dim = len(self.levels)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = (
            num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        )
        if num_codebooks > 1 and not self.keep_num_codebooks_dim:
            raise ValueError(f"keep_num_codebooks_dim must be True for {num_codebooks} codebooks")
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.channel_first = channel_first
        self.has_projections = self.dim != self.effective_codebook_dim
        shape = (self.dim, self.effective_codebook_dim)
        self.project_in = projection(*shape, projection_has_bias, self.has_projections)
        self.project_out = projection(*shape[::-1], projection_has_bias, self.has_projections)
        self.return_indices = return_indices
        self.codebook_size = math.prod(self.levels)
        self.allowed_dtypes = allowed_dtypes
        self.force_quantization_f32 = force_quantization_f32
        self.bound_hard_clamp = bound_hard_clamp
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.orthogonal_rot: Tensor
            self.register_buffer("orthogonal_rot", random_rotation(self.codebook_dim))

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes, ``(K, D)``."""
        return self._indices_to_codes(torch.arange(self.codebook_size, device=self._levels.device))

    @property
    def _width(self) -> Tensor:
        """Level l has the value (2 l - width) / width; ``(D,)``."""
        return self._levels - 1 if self.preserve_symmetry else self._levels // 2 * 2

    def bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Quantised values of z ``(..., D)``, by the variant ``"bound"``."""
        return finite_scalar_quantize(z, self.levels, hard_clamp=hard_clamp).quantized

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Quantised values of z ``(..., D)``, by the variant ``"symmetric"``."""
        return finite_scalar_quantize(
            z, self.levels, variant="symmetric", hard_clamp=hard_clamp
        ).quantized

    def quantize(self, z: Tensor) -> Tensor:
        """Quantised values of z ``(..., D)``, without projections, rotation and noise."""
        bound = self.symmetry_preserving_bound if self.preserve_symmetry else self.bound
        return bound(z, hard_clamp=self.bound_hard_clamp)

    def _noise(self, z: Tensor) -> Tensor | None:
        if not self.training or self.noise_dropout == 0:
            return None
        dtype = z.dtype if z.dtype in self.allowed_dtypes else torch.float32
        # New tensors, not like z: where z is strided the numbers would come in another order.
        chosen = z.new_full(z.shape, self.noise_dropout, dtype=dtype).bernoulli_().bool()
        offset = torch.rand(z.shape, dtype=dtype, device=z.device) - 0.5
        return torch.where(chosen, offset, 0)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The levels ``(..., D)`` of codes ``(...)``."""
        return indices[..., None] // self._basis % self._levels

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        return (2 * self.indices_to_level_indices(indices) - self._width) / self._width

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Indices ``(...)``, int32, of quantised values ``(..., D)``."""
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(
                f"zhat must be (..., {self.codebook_dim}), got shape {tuple(zhat.shape)}"
            )
        level = ((zhat + 1) * (self._width / 2)).round().to(torch.int32)
        return (level * self._basis).sum(-1, dtype=torch.int32)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """What ``forward`` made of the vectors with these indices, in its layout."""
        check_codes("indices", indices, self.codebook_size, dtypes=INTEGERS)
        first = indices.dim() >= 3 + self.keep_num_codebooks_dim or self.channel_first
        codes = self._indices_to_codes(indices)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.t()
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        codes = self.project_out(codes)
        return codes.movedim(-1, 1) if first else codes

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantise ``(B, L, dim)``, or images and videos ``(B, dim, ...)``.

        Returns:
            The quantised vectors in z's shape, and int32 indices ``(B, L)`` or ``(B, ...)``, with a
            last dimension of codebooks if it is kept.

        Raises:
            ValueError: z does not have ``dim`` channels.
        """
        check_floating("z", z)
        first = z.dim() >= 4 or self.channel_first
        if first:
            z = z.movedim(1, -1)
        check_last(z, self.dim)
        if self.has_projections:  # calling what does nothing would cost as much as few rows do
            z = self.project_in(z)
        several = self.num_codebooks > 1
        if several:
            z = z.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            z = z @ self.orthogonal_rot
        codes, indices = finite_scalar_quantize(
            z,
            self.levels,
            variant="symmetric" if self.preserve_symmetry else "bound",
            hard_clamp=self.bound_hard_clamp,
            noise=self._noise(z),
        )
        if self.orthogonal_rotation:
            codes = (codes.to(self.orthogonal_rot.dtype) @ self.orthogonal_rot.t()).to(z.dtype)
        out = codes.flatten(-2) if several else codes
        if self.has_projections:
            out = self.project_out(out)
        if first:
            out = out.movedim(-1, 1)
        if not self.return_indices:
            return out, None
        if self.keep_num_codebooks_dim and not several:
            indices = indices[..., None]
        return out, indices
