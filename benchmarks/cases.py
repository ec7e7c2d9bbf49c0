"""What is measured: named problems, made from the registry's samples and from real pictures."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import patches, ratios, schedulers, training, transformers, vqvae
from benchmarks.results import title_of
from mmfast.registry import OPS, Sample

SHIFTED = "Gaussian + 100"

Make = Callable[[torch.device], tuple[Any, ...]]

# With goals for one thread and for all.
_SCALED = (
    "nearest_code",
    "kmeans",
    "vector_quantize_step",
    "vector_quantize_eval",
    "residual_vq_step",
)
# Likewise, with --scale.
_SCALED_TOO = (
    "residual_vq_eval",
    "fsq_step",
    "lfq_step",
    "lfq_signs_step",
    "sampler_step",
    "add_noise",
    "randn",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_bwd",
    "gated_residual_modulate",
    "gated_residual_modulate_bwd",
    "qk_norm_rope",
    "qk_norm_rope_bwd",
    "dit_step",
)
# Parts of modules that are measured: the larger of their samples are for --full.
_INSIDE = (
    "vector_quantize",
    "vector_quantize_bwd",
    "residual_quantize",
    "residual_quantize_bwd",
    "lookup_free_quantize",
    "lookup_free_quantize_bwd",
    "finite_scalar_quantize",
    "finite_scalar_quantize_bwd",
    "gated_residual",
    "gated_residual_bwd",
    "layer_norm_modulate",
    "layer_norm_modulate_bwd",
    # Peers take seconds.
    "soft_assignment_statistics",
    "soft_assignment_statistics_bwd",
)
_SHAPES = ((65536, 1024, 64), (65536, 8192, 32), (16384, 16384, 256))  # N, K, D of a quantiser
_LEVELS = [8, 8, 8, 5, 5, 5]  # of FSQ
_ITERATIONS = 2  # of k-means
_JUDGED = 4096  # vectors of a point of a curve


@dataclass(frozen=True)
class Case:
    """A problem for the contenders of one op.

    Attributes:
        op: name in the registry, or in ``benchmarks.composites``.
        name: unique within the op.
        shape: sizes by their letters.
        data: what the numbers are.
        make: the op's arguments on a device.
        sweep: the curve whose point it is; None for what goes into the tables.
        quick: part of ``--quick``.
        full: only part of ``--full``.
        share: of the time that a case gets.
        overhead: it is so small that a call is all overhead.
        compiled: what is compiled takes part, whatever the op.
        whole: slow contenders have all vectors too, so that the memory can be compared.
    """

    op: str
    name: str
    shape: Mapping[str, int] = field(hash=False)
    data: str
    make: Make
    sweep: str | None = None
    quick: bool = False
    full: bool = False
    share: float = 1.0
    overhead: bool = False
    compiled: bool = False
    whole: bool = False

    @property
    def judged(self) -> int:
        """How many of its vectors are held to the truth."""
        return self.shape["N"] if self.sweep is None else min(self.shape["N"], _JUDGED)

    def scales(self, everything: bool) -> bool:
        """Whether it is timed with one thread too.

        Args:
            everything: that has a goal.
        """
        scaled = self.op in _SCALED or (self.op, self.name) in schedulers.RATIOS
        return self.sweep is None and (scaled or (everything and self.op in _SCALED_TOO))

    @property
    def key(self) -> str:
        return f"{self.op}/{self.name}"

    @property
    def title(self) -> str:
        return title_of(self.op, self.name, self.shape)


def all_cases() -> list[Case]:
    """Every case, those of the tables first."""
    return [*_tables(), *_sweeps()]


def _tables() -> Iterator[Case]:
    for op in OPS.values():
        bench = [sample for sample in op.samples() if sample.bench]
        smallest = min(bench, key=lambda sample: sample.shape["N"] * sample.shape["K"])
        for sample in bench:
            yield Case(
                op.name,
                sample.name,
                sample.shape,
                SHIFTED if "offset" in sample.name else "Gaussian",
                functools.partial(_sample, sample, torch.float32),
                quick=sample is smallest or sample.name == "n65536_k1024_d64",
                full=(sample is not smallest and op.name in _INSIDE) or sample.name in ratios.LONG,
            )
        yield from _halves(op.name, bench)
        if op.name == "nearest_code":
            for num_codes in (1024, 8192):
                yield _patches(num_codes)
            yield dataclasses.replace(_gaussian(8, 8, 8, "tiny_8"), overhead=True)
    yield Case(
        "kmeans",
        "n65536_k1024_d64",
        {"N": 65536, "K": 1024, "D": 64},
        "Gaussian",
        lambda device: _kmeans(_normal(65536, 64, 0).to(device), 1024),
        quick=True,
    )
    yield Case(
        "kmeans",
        "patches_k1024",
        {"N": patches.COUNT, "K": 1024, "D": patches.dimensions()},
        "image patches",
        lambda device: _kmeans(patches.patches().to(device), 1024),
        full=True,
    )
    for setting in schedulers.SETTINGS:
        for name, shape in schedulers.SHAPES.items():
            yield _scheduler("scheduler_step", setting, name, shape)
    for name, shape in schedulers.SHAPES.items():
        yield _scheduler("scheduler_add_noise", schedulers.SETTINGS[0], name, shape)
    euler = next(setting for setting in schedulers.SETTINGS if setting.key == "euler")
    yield _scheduler("sampler_call", euler, "tiny", schedulers.SHAPES["tiny"])
    yield from _modules()
    if not training.missing():
        yield _vqvae(vqvae.SETTING)
    for model in transformers.SETTINGS:
        for name in model.ops:
            yield _transformer(name, model)


def _modules() -> Iterator[Case]:
    for n, k, d in _SHAPES:
        for op, sizes in (("step", (n, k, n)), ("eval", (n, k))):
            case = _module(f"vector_quantize_{op}", {"N": n, "K": k, "D": d}, sizes)
            yield dataclasses.replace(case, whole=k == 1024)
    shape = {"N": 16384, "K": 1024, "D": 128, "Q": 8}
    for op in ("step", "eval"):
        yield _module(f"residual_vq_{op}", shape, (16384, 8 * 1024, 16384)[: 3 - (op == "eval")])
    for n in (65536, 1 << 20):  # in the caches, and not
        shape = {"N": n, "K": math.prod(_LEVELS), "D": len(_LEVELS)}
        yield _module("fsq_step", shape, (n, n), _LEVELS)
    for bits in (14, 16, 18):
        shape = {"N": 65536, "K": 1 << bits, "D": bits}
        yield _module("lfq_step", shape, (65536, 65536), full=bits > 14)
    for n in (65536, 1 << 20):
        yield _module("lfq_signs_step", {"N": n, "K": 1 << 14, "D": 14}, (n, n))


def _module(
    op: str, shape: Mapping[str, int], sizes: tuple[int, ...], *rest: Any, full: bool = False
) -> Case:
    """Gaussian vectors, codes, and gradients, as many as ``sizes``, and what else it takes."""

    def make(device: torch.device) -> tuple[Any, ...]:
        tensors = [_normal(n, shape["D"], seed).to(device) for seed, n in enumerate(sizes)]
        if "Q" in shape:
            tensors[1] = tensors[1].view(shape["Q"], shape["K"], shape["D"])
        return *tensors, *rest

    name = "_".join(f"{letter.lower()}{size}" for letter, size in shape.items())
    return Case(op, name, shape, "Gaussian", make, full=full)


def _scheduler(op: str, setting: schedulers.Setting, name: str, shape: tuple[int, ...]) -> Case:
    numbers = math.prod(shape)
    return Case(
        op,
        f"{setting.key}_{name}",
        {"N": numbers, "K": 1, "D": numbers // shape[0]},
        setting.title,
        lambda device: schedulers.arguments(setting, shape, device),
        share=schedulers.SHARE,
        overhead=name == "tiny",
    )


def _transformer(op: str, setting: transformers.Setting) -> Case:
    tokens = setting.batch * setting.tokens
    return Case(
        op,
        setting.key,
        {"N": tokens, "K": setting.blocks, "D": setting.width},
        setting.title,
        lambda device: transformers.arguments(setting, device),
        full=op == "dit_eval" and setting.dtype != torch.float32,
    )


def _vqvae(setting: vqvae.Setting) -> Case:
    return Case(
        vqvae.OP,
        f"k{setting.num_codes}",
        setting.shape,
        "photographs",
        lambda device: vqvae.arguments(setting, device),
    )


def _sample(sample: Sample, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return sample.make(device, dtype, 0)


def _halves(op: str, samples: list[Sample]) -> Iterator[Case]:
    """Those in bfloat16 that have goals."""
    for sample in samples:
        name = sample.name + ratios.HALF
        if (op, name) in ratios.RATIOS:
            make = functools.partial(_sample, sample, torch.bfloat16)
            full = sample.name in ratios.LONG
            yield Case(op, name, sample.shape, "Gaussian, bfloat16", make, full=full)


def _sweeps() -> Iterator[Case]:
    # Others are for --full. The tables have N = 65536, and patches with 1024 and 8192 codes.
    for n in (16, 64, 256, 1024, 4096, 16384):
        yield _gaussian(n, 1024, 64, f"sweep_n{n}", "N", full=n not in (16, 256, 4096))
    for k in (4, 16, 64, 256, 1024, 4096, 16384):
        yield _gaussian(16384, k, 64, f"sweep_k{k}", "K", full=k not in (4, 64, 1024, 4096))
    for d in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        yield _gaussian(16384, 1024, d, f"sweep_d{d}", "D", full=d not in (1, 4, 16, 64, 512))
    for k in (64, 256, 4096):
        case = _patches(k, f"sweep_patches_k{k}", "K, image patches")
        yield dataclasses.replace(case, full=k == 4096)


def _normal(rows: int, dims: int, seed: int) -> Tensor:
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def _gaussian(
    n: int, k: int, d: int, name: str, sweep: str | None = None, *, full: bool = False
) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        return _normal(n, d, 0).to(device), _normal(k, d, 1).to(device), "euclidean"

    shape = {"N": n, "K": k, "D": d}
    quick = sweep is None
    return Case("nearest_code", name, shape, "Gaussian", make, sweep, quick=quick, full=full)


def _patches(
    num_codes: int, name: str = "", sweep: str | None = None, patch: int = patches.PATCH
) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        codes = patches.codebook(num_codes, patch)
        return patches.patches(patch).to(device), codes.to(device), "euclidean"

    return Case(
        "nearest_code",
        name or f"patches_k{num_codes}",
        {"N": patches.COUNT, "K": num_codes, "D": patches.dimensions(patch)},
        "image patches",
        make,
        sweep,
        quick=num_codes == 1024 and sweep is None,
    )


def _kmeans(x: Tensor, num_codes: int) -> tuple[Any, ...]:
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:num_codes]
    return x, x[chosen.to(x.device)].clone(), _ITERATIONS
