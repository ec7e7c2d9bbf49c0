"""What is measured without being an op of the registry: k-means, a quantiser's training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmfast
from benchmarks import schedulers
from mmfast.ops import ema_update, vector_quantize
from mmfast.registry import OPS

DECAY, EPS = 0.8, 1e-5  # of the training step's averages

_INERTIA_TOLERANCE = 1e-4
_STEP_TOLERANCE = 1e-5  # relative to the largest number


@dataclass(frozen=True)
class Composite:
    """A problem solved by several ops.

    Attributes:
        make: takes the arguments, returns mmfast's call.
        expected: the float64 result for the arguments.
        judge: what is wrong with a result, given the arguments and the expected one; empty when
            nothing.
    """

    make: Callable[..., Callable[[], Any]]
    expected: Callable[..., Any]
    judge: Callable[[Any, tuple[Any, ...], Any], str]


def _kmeans(x: Tensor, codebook: Tensor, iterations: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return mmfast.kmeans(
            x, len(codebook), iterations=iterations, init=codebook, tolerance=0
        ).codebook

    return run


def _expected_kmeans(x: Tensor, codebook: Tensor, iterations: int) -> Tensor:
    """The inertia after Lloyd's iterations in float64; a code without vectors stays."""
    codes = codebook.double()
    for _ in range(iterations):
        indices, _ = OPS["nearest_code"].reference(x, codes, "euclidean")
        counts, sums = OPS["code_statistics"].reference(x.double(), indices, len(codes), None)
        codes = torch.where(counts[:, None] > 0, sums / counts[:, None], codes)
    return _inertia(x, codes)


def _inertia(x: Tensor, codebook: Tensor) -> Tensor:
    _, distances = OPS["nearest_code"].reference(x, codebook.to(x.device).double(), "euclidean")
    return distances.sum()


def _judge_codebook(codebook: Tensor, arguments: tuple[Any, ...], wanted: Tensor) -> str:
    """A tie that rounding breaks the other way moves its codes, and in the next iteration others:
    codebooks part, their inertia does not. Whoever moves codes without vectors gets a lower one."""
    excess = float(_inertia(arguments[0], codebook) / wanted) - 1
    return "" if excess < _INERTIA_TOLERANCE else f"inertia {excess:+.1e}"


def _step(x: Tensor, codebook: Tensor, gradient: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    codes, embed_sum = codebook.clone(), codebook.clone()
    cluster_size = torch.ones_like(codebook[:, 0])

    def run() -> tuple[Tensor, ...]:
        reset(codebook, codes, embed_sum, cluster_size)
        vectors = x.detach().requires_grad_()
        result = mmfast.vector_quantize(vectors, codes, gradient="rotation")
        loss = (result.quantized * gradient).sum() + result.commitment_loss
        (to_x,) = torch.autograd.grad(loss, vectors)
        mmfast.ema_update_(codes, cluster_size, embed_sum, x, result.indices, decay=DECAY, eps=EPS)
        return to_x, codes

    return run


def reset(codebook: Tensor, codes: Tensor, embed_sum: Tensor, cluster_size: Tensor) -> None:
    """The state before the first step, so that each call makes that one."""
    codes.copy_(codebook)
    embed_sum.copy_(codebook)
    cluster_size.fill_(1)


def _expected_step(x: Tensor, codebook: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Gradient of x and the new codebook. The cases of nearest_code hold its indices to float64."""
    one, size = x.new_ones((), dtype=torch.float64), torch.ones_like(codebook[:, 0])
    indices, _ = mmfast.nearest_code(x, codebook)
    counts, sums = OPS["code_statistics"].reference(x.double(), indices, len(codebook), None)
    to_x, _ = vector_quantize.reference_bwd(
        gradient, one, None, x.double(), codebook, indices, counts, "rotation", True, False
    )
    codes, _, _ = ema_update.reference(
        codebook.double(), size, codebook, counts, sums, DECAY, EPS, False
    )
    return to_x, codes


def _judge_step(result: Any, arguments: tuple[Any, ...], wanted: tuple[Tensor, ...]) -> str:
    """A vector with another index has another gradient, and moves two codes."""
    wrong = []
    for name, got, want in zip(("gradients", "codes"), result, wanted, strict=True):
        error = (got.to(want) - want).abs().amax(1)
        count = int((error > _STEP_TOLERANCE * want.abs().amax()).sum())
        if count:
            wrong.append(f"{count} of {len(want)} {name} wrong")
    return "; ".join(wrong)


COMPOSITES = {
    "kmeans": Composite(_kmeans, _expected_kmeans, _judge_codebook),
    "vector_quantize_step": Composite(_step, _expected_step, _judge_step),
    "scheduler_step": Composite(schedulers.step, schedulers.expected_step, schedulers.judge),
    "scheduler_add_noise": Composite(
        schedulers.add_noise, schedulers.expected_add_noise, schedulers.judge
    ),
}
