"""taming-transformers' ``VectorQuantizer`` and ``VectorQuantizer2``, and LlamaGen's.

Neither is a package, and many projects carry a copy of the file, often a changed one. A copy is
known by its class's name and attributes, and trusted only after ``rehearsal`` found no difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations import vqgan
from mmfast.integrations.binding import Library, Method, Swap, own_class
from mmfast.integrations.rehearsal import difference

_COMMON = ("n_e", "e_dim", "beta")


class Taming:
    """What takes the place of taming's ``VectorQuantizer``."""

    class_name = "VectorQuantizer"
    attributes = _COMMON
    left = "the N x K encodings that it returns; VectorQuantizer2 returns none"

    def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Quantised map (B, D, height, width), loss, and perplexity (), encodings (N, K) and
        indices (N, 1)."""
        quantized, loss, indices = vqgan.quantize(self, z, legacy=True, product=True)
        indices = indices[:, None]
        encodings = z.new_zeros(indices.shape[0], self.n_e).scatter(1, indices, 1)
        share = encodings.mean(0)
        perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        return quantized, loss, (perplexity, encodings, indices)


class Taming2:
    """What takes the place of taming's ``VectorQuantizer2``."""

    class_name = "VectorQuantizer2"
    attributes = (*_COMMON, "legacy", "remap", "sane_index_shape")
    left = ""

    def forward(
        self: Any,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantised map (B, D, height, width), loss, and (None, None, indices)."""
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise AssertionError("temp, rescale_logits, return_logits are for Gumbel quantisers")
        quantized, loss, indices = vqgan.quantize(self, z, self.legacy)
        return quantized, loss, (None, None, vqgan.remapped(self, indices, quantized.shape))


class LlamaGen:
    """What takes the place of LlamaGen's ``VectorQuantizer``.

    Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image
    Generation" (2024), sec. 2.1.
    """

    class_name = "VectorQuantizer"
    attributes = (*_COMMON, "entropy_loss_ratio", "l2_norm", "show_usage")
    left = "training with an entropy loss, which takes all N x K distances"

    def forward(self: Any, z: Tensor) -> tuple[Tensor, tuple[Any, ...], tuple[None, None, Tensor]]:
        """Quantised map (B, D, height, width), (losses of the codebook, the commitment and the
        entropy, usage), and (None, None, indices (N,)). The losses are None in evaluation."""
        if self.training and self.entropy_loss_ratio != 0:
            return type(self).forward(self, z)
        z = z.permute(0, 2, 3, 1).contiguous()
        codes = self.embedding.weight
        if self.l2_norm:
            z, codes = (nn.functional.normalize(t, dim=-1) for t in (z, codes))
        indices = vqgan.nearest(z, codes)
        chosen = nn.functional.embedding(indices, codes).view(z.shape)
        usage: float = 0
        if self.show_usage and self.training:
            with torch.no_grad():  # LlamaGen registers a parameter as this buffer
                latest = torch.cat((self.codebook_used, indices.to(self.codebook_used)))
                self.codebook_used.copy_(latest[indices.shape[0] :])
            usage = len(self.codebook_used.unique()) / self.n_e
        terms: tuple[Any, ...] = (None, None, None)
        if self.training:
            commitment, codebook = vqgan.losses(z, chosen)
            # The last is a zero with gradients.
            terms = codebook, self.beta * commitment, 0 * (commitment + codebook)
        quantized = vqgan.straight_through(z, chosen).permute(0, 3, 1, 2)
        return quantized, (*terms, usage), (None, None, indices)


# LlamaGen's has all the attributes of taming's, and more.
_KINDS = (LlamaGen, Taming2, Taming)


def _kind_of(module: nn.Module) -> type[LlamaGen] | type[Taming2] | type[Taming] | None:
    if not isinstance(getattr(module, "embedding", None), nn.Embedding):
        return None
    for kind in _KINDS:
        if own_class(module).__name__ == kind.class_name and all(
            hasattr(module, name) for name in kind.attributes
        ):
            return kind
    return None


def matches(module: nn.Module) -> bool:
    return _kind_of(module) is not None


def swap(module: nn.Module) -> Swap:
    kind = _kind_of(module)
    assert kind is not None  # it matched
    method = Method(module, type(module), kind.forward)
    left = method.objections() or difference(module, kind.forward)
    if left:
        return Swap(left="; ".join(left))
    return Swap((method,), done=f"forward (as {kind.__name__})", left=kind.left)


LIBRARY = Library(
    "taming",
    ("VectorQuantizer, VectorQuantizer2 (taming's, LlamaGen's and copies of them)",),
    matches,
    swap,
)
