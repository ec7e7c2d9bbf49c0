"""Running means and variances that carry a codebook to where the vectors are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.nn.ranks import add_up, several
from mmfast.regions import without_gradients

_LEAST_VARIANCE = 1e-5
_WHAT = "adding up moments of vectors"


class Affine(nn.Module):
    """Base of a codebook with affine parameters: H codebooks of D dimensions.

    The running statistics are buffers of ``(H, 1, D)`` each. The batch's are None until the first
    batch, as the peer's checkpoints have it.

    Source: Huh et al., "Straightening Out the Straight-Through Estimator" (2023), sec. 4.1.
    """

    batch_mean: Tensor | None
    batch_variance: Tensor | None
    codebook_mean: Tensor
    codebook_variance: Tensor
    codebook_mean_needs_init: Tensor
    codebook_variance_needs_init: Tensor

    def register_affine(
        self, shape: tuple[int, ...], sync: bool, batch_decay: float, codebook_decay: float
    ) -> None:
        """Add the statistics, of ``shape`` (H, 1, D), and how fast they move."""
        self.affine_param = True
        self.sync_affine_param = sync
        self.affine_param_batch_decay = batch_decay
        self.affine_param_codebook_decay = codebook_decay
        self.register_buffer("batch_mean", None)
        self.register_buffer("batch_variance", None)
        self.register_buffer("codebook_mean_needs_init", torch.tensor(True))
        self.register_buffer("codebook_mean", torch.zeros(shape))
        self.register_buffer("codebook_variance_needs_init", torch.tensor(True))
        self.register_buffer("codebook_variance", torch.ones(shape))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("batch_mean", "batch_variance"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(self.codebook_mean))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @without_gradients
    def update_affine(self, x: Tensor, embed: Tensor, mask: Tensor | None = None) -> None:
        """Let the averages follow the vectors ``x`` (H, N, D), where ``mask`` (H, N) is True,
        and, while training, the codes ``embed`` (H, K, D). What is not finite moves nothing."""
        if self.training:
            variance, mean = torch.var_mean(embed.float(), 1, keepdim=True, correction=0)
            for name, new in (("codebook_mean", mean), ("codebook_variance", variance)):
                first = getattr(self, name + "_needs_init")
                self._follow(name, new, self.affine_param_codebook_decay, first)
                first.fill_(False)
        mean, variance = self._moments(x.float(), mask)
        self._follow("batch_mean", mean, self.affine_param_batch_decay)
        self._follow("batch_variance", variance, self.affine_param_batch_decay)

    def _moments(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance (H, 1, D) over the vectors, of all processes where these are
        synchronised; NaN if there are none."""
        weight = x.new_ones(*x.shape[:2], 1) if mask is None else mask[:, :, None].to(x.dtype)
        sync = self.sync_affine_param and several()
        count = add_up(weight.sum(1, keepdim=True), sync, _WHAT)
        if mask is not None:
            x = torch.where(mask[:, :, None], x, 0)
        mean = add_up(x.sum(1, keepdim=True), sync, _WHAT) / count
        squares = ((x - mean).square() * weight).sum(1, keepdim=True)
        return mean, add_up(squares, sync, _WHAT) / count

    def _follow(self, name: str, new: Tensor, decay: float, first: Tensor | None = None) -> None:
        old = getattr(self, name)
        if old is None:
            # An empty first batch says nothing: no change of scale.
            neutral = 0.0 if name.endswith("mean") else 1.0
            setattr(self, name, new.nan_to_num(neutral, neutral, neutral))
            return
        moved = old * decay + new * (1 - decay)
        if first is not None:
            moved = torch.where(first, new, moved)
        old.copy_(torch.where(moved.isfinite(), moved, old))

    def _moments_of_both(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the codebook, then of the batch."""
        assert self.batch_mean is not None
        assert self.batch_variance is not None
        codebook, batch = (
            variance.clamp_min(_LEAST_VARIANCE).sqrt()
            for variance in (self.codebook_variance, self.batch_variance)
        )
        return self.codebook_mean, codebook, self.batch_mean, batch

    def carried(self, embed: Tensor) -> Tensor:
        """Codes ``embed`` (H, K, D) where the vectors are."""
        codebook_mean, codebook, batch_mean, batch = self._moments_of_both()
        return (embed - codebook_mean) * (batch / codebook) + batch_mean

    def carried_back(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Sums ``(H, K, D)`` of ``counts`` (H, K) vectors each, as if of vectors where the
        codebook is."""
        codebook_mean, codebook, batch_mean, batch = self._moments_of_both()
        ratio = codebook / batch
        return sums * ratio + counts[:, :, None] * (codebook_mean - batch_mean * ratio)
