"""vector_quantize_pytorch: the lookup and the moving averages of ``VectorQuantize``.

Two methods of its ``Codebook`` are replaced, and ``VectorQuantize.forward`` sends the calls that
need the distances past them. The rest of the library runs as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations.binding import Library, Method, Swap, loaded_class, on_own_code

_PACKAGE = "vector_quantize_pytorch"
_MODULE = f"{_PACKAGE}.vector_quantize_pytorch"

# Quantisers of the library that stay as they are: their modules, and why.
_OTHERS = {
    "FSQ": ("finite_scalar_quantization", "rounds: looks no codes up"),
    "LFQ": ("lookup_free_quantization", "takes signs: looks no codes up"),
    "EvoLFQ": ("evo_lookup_free_quantization", "takes signs: looks no codes up"),
    "LatentQuantize": ("latent_quantization", "looks values up one dimension at a time"),
    "FSP": ("finite_scalar_perturbation", "perturbs: looks no codes up"),
    "BinaryMapper": ("binary_mapper", "draws bits: looks no codes up"),
    "SimVQ": ("sim_vq", "its lookup is not covered"),
}

Weight = Tensor | Callable[..., Any] | None


def _reason(module: nn.Module) -> str | None:
    """Why ``module`` is a quantiser that stays as it is; None if it is none of these."""
    for name, (file, reason) in _OTHERS.items():
        if isinstance(module, loaded_class(f"{_PACKAGE}.{file}", name)):
            return reason
    return None


def matches(module: nn.Module) -> bool:
    found = isinstance(module, loaded_class(_MODULE, "VectorQuantize"))
    return found or _reason(module) is not None


def swap(module: Any) -> Swap:
    reason = _reason(module)
    if reason is not None:
        return Swap(left=reason)
    outer, inner = loaded_class(_MODULE, "VectorQuantize"), loaded_class(_MODULE, "Codebook")
    codebook: Any = module._codebook
    if not issubclass(type(codebook), inner):
        return Swap(left=f"its codebook is of class {type(codebook).__name__}, expected Codebook")
    sample = codebook.gumbel_sample
    if not isinstance(sample, functools.partial) or sample.func.__module__ != _MODULE:
        return Swap(left="its codes are drawn by a function that is not the library's")
    # Without weights nobody can say yet.
    initialised = not codebook.initted.is_meta and bool(codebook.initted)
    left = ["calls with indices, topk or codebook_transform_fn"]
    if _distances_train(module):
        left.append("training, whose loss takes all N x K distances")
    elif _samples(codebook, training=True, temperature=codebook.sample_codebook_temp):
        left.append("training, which samples codes by all N x K distances")
    if not initialised:
        left.append("the first call, which initialises the codes")
    averages = codebook.ema_update or codebook.has_dead_code_replacement
    done = "lookup and moving averages" if averages else "lookup"
    methods = (
        Method(module, outer, VectorQuantize.forward),
        Method(codebook, inner, Codebook.forward if initialised else FirstCall.forward),
        Method(codebook, inner, Codebook.track_cluster_size_and_embed_avg),
    )
    return Swap(methods, done, left="; ".join(left))


def _distances_train(quantizer: Any) -> bool:
    """Whether the training loss takes the distances."""
    entropy = quantizer.has_commitment_loss and quantizer.commitment_use_cross_entropy_loss
    return entropy or quantizer.has_codebook_diversity_loss


def _samples(codebook: Any, training: bool, temperature: float) -> bool:
    """Whether more than the nearest code is asked for: a random one, or a gradient to all."""
    options = codebook.gumbel_sample.keywords
    soft = options.get("stochastic", False) or options.get("straight_through", False)
    return training and temperature > 0 and soft


class VectorQuantize:
    """What takes the place of ``VectorQuantize``'s method."""

    def forward(
        self: Any, x: Tensor, indices: Tensor | None = None, *args: Any, **options: Any
    ) -> Any:
        """The library's own, with the library's codebook where the distances are needed."""
        if indices is not None or (self.training and _distances_train(self)):
            self = on_own_code(self)
        return type(self).forward(self, x, indices, *args, **options)


class Codebook:
    """What takes the place of ``Codebook``'s methods."""

    @torch.autocast("cuda", enabled=False)
    def forward(
        self: Any,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Callable[..., Any] | None = None,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and indices of x, (B, L, D) or (H, B, L, D), and NaN for the distances.

        ``VectorQuantize`` looks at the distances only in calls that do not come here.
        """
        temperature = sample_codebook_temp
        if temperature is None:
            temperature = self.sample_codebook_temp
        if (
            topk is not None
            or codebook_transform_fn is not None
            or _samples(self, self.training, temperature)
        ):
            return type(self).forward(
                self, x, sample_codebook_temp, mask, freeze_codebook, codebook_transform_fn,
                ema_update_weight, accum_ema_update, ema_update, topk, update_usage,
            )  # fmt: skip
        single = x.dim() < 4
        x = x.float()
        vectors = (x[None] if single else x).flatten(1, -2)  # [H, N, D]
        if mask is not None:  # [B, L], for each of the heads that share a codebook
            per_codebook = vectors.shape[1] // mask.numel()
            rows = mask[:, None].expand(-1, per_codebook, -1).reshape(1, -1)
            mask = rows.expand(vectors.shape[0], -1)  # [H, N]
        codes = _codes(self, vectors, mask)  # [H, K, D]
        metric = "dot" if self.use_cosine_sim else "euclidean"  # the norms are 1 already
        indices, _ = mmfast.nearest_code(vectors, codes, metric=metric)  # [H, N]
        quantized = _at(codes, indices)
        if self.training and update_usage and not freeze_codebook:
            self.update_codebook(
                vectors,
                indices,
                mask=mask,
                ema_update_weight=ema_update_weight,
                accum_ema_update=accum_ema_update,
                ema_update=ema_update,
            )
        quantized = quantized.view(x.shape)
        distances = x.new_full((), torch.nan).expand(
            vectors.shape[0], *x.shape[(0 if single else 1) : -1], codes.shape[1]
        )
        return quantized, indices.view(x.shape[:-1]), distances

    def track_cluster_size_and_embed_avg(
        self: Any,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
    ) -> None:
        """Moving averages of the counts and sums of vectors (H, N, D).

        ``embed_onehot``: indices (H, N) when :meth:`forward` calls, one-hot (H, N, K) when the
        library's own code does.
        """
        if embed_onehot.dim() == 3:
            return type(self).track_cluster_size_and_embed_avg(
                self, flatten, embed_onehot, mask, ema_update_weight, accum_ema_update
            )
        from vector_quantize_pytorch.vector_quantize_pytorch import accum_grad_, ema_inplace

        indices = embed_onehot
        if mask is not None:
            indices = indices.masked_fill(~mask, -1)  # left out of the statistics
        if self.affine_param:
            scale, mean = _affine(self)
            flatten = (flatten - self.batch_mean) / scale + mean
        counts, sums = mmfast.code_statistics(flatten, indices, self.codebook_size)
        self.all_reduce_fn(counts)
        self.all_reduce_fn(sums)
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(sums, counts)
        for average, new in ((self.cluster_size, counts), (self.embed_avg, sums)):
            if accum_ema_update:
                accum_grad_(average, new)
            else:
                ema_inplace(average, new, self.decay, ema_update_weight)
        return None


class FirstCall:
    """What takes the place of the ``forward`` of a ``Codebook`` whose codes are not there yet."""

    @functools.wraps(Codebook.forward)
    def forward(self: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The library's own, which initialises the codes; :class:`Codebook` from then on."""
        self.forward = MethodType(Codebook.forward, self)
        return type(self).forward(self, *args, **options)


def _codes(codebook: Any, vectors: Tensor, mask: Tensor | None) -> Tensor:
    """The codes (H, K, D) as the lookup sees them, after the codebook's affine map or bridge."""
    if codebook.affine_param:
        codebook.update_affine(vectors, codebook.embed, mask=mask)
    codes = codebook.embed if codebook.learnable_codebook else codebook.embed.detach()
    codes = codes.to(vectors.dtype)
    if codebook.vq_bridge is not None:
        codes = codebook.vq_bridge(codes)
    if codebook.affine_param:
        scale, mean = _affine(codebook)
        codes = (codes - mean) * scale + codebook.batch_mean
    return codes


def _affine(codebook: Any) -> tuple[Tensor, Tensor]:
    """Spread of the batch over that of the codebook, and the codebook's mean, each (H, 1, D)."""
    batch, codes = (
        variance.clamp(min=1e-5).sqrt()
        for variance in (codebook.batch_variance, codebook.codebook_variance)
    )
    return batch / codes, codebook.codebook_mean


def _at(codes: Tensor, indices: Tensor) -> Tensor:
    """Codes (H, N, D) out of (H, K, D) at indices (H, N)."""
    heads, num_codes, _ = codes.shape
    first = torch.arange(0, heads * num_codes, num_codes, device=codes.device)
    return nn.functional.embedding(indices + first[:, None], codes.flatten(0, 1))


LIBRARY = Library(_PACKAGE, ("VectorQuantize",), matches, swap)
