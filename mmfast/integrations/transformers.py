"""transformers: the codebooks of its audio codecs and of its VQGAN tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import mmfast
from mmfast.integrations import vqgan
from mmfast.integrations.binding import Library, Method, Swap, loaded_class


class Euclidean:
    """What takes the place of the method of EnCodec's codebook, and of those made after it."""

    def quantize(self: Any, hidden_states: Tensor) -> Tensor:
        """Indices (N,) of the codes nearest to hidden_states (N, D)."""
        return vqgan.nearest(hidden_states, self.embed)


class Dac:
    """What takes the place of DAC's method."""

    def decode_latents(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, D, L) most similar to hidden_states (B, D, L), and their indices (B, L).

        Nearest among vectors and codes of unit norm, which is the largest cosine.
        """
        if hasattr(self.codebook, "_hf_hook"):
            # accelerate brings the weights here only around the library's own method.
            return type(self).decode_latents(self, hidden_states)
        vectors = hidden_states.transpose(1, 2)
        indices, _ = mmfast.nearest_code(vectors, self.codebook.weight, metric="cosine")
        return self.codebook(indices).transpose(1, 2), indices


class Vqgan:
    """What takes the place of the method of Chameleon's and Janus' quantisers."""

    def forward(self: Any, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised map (B, D, height, width), loss, and indices (N,)."""
        return vqgan.quantize(self, hidden_state, legacy=True)


class Emu3:
    """What takes the place of Emu3's method."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        """Indices (B, L, height, width) of the codes nearest to (B, L, D, height, width)."""
        vectors = hidden_state.movedim(2, -1)
        return vqgan.nearest(vectors, self.embedding.weight).view(vectors.shape[:-1])


# Class: its model in the library, and what takes the place of its method of that name.
_CODEBOOKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "EncodecEuclideanCodebook": ("encodec", Euclidean.quantize),
    "MimiEuclideanCodebook": ("mimi", Euclidean.quantize),
    "XcodecEuclideanCodebook": ("xcodec", Euclidean.quantize),
    "WavTokenizerEuclideanCodebook": ("wavtokenizer", Euclidean.quantize),
    "DacVectorQuantize": ("dac", Dac.decode_latents),
    "ChameleonVQVAEVectorQuantizer": ("chameleon", Vqgan.forward),
    "JanusVQVAEVectorQuantizer": ("janus", Vqgan.forward),
    "Emu3VQVAEVectorQuantizer": ("emu3", Emu3.forward),
}


def _match(module: nn.Module) -> Method | None:
    for name, (model, function) in _CODEBOOKS.items():
        theirs = loaded_class(f"transformers.models.{model}.modeling_{model}", name)
        if isinstance(module, theirs):
            return Method(module, theirs, function)
    return None


def matches(module: nn.Module) -> bool:
    return _match(module) is not None


def swap(module: nn.Module) -> Swap:
    method = _match(module)
    assert method is not None  # it matched
    left = "when accelerate offloads it" if method.function is Dac.decode_latents else ""
    return Swap((method,), done=method.name, left=left)


LIBRARY = Library("transformers", tuple(_CODEBOOKS), matches, swap)
