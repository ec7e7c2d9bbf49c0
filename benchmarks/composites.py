"""What is measured without being an op of the registry: k-means, and the quantisers' modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mmfast
import mmfast.nn
from benchmarks import gpu_attention, loops, modules, schedulers, transformers, vqvae
from benchmarks.modules import DECAY, EPS, Step
from mmfast.ops import ema_update, vector_quantize
from mmfast.ops.lookup_free_quantize import batch_entropy
from mmfast.registry import OPS

_INERTIA_TOLERANCE = 1e-4
_STEP_TOLERANCE = 1e-5  # relative to the largest number


@dataclass(frozen=True)
class Composite:
    """A problem solved by several ops.

    Attributes:
        makes: mmfast's ways, by their names: each takes the arguments and returns the call.
        expected: the float64 result for the arguments.
        judge: what is wrong with a result, given the arguments and the expected one; empty when
            nothing.
        errors: of each output of a result against the expected one; None where nobody asks.
    """

    makes: Mapping[str, Callable[..., Callable[[], Any]]]
    expected: Callable[..., Any]
    judge: Callable[[Any, tuple[Any, ...], Any], str]
    errors: Callable[[Any, Any], list[float]] | None = None


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
    """In float64. The cases of nearest_code hold its indices to float64."""
    indices, _ = mmfast.nearest_code(x, codebook.to(x))
    return (x.double() - codebook.to(x.device).double()[indices]).square().sum()


def _judge_codebook(codebook: Tensor, arguments: tuple[Any, ...], wanted: Tensor) -> str:
    """A tie that rounding breaks the other way moves its codes, and in the next iteration others:
    codebooks part, their inertia does not. Whoever moves codes without vectors gets a lower one."""
    excess = float(_inertia(arguments[0], codebook) / wanted) - 1
    return "" if excess < _INERTIA_TOLERANCE else f"inertia {excess:+.1e}"


def _functions_step(x: Tensor, codebook: Tensor, gradient: Tensor) -> Step:
    """A training step without the module."""
    codes, embed_sum = codebook.clone(), codebook.clone()
    cluster_size = torch.ones_like(codebook[:, 0])

    def reset() -> None:
        codes.copy_(codebook)
        embed_sum.copy_(codebook)
        cluster_size.fill_(1)

    def step() -> tuple[Tensor, ...]:
        vectors = x.detach().requires_grad_()
        result = mmfast.vector_quantize(vectors, codes, gradient="rotation")
        outputs = (result.quantized, result.commitment_loss)
        (to_x,) = torch.autograd.grad(outputs, vectors, (gradient, torch.ones_like(outputs[1])))
        mmfast.ema_update_(codes, cluster_size, embed_sum, x, result.indices, decay=DECAY, eps=EPS)
        return to_x, codes

    return Step(reset, step)


def _expected_step(x: Tensor, codebook: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x and the new codebook. The cases of nearest_code hold its indices to float64."""
    one, size = x.new_ones((), dtype=torch.float64), torch.ones_like(codebook[:, 0])
    indices, _ = mmfast.nearest_code(x, codebook)
    counts, sums = OPS["code_statistics"].reference(x.double(), indices, len(codebook), None)
    to_x, _ = vector_quantize.reference_bwd(
        gradient, one, None, x.double(), codebook, indices, counts, "rotation", True, False
    )
    codes, _, _ = ema_update.OP.result(
        ema_update.reference,
        (codebook.double(), size, codebook, counts, sums, DECAY, EPS, False),
    )
    return to_x, codes


def _expected_residual_step(
    x: Tensor, codebooks: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Each stage's step for what the earlier ones left over; their gradients add up."""
    to_x, new = torch.zeros_like(x, dtype=torch.float64), []
    for codebook in codebooks:
        part, codes = _expected_step(x, codebook, gradient)
        to_x += part
        new.append(codes)
        x = x - codebook[mmfast.nearest_code(x, codebook)[0]]
    return to_x, torch.cat(new)


def _expected_eval(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    indices, _ = mmfast.nearest_code(x, codebook)
    return codebook[indices].double(), indices


def _expected_residual_eval(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    total, chosen = torch.zeros_like(x, dtype=torch.float64), []
    for codebook in codebooks:
        codes, indices = _expected_eval(x, codebook)
        chosen.append(indices)
        total += codes
        x = x - codes.to(x)
    return total, torch.stack(chosen, -1)


def _expected_fsq(z: Tensor, gradient: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    rest = (levels, "bound", False, None)
    _, indices = OPS["finite_scalar_quantize"].reference(z, *rest)
    to_z = OPS["finite_scalar_quantize_bwd"].reference(gradient.double(), z.double(), *rest)
    return to_z, indices


def _expected_lfq(z: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.double().requires_grad_()
    with mmfast.use_backend("reference"):
        result = mmfast.lookup_free_quantize(leaf, group_bits=z.shape[1])
        loss = modules.ENTROPY_WEIGHT * (
            result.sample_entropy - batch_entropy(result.mean_probabilities)
        )
        (to_z,) = torch.autograd.grad(
            (result.quantized, loss), leaf, (gradient.double(), torch.ones_like(loss))
        )
    return to_z, result.indices[:, 0]


def _expected_signs(z: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    arguments = (z, 1, 1.0, False, modules.INV_TEMPERATURE, 0, None)
    return gradient.double(), OPS["lookup_free_quantize"].reference(*arguments)[1][:, 0]


def _judge_rows(*names: str) -> Callable[[Any, tuple[Any, ...], Any], str]:
    """Counts the wrong rows of each output. A vector with another index has another gradient, and
    moves two codes."""

    def judge(result: Any, arguments: tuple[Any, ...], wanted: tuple[Tensor, ...]) -> str:
        wrong = []
        for name, got, want in zip(names, result, wanted, strict=True):
            limit = _STEP_TOLERANCE * want.abs().amax() if want.is_floating_point() else 0
            bad = (got.to(want) - want).abs() > limit
            count = int((bad.any(-1) if bad.dim() > 1 else bad).sum())
            if count:
                wrong.append(f"{count} of {len(want)} {name} wrong")
        return "; ".join(wrong)

    return judge


def _module(make: Callable[..., Callable[[], Any]]) -> dict[str, Callable[..., Callable[[], Any]]]:
    return {"mmfast.nn": partial(make, mmfast.nn)}


COMPOSITES = {
    "kmeans": Composite({"mmfast": _kmeans}, _expected_kmeans, _judge_codebook),
    "vector_quantize_step": Composite(
        {**_module(modules.vector_quantize_step), "mmfast, functions": _functions_step},
        _expected_step,
        _judge_rows("gradients", "codes"),
    ),
    "vector_quantize_eval": Composite(
        _module(modules.vector_quantize_eval), _expected_eval, _judge_rows("vectors", "indices")
    ),
    "residual_vq_step": Composite(
        _module(modules.residual_vq_step),
        _expected_residual_step,
        _judge_rows("gradients", "codes"),
    ),
    "residual_vq_eval": Composite(
        _module(modules.residual_vq_eval),
        _expected_residual_eval,
        _judge_rows("vectors", "indices"),
    ),
    "fsq_step": Composite(
        _module(modules.fsq_step), _expected_fsq, _judge_rows("gradients", "indices")
    ),
    "lfq_signs_step": Composite(
        _module(modules.lfq_signs_step), _expected_signs, _judge_rows("gradients", "indices")
    ),
    "lfq_step": Composite(
        _module(modules.lfq_step), _expected_lfq, _judge_rows("gradients", "indices")
    ),
    "dit_eval": Composite(
        {"mmfast, patched": partial(transformers.evaluation, transformers.patched)},
        transformers.expected(transformers.evaluation),
        transformers.judge,
    ),
    "dit_step": Composite(
        {"mmfast, patched": partial(transformers.step, transformers.patched)},
        transformers.expected(transformers.step),
        transformers.judge,
    ),
    vqvae.OP: Composite(
        _module(lambda *arguments: vqvae.step(vqvae.quantiser(arguments[0]), *arguments[1:])),
        vqvae.expected,
        vqvae.judge,
    ),
    gpu_attention.STEP: Composite(
        {"mmfast": gpu_attention.own},
        gpu_attention.expected,
        gpu_attention.judge,
        transformers.errors,
    ),
    loops.OP: Composite(loops.MAKES, loops.expected, loops.judge),
    "scheduler_step": Composite(
        {"mmfast": schedulers.step}, schedulers.expected_step, schedulers.judge
    ),
    "scheduler_add_noise": Composite(
        {"mmfast": schedulers.add_noise}, schedulers.expected_add_noise, schedulers.judge
    ),
    "sampler_call": Composite(
        {"mmfast": schedulers.call}, schedulers.expected_call, schedulers.judge
    ),
}
