"""Attention in C++ around its blocks of queries and chunks of keys, and where both are cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import backends_here, normal
from test_determinism import assert_same_bits
from torch import Tensor

import mmfast
from mmfast import backends
from mmfast.ops import joint_attention, varlen_attention
from mmfast.ops import scaled_dot_product_attention as attention
from mmfast.registry import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

pytestmark = pytest.mark.skipif(
    "cpp" not in backends_here(attention.OP), reason="the compiled extension is absent"
)


def problem(
    heads: int,
    length: int,
    keys: int,
    num_dims: int,
    *,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Arguments of the op."""
    kv_heads = heads if kv_heads is None else kv_heads
    query = normal(1, heads, length, num_dims, seed=1, dtype=dtype)
    key = normal(1, kv_heads, keys, num_dims, seed=2, dtype=dtype)
    value = normal(1, kv_heads, keys, num_dims, seed=3, dtype=dtype)
    stream = (torch.tensor(3), torch.tensor(1)) if dropout_p else (None, None)
    factor = 1 / math.sqrt(num_dims) if scale is None else scale
    return query, key, value, mask, dropout_p, is_causal, factor, *stream


def run(op: Op, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """In C++."""
    with mmfast.use_backend("cpp"):
        return backends.call(op, *arguments)


def check(arguments: tuple[Any, ...]) -> None:
    """Outputs and sums are within what the specification allows."""
    assert attention.compare(run(attention.OP, arguments), arguments) == []


# Blocks have 64 queries, tasks 256 of them, chunks 256 keys.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("length", "keys"),
    [(63, 255), (64, 256), (65, 257), (257, 64), (300, 300), (17, 770), (511, 1), (1, 513)],
)
def test_lengths_around_blocks(length, keys, is_causal, dtype):
    check(problem(2, length, keys, 20, is_causal=is_causal, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_share_blocks(dtype):
    check(problem(12, 30, 300, 8, kv_heads=2, dtype=dtype))
    check(problem(12, 1, 300, 8, kv_heads=1, is_causal=True, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("added", [False, True])
def test_scales_that_are_not_positive(added, scale, dtype):
    mask = normal(1, 1, 40, 70).to(dtype) if added else normal(1, 1, 40, 70) < 0.5
    check(problem(1, 40, 70, 9, mask=mask, scale=scale, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_without_keys_are_passed_over(dtype):
    """Their numbers, which may be anything, are of no consequence."""
    mask = torch.ones(1, 1, 130, 900, dtype=torch.bool)
    mask[..., 256:512] = False
    mask[:, :, :64, :512] = False
    arguments = problem(2, 130, 900, 24, mask=mask, dtype=dtype)
    check(arguments)
    expected = run(attention.OP, arguments)
    _, key, value, *_ = arguments
    key[:, :, 256:512] = torch.nan
    value[:, :, 256:512] = torch.inf
    assert_same_bits(run(attention.OP, arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"dropout_p": 0.4},
        {"mask": normal(1, 1, 1, 600)},
        {"mask": normal(1, 1, 300, 600) < 1},
    ],
    ids=["plain", "causal", "dropout", "added", "mask"],
)
def test_bits_do_not_depend_on_threads(options, dtype, threads):
    arguments = problem(2, 300, 600, 12, dtype=dtype, **options)
    got = run(attention.OP, arguments)
    torch.set_num_threads(1)
    assert_same_bits(got, run(attention.OP, arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_other_queries(dtype):
    arguments = problem(4, 200, 300, 24, kv_heads=2, dtype=dtype)
    whole = run(attention.OP, arguments)
    for begin, end in ((0, 7), (37, 101), (190, 200)):
        part = run(attention.OP, (arguments[0][:, :, begin:end], *arguments[1:]))
        assert_same_bits(part, [t[:, :, begin:end] for t in whole])
    few = run(attention.OP, (arguments[0][:, :, :2], *arguments[1:]))
    one = run(attention.OP, (arguments[0][:, :, 1:2], *arguments[1:]))
    assert_same_bits(one, [t[:, :, 1:2] for t in few])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 4, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "kv_heads": 1},
        {"dropout_p": 0.4},
        {"dropout_p": 1.0},
        {"mask": True},
        {"mask": False},
        {"scale": -0.7},
        {"scale": 0.0},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_few_queries(options, length, dtype):
    """They are not gathered into vectors."""
    if "mask" in options:
        mask = normal(1, 2, length, 150)
        mask[..., 64:128] = -math.inf
        options = {"mask": mask > -1 if options["mask"] else mask.to(dtype)}
    for num_dims in (8, 44, 133):
        check(problem(2, length, 150, num_dims, dtype=dtype, **options))
    query, key, value, *rest = problem(2, 7, 150, 24, dtype=dtype, **options)
    packed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    check((packed[0][:, :, :length], packed[1], packed[2], *rest))


@pytest.mark.parametrize("size", [1e-30, 1e3, 1e10, 1e19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_scores(size, dtype):
    """Differences of scores are taken before anything is rounded anew."""
    query, *rest = problem(2, 70, 300, 16, dtype=dtype)
    got, lse = run(attention.OP, (query * size, *rest))
    assert got.isfinite().all()
    assert lse.isfinite().all()
    if size > 1e3:  # one key wins everything
        wanted, _ = attention.reference(
            query.double() * size, *(t.double() for t in rest[:2]), *rest[2:]
        )
        torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [0, 70, 33]])
def test_streams_meet_inside_blocks(lengths, dtype):
    image = [normal(3, h, 300, 16, seed=s, dtype=dtype) for s, h in enumerate((4, 2, 2))]
    text = [normal(3, h, 70, 16, seed=s + 5, dtype=dtype) for s, h in enumerate((4, 2, 2))]
    given = None if lengths is None else torch.tensor(lengths)
    arguments = (*image, *text, given, 0.3)
    assert joint_attention.compare(run(joint_attention.OP, arguments), arguments) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_sequences_of_all_lengths(is_causal, dtype):
    begins = torch.tensor([0, 0, 1, 64, 129, 400, 405])
    begins_k = torch.tensor([0, 5, 6, 70, 70, 450, 720])
    query = normal(405, 4, 12, seed=1, dtype=dtype)
    key, value = (normal(720, 2, 12, seed=s, dtype=dtype) for s in (2, 3))
    arguments = (query, key, value, begins, begins_k, 271, 380, is_causal, 0.3)
    assert varlen_attention.compare(run(varlen_attention.OP, arguments), arguments) == []
