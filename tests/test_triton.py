"""Every Triton kernel against its reference: in Triton's interpreter, or on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py

On a GPU the other files test this backend too. The interpreter, which takes milliseconds for what
a GPU does in none, repeats here those of their tests that it can afford.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import test_add_noise
import test_code_statistics
import test_finite_scalar_quantize
import test_gated_activation
import test_guidance_factors
import test_joint_attention
import test_lookup_free_quantize
import test_nearest_code
import test_pack_indices
import test_patchify
import test_randn
import test_residual_quantize
import test_sample_code
import test_sampler_step
import test_scaled_dot_product_attention
import test_soft_assignment_statistics
import test_varlen_attention
import test_vector_quantize
import torch
from cases import METRICS, VIEWS, complaints, device_of, normal
from hypothesis import given, settings
from test_determinism import assert_same_bits
from test_nearest_code import HARD
from torch import Tensor

import mmfast
from mmfast import backends
from mmfast.backends import interpreting
from mmfast.ops import (
    code_statistics,
    ema_update,
    finite_scalar_quantize,
    lookup_free_quantize,
    nearest_code,
    pack_indices,
    vector_quantize,
)
from mmfast.registry import OPS, Arguments, Op, Sample

triton = pytest.importorskip("triton")
if not interpreting() and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
if interpreting():
    import quick_interpreter  # noqa: F401

# numpy, which the interpreter computes with, warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = device_of("triton")
TRITON_OPS = {name: op for name, op in OPS.items() if "triton" in op.backends}
MOST_ELEMENTS = 3_000_000  # product of the sizes of what is interpreted, or computed by numpy

REPEATED = {
    test_nearest_code: (
        "dtypes",
        "heads",
        "leading_dimensions",
        "lowest_index_on_ties",
        "nan_row_gets_the_first_index_and_nan",
        "no_heads",
        "numbers_of_vectors",
    ),
    test_code_statistics: (
        "dtypes",
        "heads",
        "indices_out_of_range_are_left_out",
        "nan_and_infinity_stay_with_their_code",
        "no_heads",
        "no_loss_in_long_sums",
        "strides",
    ),
    test_randn: (
        "definition",
        "kolmogorov_smirnov",
        "one_stream_appends",
        "samples_do_not_see_the_batch",
    ),
    test_residual_quantize: (
        "dtypes",
        "gradients",
        "mask",
        "nan_rows",
        "one_stage_is_vector_quantize",
    ),
    test_sample_code: (
        "definition",
        "dtypes_and_strides",
        "nan_and_infinity",
        "no_vectors",
        "samples_do_not_see_the_batch",
        "temperatures",
        "zero_vectors",
    ),
    test_finite_scalar_quantize: (
        "every_level_is_reached",
        "gradient_of_nan_with_noise",
        "few_vectors",
        "images",
        "levels_change_at_the_thresholds",
        "nan_and_infinity",
    ),
    test_lookup_free_quantize: (
        "few_vectors",
        "many_bits",
        "masked_vectors_may_be_anything",
        "signs",
        "strides",
        "without_losses",
    ),
    test_pack_indices: ("rows_by_themselves",),
    test_soft_assignment_statistics: (
        "bool_weights_are_a_mask",
        "extreme_logits",
        "not_finite",
        "nothing_to_average",
        "only_what_is_asked_for",
        "zero_vectors_have_no_cosine",
    ),
    test_sampler_step: (
        "a_counter_on_the_device_goes_on_by_itself",
        "any_table",
        "dynamic_threshold",
        "half_precision_is_rounded_once",
        "layouts",
        "nan_stays_nan",
        "noise_of_a_sample_does_not_depend_on_the_batch",
        "one_seed_is_one_stream",
        "out_may_be_x",
        "samples_at_their_own_steps",
        "slots_that_move",
        "step_out_of_range_is_nan_on_a_device",
        "what_has_no_weight_is_not_read",
    ),
    test_guidance_factors: (
        "a_large_offset_costs_no_precision",
        "projected_guidance_with_momentum",
        "rows_without_a_prediction_are_nan_on_a_device",
        "threshold_of_nan_and_infinity",
        "zeros_and_nan",
    ),
    test_gated_activation: (
        "error_is_at_most_twice_torchs",
        "gated_linear_units",
        "gradients",
        "halves_are_the_same_packed_or_not",
        "hard_values",
        "layouts",
        "only_what_is_asked_for",
    ),
    test_patchify: (
        "channels_first_is_a_convolution",
        "channels_last_is_dits",
        "inverse_and_gradients",
        "layouts",
    ),
    test_add_noise: (
        "any_problem",
        "gradients",
        "half_precision_is_rounded_once",
        "layouts",
        "noise_of_a_sample_does_not_depend_on_the_batch",
        "one_seed_is_one_stream",
        "targets",
        "timestep_out_of_range_is_nan_on_a_device",
    ),
    test_scaled_dot_product_attention: (
        "dropout_of_nothing_and_of_everything",
        "empty",
        "expanded_keys",
        "leading_dimensions_broadcast",
        "rows_that_attend_to_nothing",
        "strides_of_masks",
    ),
    test_joint_attention: ("gradients_of_one_output", "text_beyond_its_length_is_not_read"),
    test_varlen_attention: ("any_cu_seqlens_stay_in_range", "tokens_of_no_sequence"),
    test_vector_quantize: (
        "gradients",
        "half_precision_keeps_its_dtype",
        "mask",
        "only_what_is_asked_for",
    ),
}
if interpreting():
    for module, names in REPEATED.items():
        of = module.__name__.removeprefix("test_")
        globals().update({f"test_{of}_{name}": getattr(module, f"test_{name}") for name in names})


@pytest.fixture
def backend():
    """What the repeated tests run."""
    with mmfast.use_backend("triton"):
        yield "triton"


def run(op: Op, *arguments: Any) -> tuple[Tensor, ...]:
    """The result of the Triton kernels."""
    with mmfast.use_backend("triton"):
        return op.result(functools.partial(backends.call, op), arguments)


def on_device(*arguments: Any) -> tuple[Any, ...]:
    return tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments)


def small(sample: Sample) -> bool:
    return math.prod(sample.shape.values()) <= MOST_ELEMENTS


def variants(op: Op, arguments: Arguments) -> list[Arguments]:
    """``arguments``, with every metric where there is one."""
    if op is nearest_code.OP:
        return [(*arguments[:2], metric) for metric in METRICS]
    if op is vector_quantize.OP and arguments[3] == "straight_through":
        # Whose distances are squared errors, and whose are not.
        return [(*arguments[:2], metric, *arguments[3:]) for metric in ("euclidean", "dot")]
    return [arguments]


def sample_of(op: Op, seed: int) -> Arguments:
    """A small sample with a few of everything."""
    samples = [s for s in op.samples() if small(s)]
    sizes = [min(s.shape["N"], s.shape["D"]) for s in samples]
    sample = samples[next((i for i, n in enumerate(sizes) if n > 30), sizes.index(max(sizes)))]
    return sample.make(DEVICE, torch.float32, seed)


# Heads as the first dimension of all tensors, not somewhere inside.
WITH_HEADS = [
    op
    for name, op in TRITON_OPS.items()
    if any(s.shape.get("H", 1) > 1 for s in op.samples())
    and not name.removesuffix("_bwd").endswith(("attention", "qk_norm_rope"))
]

each_op = pytest.mark.parametrize("op", TRITON_OPS.values(), ids=TRITON_OPS.keys())


def dtypes_of(op: Op, i: int) -> tuple[torch.dtype, ...]:
    """Those of sample ``i``: all, but in the interpreter two, which its samples take in turns."""
    n = len(op.dtypes)
    return (op.dtypes[i % n], op.dtypes[(i + 1) % n])[:n] if interpreting() else op.dtypes


# The first small sample of every op, the second, and so on: what is cut off has seen all ops.
SAMPLES = sorted(
    (
        (sample.bench, i, op, sample)
        for op in TRITON_OPS.values()
        for i, sample in enumerate(op.samples())
        if small(sample) or not interpreting()
    ),
    key=lambda given: given[:2],
)


@pytest.mark.parametrize(
    ("op", "sample", "dtypes"),
    [
        pytest.param(op, sample, dtypes_of(op, i), id=f"{op.name}-{sample.name}")
        for _, i, op, sample in SAMPLES
    ],
)
def test_samples(op, sample, dtypes):
    for dtype in dtypes:
        for arguments in variants(op, sample.make(DEVICE, dtype, 0)):
            result = run(op, *arguments)
            assert op.compare(result, arguments) == [], (dtype, arguments[-1])
            if op is nearest_code.OP and small(sample):
                assert not complaints(result, *arguments), (dtype, arguments[-1])


@each_op
def test_use_backend_runs_triton(op, monkeypatch):
    launch: Callable[..., Any] = op.backends["triton"].load()
    module = importlib.import_module(launch.__module__)
    results = []

    def spy(*arguments: Any) -> Any:
        results.append(launch(*arguments))
        return results[-1]

    monkeypatch.setattr(module, launch.__name__, spy)
    arguments = sample_of(op, seed=0)
    with torch.no_grad(), mmfast.use_backend("triton"):
        result = backends.call(op, *arguments)
    assert result is results[-1]
    results.clear()
    with mmfast.use_backend("reference"):
        backends.call(op, *arguments)
    assert results == []


@each_op
def test_repeated_runs(op):
    for arguments in variants(op, sample_of(op, seed=0)):
        assert_same_bits(run(op, *arguments), run(op, *arguments))


def check_nearest(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> None:
    test_nearest_code.check("triton", x, codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
def test_nearest_code_hard_data(name, metric):
    for d in (3, 18):
        check_nearest(*HARD[name](20, 130, d), metric)


@pytest.mark.skipif(not interpreting(), reason="tiles of the interpreter; a GPU's are searched")
@pytest.mark.parametrize(
    ("columns", "tma", "ahead"),
    [(128, False, False), (64, True, False), (64, True, True)],
)
@pytest.mark.parametrize("name", HARD)
def test_nearest_code_other_tiles(name, columns, tma, ahead):
    """Codes by pointers, as where there are no descriptors, half as many of them at a time, and
    products that begin before the scores of the tile before are compared."""
    from mmfast.kernels import nearest_code
    from mmfast.kernels.nearest_code_tiles import config

    again = config((32, columns, 4), 2, tma=tma)
    first = config((32, columns, 4), 2, tma=tma, ahead=ahead)
    with nearest_code._screen.forcing(first), nearest_code._screen_again.forcing(again):
        check_nearest(*HARD[name](20, 200, 24))
        if ahead and name == "mixed magnitudes":
            for d, metric in ((64, "dot"), (100, "cosine"), (200, "euclidean")):
                check_nearest(*HARD[name](9, 130, d), metric)


@pytest.mark.parametrize("name", HARD)
def test_nearest_code_hard_data_in_float64(name):
    x, codebook = HARD[name](20, 130, 9)
    jitter = 1 + 1e-12 * normal(*codebook.shape, seed=9, dtype=torch.float64)
    check_nearest(x.double(), codebook.double() * jitter)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 2, 3, 5, 15, 16, 17, 33, 65, 257, 520])
def test_nearest_code_dimensions(d, metric):
    check_nearest(normal(9, d), normal(20, d, seed=1), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("k", "d"), [(1, 5), (2, 5), (64, 5), (65, 5), (129, 300), (300, 1)])
def test_nearest_code_numbers_of_codes(k, d, metric):
    check_nearest(normal(20, d), normal(k, d, seed=1), metric)


@pytest.mark.parametrize("codes", VIEWS)
@pytest.mark.parametrize("vectors", VIEWS)
def test_nearest_code_strides(vectors, codes):
    for dtype, metric in ((torch.float32, "euclidean"), (torch.float16, "cosine")):
        x = VIEWS[vectors](normal(33, 19, dtype=dtype))
        check_nearest(x, VIEWS[codes](normal(40, 19, seed=1, dtype=dtype)), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nearest_code_nan_and_infinity(value, metric):
    for d in (3, 19):
        x, codebook = normal(12, d), normal(70, d, seed=1)
        bad_x, bad_codebook = x.clone(), codebook.clone()
        bad_x[[3, 11], d // 2] = value
        bad_codebook[[5, 69], d // 2] = value
        check_nearest(bad_x, codebook, metric)
        check_nearest(x, bad_codebook, metric)
        check_nearest(bad_x, bad_codebook, metric)
        check_nearest(torch.full_like(x, value), codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e60, 1e-60, 1e-310])
def test_nearest_code_float64_beyond_float32(scale, metric):
    x = normal(12, 9, dtype=torch.float64) * scale
    codebook = normal(70, 9, seed=1, dtype=torch.float64) * scale
    check_nearest(x, codebook, metric)
    check_nearest(normal(12, 9), codebook, metric)


@pytest.mark.parametrize("name", HARD)
def test_nearest_code_batches(name):
    x, codebook = on_device(*HARD[name](70, 130, 5))
    for metric in METRICS if name == "mixed magnitudes" else METRICS[:1]:
        whole = run(nearest_code.OP, x, codebook, metric)
        for rows in (slice(0, 1), slice(1, 60)):
            part = run(nearest_code.OP, x[rows], codebook, metric)
            assert_same_bits(part, [t[rows] for t in whole])


@pytest.mark.parametrize("op", WITH_HEADS, ids=[op.name for op in WITH_HEADS])
def test_heads_are_independent(op):
    sample = next(s for s in op.samples() if s.shape.get("H", 1) > 1)
    for arguments in variants(op, sample.make(DEVICE, torch.float32, 0)):
        together = run(op, *arguments)
        for head in range(sample.shape["H"]):
            own = [a[head] if isinstance(a, Tensor) else a for a in arguments]
            assert_same_bits(run(op, *own), [t[head] for t in together])


@settings(max_examples=30)
@given(problem=test_nearest_code.problems())
def test_any_nearest_code_problem(problem):
    check_nearest(*problem)


def check_statistics(*arguments: Any) -> None:
    test_code_statistics.check("triton", *arguments)


def shuffled(lengths: list[int], seed: int = 0) -> Tensor:
    """Indices of codes that have so many vectors."""
    indices = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return indices[order]


# Chunks are of 256 vectors.
SKEWED = {
    "all in one": [1000],
    "all in the last of many": [0] * 20 + [1000],
    "a chunk": [256],
    "chunks": [256, 256, 256],
    "around chunks": [255, 1, 256, 257, 255, 0, 1],
    "one more than a chunk": [257],
    "one less than two": [511],
    "two chunks inside": [100, 412 + 256, 100],
    "two chunks without a whole one": [1, 510, 1],
    "empty between whole chunks": [0, 512, 0, 0, 3, 0],
    "more chunks than rows of a block": [5, 256 * 19],
    "a vector each": [1] * 40,
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lengths", SKEWED.values(), ids=SKEWED.keys())
def test_code_statistics_skewed(lengths, weighted):
    indices = shuffled(lengths)
    n = len(indices)
    weights = normal(n, seed=2) if weighted else None
    for d in (1, 9, 130):
        check_statistics(normal(n, d), indices, len(lengths), weights)
    check_statistics(normal(n, 5), torch.where(indices == 0, -1, indices), len(lengths), weights)


@pytest.mark.parametrize("weighted", [False, True])
def test_code_statistics_heads_of_chunks(weighted):
    indices = torch.stack([shuffled([300, 300, 100]), shuffled([0, 0, 700]), shuffled([700, 0, 0])])
    x = normal(3, 700, 5)
    weights = normal(3, 700, seed=2) if weighted else None
    check_statistics(x, indices, 3, weights)
    x, indices, weights = on_device(x, indices, weights)
    together = run(code_statistics.OP, x, indices, 3, weights)
    for head in range(3):
        own = None if weights is None else weights[head]
        alone = run(code_statistics.OP, x[head], indices[head], 3, own)
        assert_same_bits(alone, [t[head] for t in together])


@pytest.mark.parametrize("d", [0, 1, 2, 7, 16, 64, 65, 257])
@pytest.mark.parametrize("n", [0, 1, 2, 31, 300])
def test_code_statistics_sizes(n, d):
    for k in (1, 2, 17):
        check_statistics(normal(n, d), test_code_statistics.random_indices(n, k), k)


# Narrow keys are for few codes; each width has its turn on as few.
@pytest.mark.parametrize("key", [torch.int16, torch.int32, torch.int64], ids=str)
def test_code_statistics_keys(key, monkeypatch):
    from mmfast.kernels import code_statistics as kernels

    monkeypatch.setattr(kernels, "KEY_DTYPES", (key,))
    indices = test_code_statistics.random_indices(300, 9) - 1
    check_statistics(normal(300, 5), indices, 7)
    check_statistics(normal(300, 5), indices.int(), 7)


@pytest.mark.skipif(interpreting(), reason="the interpreter takes minutes")
@pytest.mark.parametrize("k", [32766, 32767, 32768, 100_000])
def test_code_statistics_many_codes(k):
    check_statistics(normal(300, 5), test_code_statistics.random_indices(300, k), k)
    check_statistics(normal(300, 5), torch.arange(k - 298, k + 2), k)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_code_statistics_bits_do_not_depend_on_strides(view, dtype):
    indices = shuffled([5, 600, 0, 70]).to(DEVICE)
    # Magnitudes for which another order of additions gives another sum.
    x = normal(675, 19) * 10 ** normal(675, 1, seed=3)
    x = VIEWS[view](x.to(DEVICE, dtype))
    weights = (normal(675, 2, seed=2) * 10 ** normal(675, 1, seed=4)).to(DEVICE, dtype)[:, 1]
    apart = torch.stack([indices, indices], 1)[:, 1]
    for w in (None, weights):
        flat = None if w is None else w.contiguous()
        expected = run(code_statistics.OP, x.contiguous(), indices, 4, flat)
        assert_same_bits(run(code_statistics.OP, x, apart, 4, w), expected)


def test_code_statistics_adds_nothing_of_other_codes():
    x = torch.full((300, 3), torch.nan)
    indices = shuffled([280, 20])
    x[indices == 1] = 1.0
    counts, sums = run(code_statistics.OP, *on_device(x, indices), 3, None)
    assert counts.tolist() == [280, 20, 0]
    assert sums[0].isnan().all()
    assert sums[1:].tolist() == [[20] * 3, [0] * 3]


@settings(max_examples=30)
@given(problem=test_code_statistics.problems())
def test_any_code_statistics_problem(problem):
    check_statistics(*problem)


def check_op(op: Op, *arguments: Any) -> tuple[Tensor, ...]:
    """The result, which the op's own comparison accepts."""
    arguments = on_device(*arguments)
    result = run(op, *arguments)
    assert op.compare(result, arguments) == []
    return result


def backward_of(arguments: Arguments, seed: int = 5) -> Arguments:
    """Arguments of the gradients of a vector_quantize, random where they come from outside."""
    x, codebook, _, gradient, _ = arguments
    output = vector_quantize.reference(*arguments)
    outputs = (output[0], *output[2:4])
    grads = [normal(t.numel(), seed=seed).view(t.shape).to(t) for t in outputs]
    return *grads, x, codebook, output[1], output[4], gradient, True, True


PASSED_ON = ("straight_through", "rotation", "none")


def check_quantize(x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> None:
    """Forward, which they all share, and the backward of each gradient."""
    check_op(vector_quantize.OP, x, codebook, metric, "none", mask)
    for gradient in PASSED_ON:
        check_op(vector_quantize.BACKWARD, *backward_of((x, codebook, metric, gradient, mask)))


@pytest.mark.parametrize(("n", "k", "d"), [(40, 3, 257), (300, 2, 1)])
def test_vector_quantize_sizes(n, k, d):
    check_quantize(normal(n, d), normal(k, d, seed=1), "dot", normal(n, seed=3) < 1)


def test_vector_quantize_more_blocks_and_codes_than_are_finished_at_once(monkeypatch):
    from mmfast.kernels import vector_quantize as kernels

    monkeypatch.setattr(kernels, "_FINISH", 4)
    x, codebook = normal(2, 40, 130), normal(2, 9, 130, seed=1)
    for mask in (None, normal(2, 40, seed=3) < 1):
        check_op(vector_quantize.OP, x, codebook, "euclidean", "none", mask)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_vector_quantize_nan_and_infinity(metric):
    x, codebook = normal(12, 5), normal(9, 5, seed=1)
    x[[3, 4, 11], 2] = torch.tensor([math.nan, math.inf, math.nan])
    mask = torch.arange(12) != 11
    check_quantize(x, codebook, metric, mask)
    codebook[7, 1] = -math.inf
    check_quantize(x, codebook, metric, mask)


def test_vector_quantize_masked_rows_pass_whatever_they_hold():
    x = normal(6, 3)
    x[4] = math.nan
    mask = torch.tensor([True, True, False, True, False, True])
    arguments = on_device(x, normal(4, 3, seed=1), "euclidean", "rotation", mask)
    quantized, indices, loss, _, counts = run(vector_quantize.OP, *arguments)
    assert quantized[4].isnan().all()
    assert indices[[2, 4]].tolist() == [-1, -1]
    assert loss.isfinite()
    assert counts.sum() == 4
    grad_x, grad_codebook = run(vector_quantize.BACKWARD, *backward_of(arguments))
    assert grad_x.isfinite().all()
    assert grad_codebook.isfinite().all()


@pytest.mark.parametrize("view", VIEWS)
def test_vector_quantize_bits_do_not_depend_on_strides(view):
    codebook, grad = normal(9, 20, seed=1), VIEWS[view](normal(40, 20, seed=4)).to(DEVICE)
    apart = torch.stack([normal(40, seed=3) < 0.5, torch.zeros(40, dtype=torch.bool)], 1)[:, 0]
    for gradient, metric in (("rotation", "dot"), ("none", "euclidean")):
        x, codes, mask = VIEWS[view](normal(40, 20)), VIEWS[view](codebook), apart
        x, codes, mask = on_device(x, codes, mask)
        strided = (x, codes, metric, gradient, mask)
        dense = (x.contiguous(), codes.contiguous(), metric, gradient, mask.contiguous())
        expected = run(vector_quantize.OP, *dense)
        assert_same_bits(run(vector_quantize.OP, *strided), expected)
        given = grad, expected[2], expected[3]
        saved = expected[1], expected[4], gradient, True, True
        assert_same_bits(
            run(vector_quantize.BACKWARD, *given, *strided[:2], *saved),
            run(vector_quantize.BACKWARD, given[0].contiguous(), *given[1:], *dense[:2], *saved),
        )


def test_vector_quantize_bwd_of_expanded_gradients():
    arguments = on_device(normal(2, 30, 6), normal(2, 5, 6, seed=1), "euclidean", "none", None)
    _, _, _, *saved = backward_of(arguments)
    one = torch.ones((), device=DEVICE)
    check_op(vector_quantize.BACKWARD, one.expand(2, 30, 6), one.expand(2), one.expand(2), *saved)


@pytest.mark.parametrize("gradient", PASSED_ON)
def test_vector_quantize_bwd_of_some_gradients(gradient):
    arguments = on_device(normal(30, 6), normal(5, 6, seed=1), "euclidean", gradient, None)
    *given, x, codebook, indices, counts, _, _, _ = backward_of(arguments)
    saved = x, codebook, indices, counts, gradient
    for which in range(8):
        some = [g if which & (1 << i) else None for i, g in enumerate(given)]
        check_op(vector_quantize.BACKWARD, *some, *saved, True, True)
    check_op(vector_quantize.BACKWARD, *given, *saved, True, False)
    check_op(vector_quantize.BACKWARD, *given, *saved, False, True)


# Beside the direction of the code, and exactly against it, where x and the code cancel; of vectors
# without a direction too.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("d", [1, 3, 70])
def test_vector_quantize_bwd_rotation_between_extremes(d, dtype):
    x = normal(24, d).to(dtype)
    codebook = torch.cat([x[:8] * 3, -x[8:16] * 0.5, x[16:20] * 0, x[20:] * -1e-3]).to(dtype)
    x[17] = 0
    indices, counts = torch.arange(24), torch.ones(24, dtype=nearest_code.output_dtype(x, codebook))
    grad = normal(24, d, seed=2).to(dtype)
    saved = x, codebook, indices, counts, "rotation", True, False
    check_op(vector_quantize.BACKWARD, grad, None, None, *saved)


def test_vector_quantize_bwd_keeps_differences_to_codes_far_from_zero():
    x, codebook = 1e4 + normal(600, 3), 1e4 + normal(2, 3, seed=1)
    check_quantize(x, codebook, "euclidean", None)


def test_vector_quantize_bwd_leaves_out_indices_out_of_range():
    arguments = on_device(normal(30, 6), normal(5, 6, seed=1), "euclidean", "none", None)
    *given, x, codebook, indices, counts, gradient, _, _ = backward_of(arguments)
    inside, outside = indices.clone(), indices.clone()
    inside[::3], outside[::3] = -1, 1 << 40
    for need in ((True, False), (False, True)):
        results = [
            run(vector_quantize.BACKWARD, *given, x, codebook, i, counts, gradient, *need)
            for i in (inside, outside)
        ]
        assert_same_bits(*results)


@st.composite
def quantize_problems(draw) -> Arguments:
    """What ``check_quantize`` takes."""
    n, k, d, heads = (draw(st.integers(*limits)) for limits in ((1, 40), (1, 12), (1, 20), (0, 2)))
    lead = (heads,) if heads else ()
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    x = normal(*lead, n, d).to(draw(dtypes))
    codebook = normal(*lead, k, d, seed=1).to(draw(dtypes))
    mask = normal(*lead, n, seed=3) < draw(st.floats(-1, 1)) if draw(st.booleans()) else None
    return x, codebook, draw(st.sampled_from(METRICS)), mask


@settings(max_examples=8)
@given(problem=quantize_problems())
def test_any_vector_quantize_problem(problem):
    check_quantize(*problem)


def averages(heads: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Codebook, sizes, sums, counts and sums of a batch, positive where they must be."""
    shapes = ((heads, k, d), (heads, k), (heads, k, d), (heads, k), (heads, k, d))
    tensors = [normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    return [t.abs() if t.dim() == 2 else t for t in tensors]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_ema_update_decays(decay, normalize):
    # 0.8 and 1e-5, rounded to float32, would differ in float64.
    for dtype in (torch.float32, torch.float64):
        check_op(ema_update.OP, *averages(2, 9, 5, dtype), decay, 1e-5, normalize)


@pytest.mark.parametrize(("k", "d"), [(3, 257), (2, 520), (1030, 2)])
def test_ema_update_sizes(k, d):
    for normalize in (False, True):
        check_op(ema_update.OP, *averages(1, k, d), 0.9, 1e-5, normalize)


def test_ema_update_more_blocks_than_it_adds_at_once(monkeypatch):
    from mmfast.kernels import ema_update as kernels

    monkeypatch.setattr(kernels, "_SIZES", 4)
    check_op(ema_update.OP, *averages(2, 23, 5), 0.9, 1e-5, False)


def test_ema_update_of_a_codebook_never_used():
    codebook, size, total, counts, sums = averages(2, 9, 5)
    size[1], counts[1] = 0, 0
    codes, *_ = check_op(ema_update.OP, codebook, size, total, counts, sums, 0.9, 1e-5, False)
    assert torch.equal(codes[1], codebook[1].to(DEVICE))


def test_ema_update_nan_and_infinity():
    for value in (math.nan, math.inf):
        for which in range(5):
            tensors = averages(2, 9, 5)
            tensors[which][0, 3] = value
            for normalize in (False, True):
                check_op(ema_update.OP, *tensors, 0.9, 1e-5, normalize)


@pytest.mark.parametrize("view", VIEWS)
def test_ema_update_bits_do_not_depend_on_strides(view):
    dense = averages(1, 40, 19)
    matrices = (VIEWS[view](t[0])[None] if t.dim() == 3 else t for t in dense)
    strided = [t if t.dim() == 3 else torch.stack([t, -t], 2)[..., 0] for t in matrices]
    strided = list(on_device(*strided))
    for normalize in (False, True):
        expected = run(ema_update.OP, *(t.contiguous() for t in strided), 0.9, 1e-5, normalize)
        assert_same_bits(run(ema_update.OP, *strided, 0.9, 1e-5, normalize), expected)


# Up to a tile and beyond it, in rows that fill it and rows that do not.
@pytest.mark.parametrize("levels", [(9,), (3, 4), (8, 5, 5, 5), (3,) * 9, (2,) * 30], ids=str)
def test_finite_scalar_quantize_sizes(levels):
    variant = "symmetric" if min(levels) < 3 else "bound"
    for n in (1, 15, 128, 129, 300):
        z = normal(n, len(levels))
        check_op(finite_scalar_quantize.OP, z, list(levels), variant, False, None)
        grad = normal(n, len(levels), seed=1)
        check_op(finite_scalar_quantize.BACKWARD, grad, z, list(levels), variant, False, None)


@pytest.mark.parametrize("view", VIEWS)
def test_finite_scalar_quantize_strides_of_all(view):
    z, grad, noise = (VIEWS[view](normal(300, 5, seed=i)) for i in range(3))
    others = [8, 5, 5, 5, 3], "symmetric", True, noise.double()
    check_op(finite_scalar_quantize.OP, z, *others)
    check_op(finite_scalar_quantize.BACKWARD, grad, z, *others)
    check_op(finite_scalar_quantize.BACKWARD, grad[:1, :1].expand(300, 5), z, *others)


def test_lookup_free_quantize_more_vectors_than_are_summed_at_once(monkeypatch):
    from mmfast.kernels import lookup_free_quantize as kernels

    check_op(lookup_free_quantize.OP, normal(1100, 2), 1, 1.0, False, 10.0, 2, None)
    monkeypatch.setattr(kernels, "_SLICE", 64)
    mask = normal(200, seed=1) < 1
    check_op(lookup_free_quantize.OP, normal(200, 3), 1, 1.0, True, 10.0, 3, mask)


@pytest.mark.parametrize("given", range(5))
def test_lookup_free_quantize_gradients_of_some(given):
    z = normal(40, 12).to(DEVICE)
    others = 2, 1.0, given % 2 == 0, 10.0, 3, normal(40, seed=1).to(DEVICE) < 0.5
    quantized, _, *losses = lookup_free_quantize.reference(z, *others)
    grads = [normal(t.numel(), seed=2).view(t.shape).to(t) for t in (quantized, *losses)]
    grads = [g if i == given else None for i, g in enumerate(grads)]
    check_op(lookup_free_quantize.BACKWARD, *grads, z, *others)


# More bits of a half than a tile has codes.
def test_lookup_free_quantize_tiles_of_a_table():
    z = normal(40, 13)
    arguments = z, 1, 1.0, False, 1.0, 13, None
    _, _, _, _, means = check_op(lookup_free_quantize.OP, *arguments)
    check_op(
        lookup_free_quantize.BACKWARD, None, None, None, normal(*means.shape), z, *arguments[1:]
    )


@pytest.mark.parametrize("bits", [1, 3, 5, 8, 10, 13, 16, 17, 31, 32])
def test_pack_indices_bits(bits):
    for shape, dtypes in (((1100,), pack_indices.OP.dtypes), ((40, 5), (torch.int64,))):
        for dtype in dtypes:
            most = min(1 << bits, torch.iinfo(dtype).max)
            generator = torch.Generator().manual_seed(bits)
            indices = torch.randint(most, shape, generator=generator).to(dtype)
            packed = check_op(pack_indices.OP, indices, bits)
            check_op(pack_indices.INVERSE, packed, bits, shape[-1])


@pytest.mark.parametrize("view", VIEWS)
def test_pack_indices_strides(view):
    indices = VIEWS[view](normal(30, 40)).mul(10).long() & 31
    check_op(pack_indices.OP, indices, 5)
    packed = VIEWS[view](normal(30, 25)).mul(100).to(torch.int64).to(torch.uint8)
    check_op(pack_indices.INVERSE, packed, 5, 40)
    # Bytes that begin where no word may.
    check_op(pack_indices.INVERSE, packed.flatten()[1:726], 5, 1160)


# One part, two parts, and one that is filled up.
@pytest.mark.parametrize("num_dims", [72, 120, 256])
def test_scaled_dot_product_attention_head_sizes(num_dims):
    attention = test_scaled_dot_product_attention
    with mmfast.use_backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            attention.check("triton", *attention.qkv(1, 1, 70, num_dims, 33, dtype=dtype))


@pytest.mark.parametrize("is_causal", [False, True])
def test_scaled_dot_product_attention_more_than_a_block(is_causal):
    attention = test_scaled_dot_product_attention
    with mmfast.use_backend("triton"):
        for length, keys in ((70, 140), (140, 64)):
            tensors = attention.qkv(1, 1, length, 16, keys)
            attention.check("triton", *tensors, is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_dot_product_attention_layouts(dtype):
    with mmfast.use_backend("triton"):
        test_scaled_dot_product_attention.test_layouts("triton", dtype)


def test_scaled_dot_product_attention_heads_too_wide():
    refused = pytest.raises(mmfast.BackendError, match="head sizes may be up to 256, got 264")
    with mmfast.use_backend("triton"), refused:
        mmfast.scaled_dot_product_attention(*[torch.zeros(1, 1, 3, 264, device=DEVICE)] * 3)


# As on a GPU, where programs go from tile to tile.
@pytest.mark.skipif(not interpreting(), reason="is so on every GPU")
@pytest.mark.parametrize(
    "name",
    [
        "gated_residual_modulate",
        "gated_residual_modulate_bwd",
        "layer_norm_modulate",
        "gated_residual",
        "qk_norm_rope",
        "qk_norm_rope_bwd",
    ],
)
def test_programs_of_many_tiles(name, monkeypatch):
    from mmfast.kernels import gated_residual_modulate as chain
    from mmfast.kernels import qk_norm_rope as heads

    monkeypatch.setattr(chain, "_stages", lambda *_: 2)
    monkeypatch.setattr(heads, "pipelined", lambda: True)
    monkeypatch.setattr(heads, "device_kind", lambda: "sm_90")
    monkeypatch.setattr(heads, "_MOST_PARTS", 3)
    for sample in [s for s in OPS[name].samples() if small(s) and not s.bench]:
        check_op(OPS[name], *sample.make(DEVICE, torch.float32, 0))


@pytest.mark.parametrize("name", ["qk_norm_rope", "qk_norm_rope_bwd"])
def test_heads_in_memory_that_32_bits_do_not_count(name, monkeypatch):
    from mmfast.kernels import qk_norm_rope as heads

    monkeypatch.setattr(heads, "_FAR", 0)
    for sample in [s for s in OPS[name].samples() if small(s) and not s.bench][::4]:
        check_op(OPS[name], *sample.make(DEVICE, torch.float32, 0))


def test_sampler_step_many_blocks_of_a_program():
    from mmfast.ops import sampler_step

    for kind, shape in (("multistep", (2, 4500)), ("sde", (1, 9000))):
        check_op(
            OPS["sampler_step"], *sampler_step._sample(kind, shape).make(DEVICE, torch.float32, 0)
        )


@pytest.mark.cuda
@pytest.mark.skipif(interpreting(), reason="not in the interpreter")
class TestOnTheGpu:
    """What only a device can show."""

    @each_op
    def test_no_synchronisation(self, op):
        for arguments in variants(op, sample_of(op, seed=0)):
            run(op, *arguments)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(op, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode(before)

    @each_op
    def test_graph_capture(self, op):
        for arguments, others in zip(
            variants(op, sample_of(op, seed=0)), variants(op, sample_of(op, seed=1)), strict=True
        ):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(op, *arguments)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run(op, *arguments)
            for old, new in zip(arguments, others, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
            graph.replay()
            assert_same_bits(captured, run(op, *others))

    def test_sizes_do_not_recompile(self, monkeypatch):
        compiled = []

        def hook(*, fn: Any, **_: Any) -> None:
            compiled.append(fn.name)

        def call(n: int, k: int) -> None:
            x, codebook = on_device(normal(n, 24), normal(k, 24, seed=1))
            for metric in METRICS:
                indices, _ = run(nearest_code.OP, x, codebook, metric)
            counts, sums = run(code_statistics.OP, x, indices, k, None)
            run(ema_update.OP, codebook, counts, sums, counts, sums, 0.9, 1e-5, True)
            for gradient in PASSED_ON:
                forward = x, codebook, "dot", gradient, indices % 2 == 0
                run(vector_quantize.OP, *forward)
                run(vector_quantize.BACKWARD, *backward_of(forward))

        call(513, 65)
        monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
        for n, k in ((1, 1), (16, 16), (17, 2), (512, 64), (4096, 999)):
            call(n, k)
        assert compiled == []
        run(nearest_code.OP, *on_device(normal(9, 7), normal(9, 7)), "dot")
        assert compiled, "the hook sees nothing"

    def test_offsets_beyond_32_bits(self):
        step = 2**30 + 8
        buffer = torch.empty(3 * step, dtype=torch.float16, device="cuda")
        for shape, strides in (((3, 5), (step, 1)), ((5, 3), (1, step))):
            x = buffer.as_strided(shape, strides)
            x.copy_(normal(*shape))
            codebook, indices = on_device(normal(7, shape[1]), torch.arange(shape[0]) % 2)
            for op, arguments, strided in (
                (nearest_code.OP, (x, codebook, "euclidean"), 0),
                (nearest_code.OP, (codebook, x, "cosine"), 1),
                (code_statistics.OP, (x, indices, 2, None), 0),
                (vector_quantize.OP, (x, codebook, "dot", "none", None), 0),
            ):
                dense = list(arguments)
                dense[strided] = x.contiguous()
                assert_same_bits(run(op, *arguments), run(op, *dense))
