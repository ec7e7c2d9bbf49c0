"""What is measured on a GPU: its ops' shapes in models that need one, in float32 and bfloat16.

The shapes are those of DiT-XL/2, Stable Diffusion 3, Flux and Wan; ops that have none here take
part with the smallest shape that the CPU's benchmarks have. Sizes may be divided, so that
definitions can be tried where no GPU is.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import cases, gpu_attention, loops, transformers
from benchmarks.cases import Case
from mmfast.ops import (
    add_noise,
    finite_scalar_quantize,
    gated_activation,
    gated_residual,
    gated_residual_modulate,
    layer_norm_modulate,
    lookup_free_quantize,
    nearest_code,
    qk_norm_rope,
    residual_quantize,
    sampler_step,
)
from mmfast.registry import Sample

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Model:
    """A diffusion transformer's sizes.

    Attributes:
        name: for readers; key: for names of cases.
        batch, image, text: B, and the tokens of an image or video and of its text.
        width, heads, hidden: C, H, and the width of the feed-forward layer.
        latents: of a sample, without the batch.
    """

    name: str
    key: str
    batch: int
    image: int
    text: int
    width: int
    heads: int
    hidden: int
    latents: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """L, of both streams."""
        return self.image + self.text


DIT = Model("DiT-XL/2", "dit_xl", 64, 256, 0, 1152, 16, 4608, (4, 32, 32))
SD3 = Model("SD3", "sd3", 4, 4096, 333, 1536, 24, 6144, (16, 128, 128))
FLUX = Model("Flux", "flux", 1, 4096, 512, 3072, 24, 12288, (16, 128, 128))
WAN = Model("Wan 1.3B", "wan", 1, 32760, 512, 1536, 12, 8960, (16, 21, 60, 104))
MODELS = (DIT, SD3, FLUX, WAN)
_STREAMS = {
    model.key: (model.image, model.text, model.heads, model.width // model.heads)
    for model in (SD3, FLUX, WAN)
}
_SAMPLES = 64  # of a batch of latents, so that they do not fit the L2


@dataclass(frozen=True)
class Sizes:
    """Divides what makes a problem large, and leaves what makes it itself.

    Attributes:
        divisor: of batches, lengths and numbers of vectors and codes.
    """

    divisor: int = 1

    def __call__(self, size: int) -> int:
        return max(1, size // self.divisor)


def all_cases() -> list[Case]:
    """Those of this file, and one of each of the other ops."""
    own = gpu_cases()
    there = {case.op for case in own}
    others = (c for c in cases.all_cases() if c.quick and c.sweep is None and c.op not in there)
    first = {case.op: case for case in reversed(list(others))}
    return sorted([*own, *first.values()], key=lambda case: (case.full, not case.quick))


def gpu_cases(divisor: int = 1) -> list[Case]:
    """What goals are set for first, and of each op one case before any op has its second: whoever
    cuts a run off has these."""
    sizes = Sizes(divisor)
    found = [
        *gpu_attention.cases(sizes, _STREAMS),
        *_blocks(sizes),
        *_streams(sizes),
        *_lookups(sizes),
        *_quantisers(sizes),
        *_whole(sizes),
        *_loops(sizes),
    ]
    found.sort(key=lambda case: (case.full, not case.quick))
    seen: collections.Counter[str] = collections.Counter()
    turns = {}
    for case in found:
        turns[case.key] = seen[case.op]
        seen[case.op] += 1
    return sorted(found, key=lambda case: (case.full, not case.quick, turns[case.key]))


def _made(sample: Sample, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return sample.make(device, dtype, 0)


def _case(
    op: str,
    key: str,
    sample: Sample,
    dtype: torch.dtype,
    of: str,
    *,
    quick: bool = False,
    full: bool = False,
    overhead: bool = False,
) -> Case:
    kind = str(dtype).removeprefix("torch.")
    return Case(
        op,
        "_".join(filter(None, (key, sample.name, kind))),
        sample.shape,
        f"{of}, {kind}",
        functools.partial(_made, sample, dtype),
        quick=quick,
        full=full,
        overhead=overhead,
        compiled=True,
    )


def _both(
    op: str,
    key: str,
    sample: Sample,
    backward: Callable[..., Sample] | Sample,
    of: str,
    **more: Any,
) -> Iterator[Case]:
    """Forward and backward in both dtypes."""
    gradients = backward if isinstance(backward, Sample) else backward(sample)
    for dtype in reversed(DTYPES):
        yield _case(op, key, sample, dtype, of, **more)
        yield _case(f"{op}_bwd", key, gradients, dtype, of, **more)


def _blocks(sizes: Sizes) -> Iterator[Case]:
    plain = layer_norm_modulate.PLAIN
    for model in MODELS:
        batch, tokens = sizes(model.batch), sizes(model.tokens)
        norm = layer_norm_modulate.sample(batch, tokens, model.width, without=plain)
        options = {"quick": model is DIT}
        for module, sample, backward in (
            (
                gated_residual_modulate,
                gated_residual_modulate._sample(norm),
                gated_residual_modulate._sample_bwd,
            ),
            (layer_norm_modulate, norm, layer_norm_modulate._sample_bwd),
            (
                gated_residual,
                gated_residual.sample(batch, tokens, model.width),
                gated_residual._sample_bwd,
            ),
        ):
            of = module.OP.name
            yield from _both(of, model.key, sample, backward, model.name, **options)
        width = model.width // model.heads
        rotated = qk_norm_rope._Case(
            batch, tokens, model.heads, model.heads, width,
            across_heads=model is WAN, rotary_dim=width,
        )  # fmt: skip
        yield from _both(
            qk_norm_rope.OP.name,
            model.key,
            qk_norm_rope._sample(rotated),
            qk_norm_rope._sample_bwd(rotated),
            model.name,
            **options,
        )
        hidden = (batch, tokens, model.hidden)
        yield from _both(
            gated_activation.OP.name,
            model.key,
            gated_activation._sample(hidden, "gelu_tanh"),
            gated_activation._sample_bwd(hidden, "gelu_tanh"),
            model.name,
            **options,
        )


def _streams(sizes: Sizes) -> Iterator[Case]:
    """A batch of latents, and a single one, of which a call is all overhead."""
    for model, batch in ((DIT, 1024), (SD3, 16), (FLUX, _SAMPLES), (WAN, 4)):
        latents = (sizes(batch), *model.latents)
        kinds = [("euler",), ("multistep", "unconditional"), ("sde", "seed")]
        for dtype in reversed(DTYPES):
            more: dict[str, Any] = {"quick": model is FLUX, "full": model is SD3}
            for kind, *options in kinds[: 3 if model in (FLUX, WAN) else 1]:
                sample = sampler_step._sample(kind, latents, *options)
                yield _case(sampler_step.OP.name, model.key, sample, dtype, model.name, **more)
            for op, sample in (
                (add_noise.OP.name, add_noise._sample(latents)),
                (add_noise.BACKWARD.name, add_noise._sample_bwd(latents)),
            ):
                yield _case(op, model.key, sample, dtype, model.name, **more)
    tiny = sampler_step._sample("multistep", (1, 4, 4, 4))
    yield _case(
        sampler_step.OP.name, "tiny", tiny, DTYPES[0], "overhead", quick=True, overhead=True
    )


def _lookups(sizes: Sizes) -> Iterator[Case]:
    op = nearest_code.OP.name

    def lookup(
        n: int, k: int, d: int, dtype: torch.dtype, offset: float = 0.0, **more: Any
    ) -> Case:
        sample = nearest_code._gaussian(sizes(n), sizes(k), d, offset=offset)
        return _case(op, "", sample, dtype, "Gaussian" + " + 100" * (offset > 0), **more)

    for dtype in DTYPES:
        for k in (8192, 65536):
            for d in (64, 128, 256):
                full = k == 65536 and d == 128
                yield lookup(65536, k, d, dtype, quick=(k, d) == (8192, 64), full=full)
    for k, d in ((1024, 8), (8192, 32), (262144, 16)):
        yield lookup(65536, k, d, DTYPES[0], quick=k == 8192)
    yield lookup(65536, 8192, 64, DTYPES[0], offset=100.0)
    for k, d in ((8192, 256), (65536, 64)):
        yield lookup(65536, k, d, DTYPES[0], offset=100.0, full=True)
    yield cases._patches(8192)
    large = cases._patches(8192, "patches_k8192_d192", patch=8)
    yield dataclasses.replace(large, compiled=True)


def _quantisers(sizes: Sizes) -> Iterator[Case]:
    levels = (8, 8, 8, 5, 5, 5)
    n = sizes(1 << 22)
    for dtype in DTYPES:
        fsq = finite_scalar_quantize._sample(n, levels)
        lfq = lookup_free_quantize._sample(n, 14, group=0)
        for module, sample in ((finite_scalar_quantize, fsq), (lookup_free_quantize, lfq)):
            gradients = _backward(module, sample)
            name = module.OP.name
            yield _case(name, "", sample, dtype, "Gaussian", quick=dtype == DTYPES[1])
            yield _case(f"{name}_bwd", "", gradients, dtype, "Gaussian", quick=dtype == DTYPES[1])
    residual = residual_quantize._quantising(sizes(65536), 128, [sizes(1024)] * 8)
    yield _case(residual_quantize.OP.name, "", residual, DTYPES[0], "Gaussian", quick=True)
    for k in (1024, 65536):
        shape = {"N": sizes(65536), "K": sizes(k), "D": 64}
        yield Case(
            "kmeans",
            "_".join(f"{letter.lower()}{size}" for letter, size in shape.items()),
            shape,
            "Gaussian",
            functools.partial(_kmeans, shape),
            quick=k == 1024,
            compiled=True,
        )
    n, k, d = sizes(65536), sizes(8192), 32
    shape = {"N": n, "K": k, "D": d}
    yield cases._module("vector_quantize_step", shape, (n, k, n))


def _backward(module: Any, sample: Sample) -> Sample:
    """Gradients of a sample of FSQ or LFQ."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        arguments = sample.make(device, dtype, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        outputs = module.fake(*arguments)
        wanted = outputs[:1] if module is finite_scalar_quantize else (outputs[0], *outputs[2:])
        grads = [torch.randn(t.shape, generator=generator).to(t) for t in wanted]
        return *grads, *arguments

    return Sample(sample.name, make, sample.shape)


def _kmeans(shape: dict[str, int], device: torch.device) -> tuple[Any, ...]:
    return cases._kmeans(cases._normal(shape["N"], shape["D"], 0).to(device), shape["K"])


def _whole(sizes: Sizes) -> Iterator[Case]:
    """DiT-XL/2, training and sampling: all of its blocks, in bfloat16."""
    depth = 28 if sizes.divisor == 1 else 1
    setting = transformers.Setting(
        "DiT-XL/2", DIT.width, DIT.heads, depth, sizes(32), sizes(256), torch.bfloat16
    )
    for op in transformers.OPS:
        case = cases._transformer(op, setting)
        yield dataclasses.replace(case, quick=True, full=False, compiled=True)


def _loops(sizes: Sizes) -> Iterator[Case]:
    """All steps of a sampler: DiT-XL/2's, of 16 images, and of nothing but the loop."""
    depth = 28 if sizes.divisor == 1 else 1
    batch, tokens = sizes(16), sizes(256)
    model = transformers.Setting(
        "DiT-XL/2", DIT.width, DIT.heads, depth, batch, tokens, torch.bfloat16
    )
    dit = loops.Setting(model, 8, (batch, tokens, 16))
    for setting in (dit, loops.Setting(None, 50, (1, 4, 4, 4))):
        yield Case(
            loops.OP,
            setting.key,
            {"N": setting.shape[0], "K": setting.steps, "D": math.prod(setting.shape[1:])},
            setting.title,
            functools.partial(loops.arguments, setting),
            quick=True,
            compiled=True,
        )
