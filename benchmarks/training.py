"""Real data: a small VQ-VAE trained on photographs, with mmfast's kernels, its reference, and
vector-quantize-pytorch, from the same start on the same pictures."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mmfast
import mmfast.nn
from benchmarks import patches, peers
from benchmarks.results import Curve

KERNELS, REFERENCE, LIBRARY = "mmfast", "mmfast (reference)", "vector-quantize-pytorch"
STEPS, QUICK_STEPS = 60, 8
CODES, DIMENSIONS = 512, 32
_BATCH, _CROP = 16, 64  # pictures in a batch, pixels of their sides
_LEARNING_RATE = 1e-3


class Autoencoder(nn.Module):
    """Three strided convolutions to vectors of ``DIMENSIONS``, and three back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, DIMENSIONS, 4, stride=2, padding=1),
            # Vectors that run away from the codes would leave most of them unused.
            nn.BatchNorm2d(DIMENSIONS, affine=False),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(DIMENSIONS, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1),
        )

    def encode(self, pictures: Tensor) -> Tensor:
        """Vectors (B, L, D) of pictures (B, 3, height, width)."""
        return self.encoder(pictures).flatten(2).mT

    def decode(self, vectors: Tensor) -> Tensor:
        """Pictures of vectors (B, L, D)."""
        side = _CROP // 8
        return self.decoder(vectors.mT.unflatten(2, (side, side)))


def missing() -> list[str]:
    """Why the photographs are not there."""
    return peers.needs("skimage")()


def run(steps: int, tell: Callable[[str], None]) -> list[Curve]:
    """Train with each quantiser that is there for ``steps``."""
    batches_ = batches(steps)
    found = []
    for subject, library, backend in _contenders():
        tell(subject)
        with backend:
            found.append(_train(subject, library, batches_))
    return found


def _contenders() -> list[tuple[str, Any, contextlib.AbstractContextManager[Any]]]:
    found: list[tuple[str, Any, contextlib.AbstractContextManager[Any]]] = [
        (KERNELS, mmfast.nn, contextlib.nullcontext()),
        (REFERENCE, mmfast.nn, mmfast.use_backend("reference")),
    ]
    if not peers.needs("vector_quantize_pytorch")():
        import vector_quantize_pytorch

        found.append((LIBRARY, vector_quantize_pytorch, contextlib.nullcontext()))
    return found


def batches(steps: int, batch: int = _BATCH, crop: int = _CROP) -> list[Tensor]:
    """(batch, 3, crop, crop) each, float32 in -1/2 to 1/2: random parts of the photographs."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.from_numpy(np.ascontiguousarray(p)) for p in patches.photographs()]

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def part() -> Tensor:
        picture = pictures[below(len(pictures))]
        top, left = (below(size - crop + 1) for size in picture.shape[:2])
        cut = picture[top : top + crop, left : left + crop]
        return cut.permute(2, 0, 1).float() / 255 - 0.5

    return [torch.stack([part() for _ in range(batch)]) for _ in range(steps)]


def _train(subject: str, library: Any, batches: list[Tensor]) -> Curve:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Autoencoder()
        quantiser = library.VectorQuantize(dim=DIMENSIONS, codebook_size=CODES)
    _start_at_vectors(quantiser, model, batches[0])
    optimiser = torch.optim.Adam(model.parameters(), _LEARNING_RATE)
    curve = Curve(subject)
    start = time.perf_counter()
    for pictures in batches:
        quantized, indices, commitment = quantiser(model.encode(pictures))
        error = nn.functional.mse_loss(model.decode(quantized), pictures)
        optimiser.zero_grad()
        (error + commitment.sum()).backward()
        optimiser.step()
        _follow(curve, indices, float(error.detach()))
    curve.seconds = time.perf_counter() - start
    return curve


@torch.no_grad()
def _start_at_vectors(quantiser: Any, model: Autoencoder, pictures: Tensor) -> None:
    """Random vectors of the first batch as codes, each of which has had one vector."""
    vectors = model.encode(pictures).flatten(0, 1)
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:CODES]
    book = quantiser._codebook
    book.embed.copy_(vectors[chosen][None])
    book.embed_avg.copy_(book.embed)
    book.cluster_size.fill_(1)


def _follow(curve: Curve, indices: Tensor, error: float) -> None:
    share = torch.bincount(indices.flatten(), minlength=CODES).double() / indices.numel()
    curve.perplexity.append(float(torch.special.entr(share).sum().exp()))
    curve.used.append(int((share > 0).sum()))
    curve.error.append(error)
    curve.digests.append(hashlib.sha256(indices.long().numpy().tobytes()).hexdigest()[:16])
