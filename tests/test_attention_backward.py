"""Gradients of attention where keys are cut into parts: bits, few heads, hard scores."""

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
    "cpp" not in backends_here(attention.BACKWARD), reason="the compiled extension is absent"
)


def problem(
    batch: int,
    heads: int,
    length: int,
    keys: int,
    num_dims: int,
    *,
    kv_heads: int | None = None,
    value_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    size: float = 1.0,
) -> tuple[Any, ...]:
    """Arguments of the gradients; ``size``: of queries and keys."""
    kv_heads = heads if kv_heads is None else kv_heads
    value_dims = num_dims if value_dims is None else value_dims
    query = (size * normal(batch, heads, length, num_dims, seed=1)).to(dtype)
    key = (size * normal(batch, kv_heads, keys, num_dims, seed=2)).to(dtype)
    value = normal(batch, kv_heads, keys, value_dims, seed=3, dtype=dtype)
    stream = (torch.tensor(3), torch.tensor(1)) if dropout_p else (None, None)
    options = mask, dropout_p, is_causal, 1 / math.sqrt(num_dims), *stream
    out, lse = attention.reference(query, key, value, *options)
    grad_out = normal(batch, heads, length, value_dims, seed=4, dtype=dtype)
    want = mask is not None and mask.is_floating_point()
    return grad_out, query, key, value, out, lse, *options, want


def run(op: Op, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """In C++."""
    with mmfast.use_backend("cpp"):
        return backends.call(op, *arguments)


def check(arguments: tuple[Any, ...]) -> None:
    """Gradients are within what the specification allows."""
    assert attention.compare_bwd(run(attention.BACKWARD, arguments), arguments) == []


# Lengths around those of blocks of queries (96, 128), of keys (64), and of parts (256).
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "keys"), [(96, 64), (128, 256), (129, 257), (95, 511), (257, 65), (1, 600), (300, 1)]
)
def test_lengths_around_blocks(length, keys, dtype):
    check(problem(1, 2, length, keys, 24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_groups_in_parts(dtype, is_causal):
    check(problem(2, 4, 70, 600, 20, kv_heads=2, value_dims=9, is_causal=is_causal, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "num_dims", [1, 3, 8, 40, 63, 65, 72, 80, 96, 112, 128, 136, 200, 256, 264]
)
def test_head_sizes(num_dims, dtype):
    check(problem(1, 1, 33, 70, num_dims, value_dims=max(1, num_dims - 5), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_in_parts(dtype):
    check(problem(1, 2, 100, 300, 8, dropout_p=0.3, dtype=dtype))


def test_more_keys_than_parts():
    check(problem(1, 1, 40, 16 * 256 + 300, 8, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"dropout_p": 0.4},
        {"kv_heads": 1},
        {"mask": normal(1, 1, 1, 700)},
        {"mask": normal(2, 1, 150, 700)},
        {"mask": normal(1, 1, 150, 700) < 1},
    ],
    ids=["plain", "causal", "dropout", "grouped", "added_to_keys", "added", "mask"],
)
def test_bits_do_not_depend_on_threads(options, dtype, threads):
    arguments = problem(2, 2, 150, 700, 12, dtype=dtype, **options)
    got = run(attention.BACKWARD, arguments)
    torch.set_num_threads(1)
    assert_same_bits(got, run(attention.BACKWARD, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(dtype):
    """One head alone has its parts on several threads, many have one thread for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    *tensors, mask, dropout_p, is_causal, scale, seed, offset, want = problem(
        2, 6, 130, 530, 16, dtype=dtype
    )
    rest = mask, dropout_p, is_causal, scale, seed, offset, want
    try:
        together = run(attention.BACKWARD, (*tensors, *rest))
        for b, h in ((0, 0), (1, 5)):
            one = [t[b : b + 1, h : h + 1] for t in tensors]
            alone = run(attention.BACKWARD, (*one, *rest))
            assert_same_bits(alone[:3], [t[b : b + 1, h : h + 1] for t in together[:3]])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 70, 300), (1, 4, 70, 300), (2, 1, 70, 300), (1, 1, 70, 300), (2, 1, 1, 300),
     (1, 4, 70, 1), (1, 1, 1, 1)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)], ids=["contiguous", "transposed"])
def test_gradients_of_masks(shape, order):
    mask = normal(*(shape[d] for d in order)).permute(order)
    check(problem(2, 4, 70, 300, 8, kv_heads=2, mask=mask))


def test_gradient_of_an_expanded_mask():
    mask = normal(1, 1, 9, 21).expand(2, 3, 9, 21)
    arguments = problem(2, 3, 9, 21, 8, mask=mask)
    check(arguments)
    assert run(attention.BACKWARD, arguments)[3].shape == mask.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [10.0, 60.0, 1e-20])
def test_hard_scores(size, dtype):
    arguments = problem(1, 2, 100, 300, 16, dtype=dtype, size=size)
    check(arguments)
    assert all(t.isfinite().all() for t in run(attention.BACKWARD, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_float32_does_not_tell_apart(dtype):
    """The logarithm of a sum near 1e10 is off by hundreds; no probability is above 1."""
    arguments = list(problem(1, 2, 40, 90, 16, dtype=dtype, size=1e5))
    arguments[5] = arguments[5] * (1 - 1e-6)
    assert all(t.isfinite().all() for t in run(attention.BACKWARD, tuple(arguments)))


def test_large_offset_of_scores():
    """The logarithm of the sum is large, the probabilities are not."""
    mask = 1000 + normal(1, 1, 40, 90)
    check(problem(1, 2, 40, 90, 8, mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
def test_who_takes_no_part_gets_zeros(added, dtype):
    allowed = torch.ones(1, 1, 130, 300, dtype=torch.bool)
    allowed[..., 70:200] = False  # a whole block of keys, and parts of others
    allowed[:, :, 50:60] = False
    mask = torch.where(allowed, 0.0, -math.inf) if added else allowed
    arguments = problem(1, 2, 130, 300, 16, mask=mask, dtype=dtype)
    check(arguments)
    grad_query, grad_key, grad_value, _ = run(attention.BACKWARD, arguments)
    assert not grad_query[:, :, 50:60].any()
    assert not grad_key[:, :, 70:200].any()
    assert not grad_value[:, :, 70:200].any()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_head(number):
    arguments = problem(1, 3, 70, 130, 8)
    clean = run(attention.BACKWARD, arguments)
    for i in range(6):
        tensor = arguments[i].clone()
        tensor[0, 1, 5] = number
        got = run(attention.BACKWARD, (*arguments[:i], tensor, *arguments[i + 1 :]))
        for a, b in zip(got[:3], clean[:3], strict=True):
            assert_same_bits((a[:, 0], a[:, 2]), (b[:, 0], b[:, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype):
    """Whatever the strides, numbers are the same; gradients are in the order of their tensor."""
    arguments = problem(2, 3, 40, 70, 24, dtype=dtype)
    want = run(attention.BACKWARD, arguments)

    def behind(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def inside(t: Tensor) -> Tensor:
        return torch.stack([torch.full_like(t, math.nan), t], -1)[..., 1]

    for view in (behind, inside, lambda t: t.mT.contiguous().mT):
        got = run(attention.BACKWARD, (*map(view, arguments[:5]), *arguments[5:]))
        assert_same_bits(got, want)
    got = run(attention.BACKWARD, (*map(behind, arguments[:5]), *arguments[5:]))
    assert got[0].transpose(1, 2).is_contiguous()
    assert got[1].transpose(1, 2).is_contiguous()
    ones = torch.ones((), dtype=dtype).expand(arguments[0].shape)
    assert_same_bits(
        run(attention.BACKWARD, (ones, *arguments[1:])),
        run(attention.BACKWARD, (ones.contiguous(), *arguments[1:])),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, (0, 300), (-3, 999), (70, 1)])
def test_joint_in_parts(lengths, dtype):
    """Blocks hold keys of both streams; what lies beyond a length is not read."""
    shapes = {"image": (2, 4, 100, 24), "text": (2, 4, 300, 24)}
    tensors = [
        normal(shape[0], 2 if i else 4, *shape[2:], seed=i + 5, dtype=dtype)
        for shape in shapes.values()
        for i in range(3)
    ]
    text_lengths = None if lengths is None else torch.tensor(lengths)
    if lengths is not None:
        for b, length in enumerate(lengths):
            for t in tensors[3:]:
                t[b, :, max(length, 0) :] = math.nan
    saved = joint_attention.reference(*tensors, text_lengths, 0.2)
    grads = [normal(*t.shape, seed=20, dtype=dtype) for t in saved[:2]]
    arguments = *grads, *tensors, *saved, text_lengths, 0.2
    got = run(joint_attention.BACKWARD, arguments)
    assert joint_attention.compare_bwd(got, arguments) == []
    before = torch.get_num_threads()
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            assert_same_bits(run(joint_attention.BACKWARD, arguments), got)
    finally:
        torch.set_num_threads(before)


def test_fewer_keys_in_more_parts(threads):
    """4096 keys are 16 parts, 4160 are 13: no batch may lose any."""
    ends = torch.tensor([0, 5, 9]), torch.tensor([0, 4096, 4096 + 4160])
    query, key, value = (normal(n, 1, 4, seed=n) for n in (9, 8256, 8256))
    options = *ends, 5, 4160, False, 0.5
    out, lse = varlen_attention.reference(query, key, value, *options)
    arguments = normal(*out.shape), query, key, value, out, lse, *options
    got = run(varlen_attention.BACKWARD, arguments)
    assert varlen_attention.compare_bwd(got, arguments) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen_in_parts(is_causal, dtype):
    """Sequences of one part, of several and of none; tokens of no sequence before and behind."""
    lengths, keys = (3, 130, 0, 97, 1), (700, 65, 9, 0, 256)
    ends = [torch.tensor([2, *n]).cumsum(0) for n in (lengths, keys)]
    query, key, value = (
        normal(2 + sum(n) + 3, heads, 16, seed=i, dtype=dtype)
        for i, (n, heads) in enumerate(((lengths, 4), (keys, 2), (keys, 2)))
    )
    options = *ends, max(lengths), max(keys), is_causal, 0.25
    out, lse = varlen_attention.reference(query, key, value, *options)
    grad_out = normal(*out.shape, seed=9, dtype=dtype)
    arguments = grad_out, query, key, value, out, lse, *options
    got = run(varlen_attention.BACKWARD, arguments)
    assert varlen_attention.compare_bwd(got, arguments) == []
    assert not got[0][:2].any()
    assert not got[1][-3:].any()
    before = torch.get_num_threads()
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            assert_same_bits(run(varlen_attention.BACKWARD, arguments), got)
    finally:
        torch.set_num_threads(before)
