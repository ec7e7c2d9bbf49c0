"""varlen_attention: each sequence by itself, causality, cu_seqlens of any kind, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import backends_here, device_of, normal
from test_determinism import assert_same_bits
from test_scaled_dot_product_attention import assert_as_good, plain, with_gradients
from torch import Tensor
from torch.nn import functional

import mmfast
from mmfast.ops import varlen_attention as op

BACKENDS = backends_here(op.OP)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def seqlens(lengths: tuple[int, ...], device: torch.device, dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def each(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Any, keys: Any, causal: bool
) -> Tensor:
    """``attention`` of one sequence after the other."""
    outputs = []
    parts = (query.split(lengths), key.split(keys), value.split(keys))
    for q, k, v in zip(*parts, strict=True):
        shape = len(q), len(k)
        mask = torch.ones(shape, dtype=torch.bool, device=q.device)
        if causal:
            mask = mask.tril(len(k) - len(q))
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        outputs.append(attention(q, k, v, mask, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs)


def check(
    backend: str, lengths: tuple[int, ...], keys: tuple[int, ...] | None = None, *,
    heads: tuple[int, int] = (2, 2), num_dims: int = 16, causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Outputs and gradients against PyTorch and float64."""
    device = device_of(backend)
    keys = lengths if keys is None else keys
    shapes = (sum(lengths), heads[0]), (sum(keys), heads[1]), (sum(keys), heads[1])
    given = [normal(*s, num_dims, seed=i, dtype=dtype).to(device) for i, s in enumerate(shapes)]
    cu_seqlens = seqlens(lengths, device), seqlens(keys, device)
    got = with_gradients(
        lambda *t: mmfast.varlen_attention(
            *t, *cu_seqlens, max(lengths), max(keys), is_causal=causal
        ),
        given,
    )
    theirs, exact = (
        with_gradients(lambda *t, f=f: each(f, *t, lengths, keys, causal), tensors)
        for f, tensors in (
            (functional.scaled_dot_product_attention, given),
            (plain, [t.double() for t in given]),
        )
    )
    assert_as_good(got, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_dims", [8, 64, 72, 96, 128, 256])
def test_head_sizes(backend, num_dims, dtype):
    check(backend, (33, 5, 20), num_dims=num_dims, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes(backend, dtype):
    check(backend, (17, 3), (9, 30), dtype=dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "keys"),
    [
        ((1,), (1,)),
        ((64, 65, 1), (63, 1, 130)),
        ((129, 7), (7, 129)),
        ((5, 0, 9), (5, 3, 9)),
        ((5, 2, 9), (5, 0, 9)),
        ((1,) * 40, (3,) * 40),
    ],
    ids=str,
)
def test_lengths(backend, lengths, keys, causal):
    check(backend, lengths, keys, causal=causal)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(backend, kv_heads):
    check(backend, (20, 9), (31, 4), heads=(6, kv_heads))


def test_tokens_of_no_sequence(backend):
    device = device_of(backend)
    tensors = [normal(20, 2, 8, seed=i).to(device) for i in range(3)]
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor([3, 8, 15], dtype=dtype, device=device)

        def run(*t, cu_seqlens=cu_seqlens):
            return mmfast.varlen_attention(*t, cu_seqlens, cu_seqlens, 7, 7)

        made = with_gradients(run, tensors)
        spoiled = [t.clone() for t in tensors]
        for t in spoiled:
            t[:3], t[15:] = torch.nan, torch.nan
        assert_same_bits(with_gradients(run, spoiled), made)
        for t in made:
            assert not t[:3].any()
            assert not t[15:].any()
        inner = [t[3:15].contiguous() for t in tensors]
        shifted = cu_seqlens - 3
        alone = mmfast.varlen_attention(*inner, shifted, shifted, 7, 7)
        torch.testing.assert_close(alone, made[0][3:15])


@pytest.mark.parametrize(
    "wild", [[0, 5, 1000], [0, -5, 20], [9, 4, 2], [-(2**31), 0, 2**31 - 1], [30, 40, 50]], ids=str
)
def test_any_cu_seqlens_stay_in_range(backend, wild):
    device = device_of(backend)
    tensors = [normal(20, 2, 8, seed=i).to(device) for i in range(3)]
    cu_seqlens = torch.tensor(wild, dtype=torch.int32, device=device)
    for causal in (False, True):
        made = with_gradients(
            lambda *t, c=causal: mmfast.varlen_attention(
                *t, cu_seqlens, cu_seqlens, 20, 20, is_causal=c
            ),
            tensors,
        )
        assert all(t.shape == tensors[0].shape for t in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend, dtype):
    device = device_of(backend)
    views = list(normal(53, 3, 2, 72, dtype=dtype).to(device).unbind(1))
    cu_seqlens = seqlens((33, 20), device)

    def run(*t):
        return mmfast.varlen_attention(*t, cu_seqlens, cu_seqlens, 33, 33)

    expected = with_gradients(run, [t.contiguous() for t in views])
    for given in (views, [t.mT.contiguous().mT for t in views]):
        made = with_gradients(run, given)
        assert_same_bits(made, expected)
        assert all(t.is_contiguous() for t in made)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(backend, causal):
    device = device_of(backend)
    tensors = [
        normal(7, 2, 3, seed=i, dtype=torch.float64).to(device).requires_grad_() for i in range(3)
    ]
    cu_seqlens = seqlens((4, 3), device), seqlens((2, 5), device)
    assert torch.autograd.gradcheck(
        lambda *t: mmfast.varlen_attention(*t, *cu_seqlens, 4, 5, is_causal=causal, scale=0.7),
        tensors,
    )


def test_as_scaled_dot_product_attention(backend):
    device = device_of(backend)
    tensors = [normal(2, 21, 3, 16, seed=i).to(device) for i in range(3)]
    cu_seqlens = seqlens((21, 21), device)
    got = mmfast.varlen_attention(
        *(t.flatten(0, 1) for t in tensors), cu_seqlens, cu_seqlens, 21, 21
    )
    expected = mmfast.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors))
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_bits_depend_neither_on_threads_nor_on_the_batch(backend, dtype):
    device = device_of(backend)
    lengths = (150, 77, 9)
    given = [normal(236, 2, 72, seed=i, dtype=dtype).to(device) for i in range(3)]
    cu_seqlens = seqlens(lengths, device)

    def run(*t):
        return mmfast.varlen_attention(*t, cu_seqlens, cu_seqlens, 150, 150, is_causal=True)

    before = torch.get_num_threads()
    found = []
    with mmfast.use_backend(backend):
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(with_gradients(run, given))
        torch.set_num_threads(before)
        alone = seqlens(lengths[1:2], device)
        one = mmfast.varlen_attention(
            *(t[150:227] for t in given), alone, alone, 77, 77, is_causal=True
        )
    for other in found[1:]:
        assert_same_bits(other, found[0])
    assert_same_bits([one], [found[0][0][150:227]])


def test_compile_without_a_break():
    torch.compiler.reset()

    def attending(query, key, value, cu_seqlens):
        return mmfast.varlen_attention(query * 2, key, value, cu_seqlens, cu_seqlens, 9, 9) + 1

    compiled = torch.compile(attending, fullgraph=True, backend="aot_eager")
    given = [
        *(normal(15, 2, 8, seed=i) for i in range(3)), seqlens((9, 6), torch.device("cpu"))
    ]  # fmt: skip
    for a, b in zip(with_gradients(compiled, given), with_gradients(attending, given), strict=True):
        torch.testing.assert_close(a, b)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


X, CU = zeros(9, 4, 8), torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({1: X.half()}, TypeError, "one dtype.*key float16"),
        ({0: X[0]}, ValueError, r"query must be \(N, H, E\), got \(4, 8\)"),
        ({1: X[:, :3]}, ValueError, "key.*divides 4, got 3"),
        ({1: X[..., :7]}, ValueError, "one head size, at least 1, got 8 and 7"),
        ({2: X[:8]}, ValueError, r"value must be \(9, 4, 'Ev'\), as key is, got \(8, 4, 8\)"),
        ({3: CU.float()}, TypeError, "cu_seqlens_q must be int64, int32, got float32"),
        ({4: CU.to("meta")}, ValueError, "cu_seqlens_k on meta"),
        (
            {4: torch.tensor([0, 4, 9])},
            ValueError,
            r"must both be \(B \+ 1,\), got \(2,\) and \(3,\)",
        ),
        ({3: CU[:0], 4: CU[:0]}, ValueError, r"must both be \(B \+ 1,\)"),
        ({5: -1}, ValueError, "max_seqlen_q must be at least 0, got -1"),
    ],
)
def test_refusals(changes, error, message):
    arguments: list[Any] = [X, X, X, CU, CU, 9, 9]
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(error, match=message):
        mmfast.varlen_attention(*arguments)
