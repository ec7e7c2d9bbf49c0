"""Quantiser modules as contenders: the same calls for mmfast's and for the library they replace.

``library`` is ``mmfast.nn`` or ``vector_quantize_pytorch``: both get the same arguments. The
gradient of a module's output is given, as the layer after it gives it, and that of its loss is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DECAY, EPS = 0.8, 1e-5  # of the moving averages
ENTROPY_WEIGHT, INV_TEMPERATURE = 0.1, 100.0  # of LFQ, by default

Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Step:
    """A call that changes a state. ``reset`` makes that the first one's again, or one that is as
    good, and is not timed. ``parts`` tells, after some calls, the seconds of a step's parts."""

    reset: Callable[[], None]
    step: Callable[[], Any]
    parts: Callable[[], dict[str, float]] | None = None

    def __call__(self) -> Any:
        """The first step."""
        self.reset()
        return self.step()


def _gradients(module: Any, x: Tensor, gradient: Tensor) -> Result:
    """The gradient of the vectors ``x`` (N, D), given that of what ``module`` makes of them; their
    indices."""
    vectors = x[None].detach().requires_grad_()
    quantized, indices, *losses = module(vectors)
    losses = [loss for loss in losses if loss.requires_grad]
    outputs = (quantized, *losses)
    ones = tuple(torch.ones_like(loss) for loss in losses)
    return torch.autograd.grad(outputs, vectors, (gradient[None], *ones))[0][0], indices[0]


@torch.no_grad()
def _evaluate(module: Any, x: Tensor) -> Result:
    quantized, indices, *_ = module(x[None])
    return quantized[0], indices[0]


def set_codes(book: Any, codes: Tensor) -> None:
    """The state before the first step: each code has had one vector."""
    book.embed[0].copy_(codes)
    book.embed_avg[0].copy_(codes)
    book.cluster_size.fill_(1)


def vector_quantiser(library: Any, codebook: Tensor) -> Any:
    """A ``VectorQuantize`` with these codes."""
    made = library.VectorQuantize(
        dim=codebook.shape[1], codebook_size=len(codebook), decay=DECAY, eps=EPS
    ).to(codebook)
    made.codebook = codebook
    return made


def vector_quantize_step(library: Any, x: Tensor, codebook: Tensor, gradient: Tensor) -> Step:
    """Gradient of x, and the new codes."""
    quantiser = vector_quantiser(library, codebook)
    book = quantiser._codebook
    return Step(
        lambda: set_codes(book, codebook),
        lambda: (_gradients(quantiser, x, gradient)[0], book.embed[0]),
    )


def vector_quantize_eval(library: Any, x: Tensor, codebook: Tensor) -> Callable[[], Result]:
    """Quantised vectors and indices."""
    quantiser = vector_quantiser(library, codebook).eval()
    return lambda: _evaluate(quantiser, x)


def _residual(library: Any, codebooks: Tensor) -> Any:
    stages, size, dim = codebooks.shape
    made = library.ResidualVQ(
        dim=dim, num_quantizers=stages, codebook_size=size, decay=DECAY, eps=EPS
    ).to(codebooks)
    for layer, codes in zip(made.layers, codebooks, strict=True):
        layer.codebook = codes
    return made


def residual_vq_step(library: Any, x: Tensor, codebooks: Tensor, gradient: Tensor) -> Step:
    """Gradient of x, and the new codes of all stages (Q K, D)."""
    quantiser = _residual(library, codebooks)
    books = [layer._codebook for layer in quantiser.layers]

    def reset() -> None:
        for book, codes in zip(books, codebooks, strict=True):
            set_codes(book, codes)

    def step() -> Result:
        to_x, _ = _gradients(quantiser, x, gradient)
        return to_x, torch.cat([book.embed[0] for book in books])

    return Step(reset, step)


def residual_vq_eval(library: Any, x: Tensor, codebooks: Tensor) -> Callable[[], Result]:
    """Quantised vectors and indices."""
    quantiser = _residual(library, codebooks).eval()
    return lambda: _evaluate(quantiser, x)


def fsq_step(library: Any, z: Tensor, gradient: Tensor, levels: list[int]) -> Callable[[], Result]:
    """Gradient of z, and indices."""
    quantiser = library.FSQ(levels).to(z.device)
    return lambda: _gradients(quantiser, z, gradient)


def lfq_step(library: Any, z: Tensor, gradient: Tensor) -> Callable[[], Result]:
    """Gradient of z, and indices."""
    quantiser = library.LFQ(dim=z.shape[1]).to(z)
    return lambda: _gradients(quantiser, z, gradient)


def lfq_signs_step(library: Any, z: Tensor, gradient: Tensor) -> Callable[[], Result]:
    """Gradient of z, and indices, without the entropies."""
    quantiser = library.LFQ(dim=z.shape[1], entropy_loss_weight=0.0).to(z)
    return lambda: _gradients(quantiser, z, gradient)
