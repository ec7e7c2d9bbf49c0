"""transformers: its audio codecs' and VQGAN tokenizers' codebooks, and its attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import mmfast
from mmfast.integrations import vqgan
from mmfast.integrations.binding import Library, Method, Swap, joined, loaded_class
from mmfast.integrations.rebased import rebased


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


NAME = "mmfast"  # of our attention among the library's implementations


def register() -> None:
    """Make ``attn_implementation="mmfast"`` known to transformers, which must be installed.

    Raises:
        ImportError: it is not, or it has no attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _without_sinks(rebased(sdpa_attention_forward)))
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _without_sinks(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The library's function, which ignores what it does not know of, and would ignore sinks."""

    @functools.wraps(attention)
    def refusing(module: nn.Module, *args: Any, **options: Any) -> Any:
        if options.get("s_aux") is not None:
            raise ValueError(
                f"the attention of {type(module).__name__} has sinks (s_aux), which {NAME!r} and "
                "'sdpa' know nothing of: choose another attn_implementation, such as 'eager'"
            )
        return attention(module, *args, **options)

    return refusing


@dataclass(frozen=True)
class Implementation:
    """The attention of a model, exchanged in its configuration."""

    model: Any
    before: str

    def make(self) -> None:
        register()
        self.model.set_attn_implementation(NAME)

    def undo(self) -> bool:
        """Give the model its own implementation back; whether it had ours, or has its own."""
        if self.model.config._attn_implementation == NAME:
            self.model.set_attn_implementation(self.before)
        return self.model.config._attn_implementation == self.before

    def __str__(self) -> str:
        return f"the attention implementation of a {type(self.model).__name__}"


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a model whose attention can be exchanged."""
    theirs: Any = loaded_class("transformers.modeling_utils", "PreTrainedModel")
    return (
        isinstance(module, theirs)
        and getattr(module, "_supports_sdpa", False)
        and module._can_set_attn_implementation()
    )


def _swap_attention(model: Any) -> Swap:
    before = model.config._attn_implementation
    done = "attention"
    if before == NAME:
        register()  # a model that was pickled comes with the name alone
        return Swap(done=done)
    if before != "sdpa":
        return Swap(left=f"its attention implementation is {before!r}, not 'sdpa'")
    return Swap(exchanges=(Implementation(model, before),), done=done)


def restored(module: Any) -> bool:
    """Give a model PyTorch's attention back; whether it had ours."""
    if not _is_model(module) or module.config._attn_implementation != NAME:
        return False
    return Implementation(module, "sdpa").undo()


LIBRARY = joined(
    Library("transformers", tuple(_CODEBOOKS), matches, swap),
    Library("transformers", ("PreTrainedModel",), _is_model, _swap_attention),
)
