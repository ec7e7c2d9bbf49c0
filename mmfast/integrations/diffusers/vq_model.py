"""diffusers: the ``VectorQuantizer`` of ``VQModel``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmfast.integrations import vqgan
from mmfast.integrations.binding import Library, Method, Swap, loaded_class


def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
    """Quantised map (B, D, height, width), loss, and (perplexity, encodings, indices)."""
    quantized, loss, indices = vqgan.quantize(self, z, self.legacy)
    return quantized, loss, (None, None, vqgan.remapped(self, indices, quantized.shape))


def _quantizer() -> type:
    """The library's class; one without instances while the library is not loaded."""
    return loaded_class("diffusers.models.autoencoders.vae", "VectorQuantizer")


def matches(module: nn.Module) -> bool:
    return isinstance(module, _quantizer())


def swap(module: nn.Module) -> Swap:
    return Swap((Method(module, _quantizer(), forward),), done="forward")


LIBRARY = Library("diffusers", ("VectorQuantizer",), matches, swap)
