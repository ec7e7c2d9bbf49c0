"""scaled_dot_product_attention: sizes, masks, gradients, layouts, dropout, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import backends_here, device_of, normal, samples_of_pytorch
from test_determinism import assert_same_bits
from torch import Tensor
from torch.nn import functional

import mmfast
from mmfast.ops import scaled_dot_product_attention as op

BACKENDS = backends_here(op.OP)
HALF = torch.bfloat16, torch.float16


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention written out; rows that may attend to nothing give 0."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    scores = torch.einsum("...ie,...je->...ij", query, key)
    scores = scores / math.sqrt(query.shape[-1]) if scale is None else scores * scale
    if is_causal:
        i, j = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
        attn_mask = i[:, None] >= j
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if not scores.shape[-1]:
        return scores @ value
    largest = scores.amax(-1, keepdim=True).detach().clamp_min(-1e30)
    weights = (scores - largest).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("...ij,...je->...ie", weights, value)


def with_gradients(run: Callable[..., Any], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Outputs, and the gradients of the tensors for fixed gradients of the outputs."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    made = run(*leaves, **options)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    grads = [normal(*o.shape, seed=90 + i).to(o) for i, o in enumerate(outputs)]
    asked = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(outputs, asked, grads)
    return [*(o.detach() for o in outputs), *found]


def assert_as_good(
    got: list[Tensor], theirs: list[Tensor], exact: list[Tensor], slack: float = 1.0
) -> None:
    """Errors are at most twice those of PyTorch at this dtype, but for a little.

    That of gradients is ``slack`` times as much.
    """
    # Of the dtype that is the coarsest, which a mask's need not be.
    coarsest = max((t.dtype for t in theirs), key=lambda d: torch.finfo(d).eps)
    little = {torch.float64: 1e-13, torch.float32: 1e-6}.get(coarsest, 2e-3)
    for i, (a, b, want) in enumerate(zip(got, theirs, exact, strict=True)):
        assert a.shape == want.shape
        assert a.dtype == b.dtype
        assert not a.isnan().any(), i
        errors = [(t.double() - want).square().sum().sqrt().item() for t in (a, b)]
        size = want.square().sum().sqrt().item() + want.numel() ** 0.5
        # Where a gradient of a mask is a sum of many that cancel, their rounding is all of it.
        share = (slack if i else 1.0) * little * (5 if i == 4 and len(got) == 5 else 1)
        assert errors[0] <= 2 * errors[1] + share * size, (i, errors, size)


def check(backend: str, *tensors: Tensor, slack: float = 1.0, **options: Any) -> None:
    """Outputs and gradients, of a mask too, against PyTorch and float64."""
    given = [t.to(device_of(backend)) for t in tensors]
    got = with_gradients(mmfast.scaled_dot_product_attention, given, **options)
    # With gradients of a mask PyTorch would fall back to its slow implementation anyway.
    theirs = with_gradients(functional.scaled_dot_product_attention, given, **options)
    wide = [t.double() if t.is_floating_point() else t for t in given]
    assert_as_good(got, theirs, with_gradients(plain, wide, **options), slack)


def qkv(
    batch: int, heads: int, length: int, num_dims: int, keys: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """Query, key and value."""
    lengths = (length, *[length if keys is None else keys] * 2)
    return [normal(batch, heads, n, num_dims, seed=i, dtype=dtype) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_dims", [1, 7, 8, 24, 64, 72, 80, 88, 96, 112, 120, 128, 200, 256])
def test_head_sizes(backend, num_dims, dtype):
    check(backend, *qkv(1, 2, 37, num_dims, 70, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("num_dims", [5, 72])
def test_other_dtypes(backend, num_dims, dtype):
    check(backend, *qkv(2, 2, 19, num_dims, 33, dtype=dtype))
    check(backend, *qkv(2, 2, 19, num_dims, dtype=dtype), is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("length", "keys"), [(1, 1), (1, 77), (77, 1), (15, 16), (64, 65), (129, 63), (200, 301)]
)
def test_lengths(backend, length, keys, is_causal):
    check(backend, *qkv(1, 2, length, 16, keys), is_causal=is_causal)
    check(backend, *qkv(1, 2, length, 16, keys, dtype=torch.bfloat16), is_causal=is_causal)


@pytest.mark.parametrize("kind", ["bool", "added", "added_float32_to_bfloat16"])
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 3), (1, 5), (1, 70))), ids=str)
def test_masks(backend, shape, kind):
    dtype = torch.bfloat16 if kind.endswith("16") else torch.float32
    numbers = normal(*shape, seed=7)
    mask = numbers < 0.7 if kind == "bool" else numbers
    if kind == "added":
        mask = torch.where(numbers < -1.5, -math.inf, numbers)
    check(backend, *qkv(2, 3, 5, 8, 70, dtype=dtype), mask)


@pytest.mark.parametrize("shape", [(1, 70), (5, 70), (5, 1), (3, 1, 70)], ids=str)
def test_masks_of_fewer_dimensions(backend, shape):
    check(backend, *qkv(2, 3, 5, 8, 70), normal(*shape, seed=7))
    check(backend, *qkv(2, 3, 5, 8, 70), normal(*shape, seed=7) < 1)


def test_masks_of_one_dimension(backend):
    tensors = [t.to(device_of(backend)) for t in qkv(2, 3, 5, 8, 70)]
    mask = normal(70).to(device_of(backend))
    got, expected = (mmfast.scaled_dot_product_attention(*tensors, m) for m in (mask, mask[None]))
    assert torch.equal(got, expected)


def test_strides_of_masks(backend):
    device = device_of(backend)
    tensors = [t.to(device) for t in qkv(2, 3, 9, 8, 21)]
    numbers = normal(2, 3, 9, 21, seed=4).to(device)
    for mask in (numbers, numbers < 0.3):
        expected = mmfast.scaled_dot_product_attention(*tensors, mask)
        spread = torch.stack([mask, mask], -1)[..., 0]
        for other in (mask.mT.contiguous().mT, spread):
            assert torch.equal(mmfast.scaled_dot_product_attention(*tensors, other), expected)
        rows = mask[:, :1].expand(2, 3, 9, 21)
        expected = mmfast.scaled_dot_product_attention(*tensors, rows.contiguous())
        assert torch.equal(mmfast.scaled_dot_product_attention(*tensors, rows), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_rows_that_attend_to_nothing(backend, added, dtype):
    device = device_of(backend)
    tensors = [t.to(device) for t in qkv(2, 2, 70, 24, dtype=dtype)]
    mask = normal(2, 1, 70, 70, seed=3).to(device) < 1
    mask[0, 0, [0, 5, 69]] = False
    mask[1] = False
    allowed = mask
    if added:
        mask = torch.where(mask, 0.0, -math.inf).to(dtype)
    out, *grads = with_gradients(mmfast.scaled_dot_product_attention, [*tensors, mask])
    nothing = ~allowed.any(-1).expand(2, 2, 70)
    assert (out[nothing] == 0).all()
    assert (grads[0][nothing] == 0).all()
    assert (grads[1][1] == 0).all()
    assert (grads[2][1] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    assert (out[~nothing] != 0).any(-1).all()
    # Which PyTorch does likewise.
    check(backend, *tensors, allowed)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_heads(backend, kv_heads, dtype):
    query = normal(2, 6, 13, 40, dtype=dtype)
    key, value = (normal(2, kv_heads, 30, e, seed=e, dtype=dtype) for e in (40, 24))
    for options in ({}, {"is_causal": True}, {"attn_mask": normal(2, 6, 1, 30, seed=5) < 0.5}):
        options = {
            n: o.to(device_of(backend)) if isinstance(o, Tensor) else o for n, o in options.items()
        }
        check(backend, query, key, value, **options, enable_gqa=True)


def test_leading_dimensions(backend):
    for lead in ((), (3,), (2, 3), (2, 2, 3), (1, 2, 2, 3), (0, 3)):
        check(backend, *(normal(*lead, n, 8, seed=n) for n in (5, 9, 9)))
    check(backend, *(normal(2, 2, 3, n, 8, seed=n) for n in (5, 9, 9)), normal(2, 1, 1, 9))
    check(backend, *(normal(2, 2, 3, n, 8, seed=n) for n in (5, 9, 9)), normal(9) < 0.5)
    check(backend, *(normal(2, 3, n, 8, seed=n) for n in (5, 9, 9)), normal(2, 1, 5, 9))


def test_leading_dimensions_broadcast(backend):
    device = device_of(backend)
    query, key, value = (normal(3, 5, 8), normal(2, 3, 9, 8, seed=1), normal(2, 1, 9, 4, seed=2))
    given = [t.to(device) for t in (query, key, value)]
    exact = with_gradients(plain, [t.double() for t in given])
    got = with_gradients(mmfast.scaled_dot_product_attention, given)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def packed(backend: str, dtype: torch.dtype, num_dims: int = 72) -> list[Tensor]:
    """Views of one projection, (B, L, 3, H, E)."""
    made = normal(2, 33, 3, 2, num_dims, dtype=dtype).to(device_of(backend))
    return [t.transpose(1, 2) for t in made.unbind(2)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_layouts(backend, dtype):
    views = packed(backend, dtype)
    dense = [t.contiguous() for t in views]
    expected = with_gradients(mmfast.scaled_dot_product_attention, dense)
    narrow = [torch.cat([t, t + torch.nan], 3)[..., :72] for t in dense]
    tokens_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in dense]
    for given in (views, tokens_first, narrow, [t.mT.contiguous().mT for t in dense]):
        assert_same_bits(with_gradients(mmfast.scaled_dot_product_attention, given), expected)
    for given, is_tokens_first in ((views, True), (tokens_first, True), (dense, False)):
        out, *grads = with_gradients(mmfast.scaled_dot_product_attention, given)
        for t in (out, *grads):
            assert (t.transpose(1, 2) if is_tokens_first else t).is_contiguous()


def test_expanded_keys(backend):
    device = device_of(backend)
    query, key, value = (t.to(device) for t in qkv(2, 3, 9, 8))
    one = key[:1, :1].expand(2, 3, 9, 8)
    got = with_gradients(mmfast.scaled_dot_product_attention, [query, one, value])
    dense = [query, one.contiguous(), value]
    assert_same_bits(got, with_gradients(mmfast.scaled_dot_product_attention, dense))


def test_empty(backend):
    device = device_of(backend)
    for shape in ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)):
        given = [normal(*shape).to(device)] * 3
        out, *grads = with_gradients(mmfast.scaled_dot_product_attention, given)
        assert out.shape == shape
        assert all(g.shape == shape for g in grads)
    given = [t.to(device) for t in qkv(2, 2, 5, 8, keys=0)]
    out, *grads = with_gradients(mmfast.scaled_dot_product_attention, given)
    assert out.shape == (2, 2, 5, 8)
    assert not any(t.any() for t in (out, *grads))
    given = [t.to(device) for t in (normal(1, 2, 5, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 0))]
    out, *_ = with_gradients(mmfast.scaled_dot_product_attention, given)
    assert out.shape == (1, 2, 5, 0)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1.0, 30.0])
def test_scales(backend, scale):
    check(backend, *qkv(1, 2, 40, 24), scale=scale)
    check(backend, *qkv(1, 2, 40, 24, dtype=torch.bfloat16), scale=scale)


def test_large_scores(backend):
    device = device_of(backend)
    query, key, value = (t.to(device) for t in qkv(1, 2, 40, 24))
    for factor in (1e3, 1e10):
        out, *grads = with_gradients(
            mmfast.scaled_dot_product_attention, [query * factor, key, value]
        )
        exact = plain(query.double() * factor, key.double(), value.double())
        if factor == 1e10:  # one key wins everything
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        assert all(t.isfinite().all() for t in (out, *grads))
    # All scores far from 0 in the same way.
    added = torch.tensor(-1e4, device=device).view(1, 1)
    expected = mmfast.scaled_dot_product_attention(query, key, value)
    got = mmfast.scaled_dot_product_attention(query, key, value, added)
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_not_finite(backend, number):
    device = device_of(backend)
    for which in range(3):
        tensors = [t.to(device) for t in qkv(2, 2, 40, 24)]
        tensors[which][0, 1, 3, 5] = number
        out, *_ = with_gradients(mmfast.scaled_dot_product_attention, tensors)
        assert out[1].isfinite().all()
        assert out[0, 0].isfinite().all()
        if math.isnan(number):
            spoiled = out[0, 1].isnan()
            assert spoiled[3].any()
            assert spoiled.any(1).sum() == (1 if which == 0 else 40)


def test_gradcheck(backend):
    device = device_of(backend)
    tensors = [t.to(device).requires_grad_() for t in qkv(1, 2, 4, 3, 5, dtype=torch.float64)]
    mask = normal(2, 1, 5, seed=8, dtype=torch.float64).to(device).requires_grad_()
    run = mmfast.scaled_dot_product_attention
    assert torch.autograd.gradcheck(run, (*tensors, mask))
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, is_causal=True), tensors)
    dropped = lambda q, k, v: run(q, k, v, dropout_p=0.4, seed=3)  # noqa: E731
    assert torch.autograd.gradcheck(dropped, tensors)


def test_gradients_of_some(backend):
    device = device_of(backend)
    every = with_gradients(
        mmfast.scaled_dot_product_attention, [t.to(device) for t in qkv(1, 2, 9, 8)]
    )
    for which in range(3):
        tensors = [t.to(device) for t in qkv(1, 2, 9, 8)]
        tensors[which].requires_grad_()
        out = mmfast.scaled_dot_product_attention(*tensors)
        (grad,) = torch.autograd.grad(out, tensors[which], normal(*out.shape, seed=90).to(out))
        assert torch.equal(grad, every[1 + which])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_is_a_share_of_the_weights(backend, dropout_p):
    device = device_of(backend)
    query, key = (torch.zeros(2, 3, 64, 8, device=device) for _ in range(2))
    value = torch.eye(64, device=device).expand(2, 3, 64, 64)
    weights = mmfast.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, seed=1)
    kept = weights != 0
    share = kept.double().mean().item()
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
    assert abs(share - (1 - dropout_p)) < 4 * deviation
    torch.testing.assert_close(weights[kept] * 64 * (1 - dropout_p), weights[kept] * 0 + 1)
    # Heads and samples differ.
    flat = kept.flatten(0, 1).flatten(1)
    assert all((flat[i] != flat[j]).any() for i in range(6) for j in range(i))


def test_dropout_is_reproducible(backend):
    device = device_of(backend)
    tensors = [t.to(device) for t in qkv(2, 2, 21, 8)]

    def run(**options: Any) -> list[Tensor]:
        return with_gradients(mmfast.scaled_dot_product_attention, tensors, **options)

    first = run(dropout_p=0.3, seed=5, offset=2)
    assert_same_bits(run(dropout_p=0.3, seed=5, offset=2), first)
    as_tensors = {n: torch.tensor(v, device=device) for n, v in (("seed", 5), ("offset", 2))}
    assert_same_bits(run(dropout_p=0.3, **as_tensors), first)
    for others in ({"seed": 6, "offset": 2}, {"seed": 5, "offset": 3}):
        assert not torch.equal(run(dropout_p=0.3, **others)[0], first[0])
    torch.manual_seed(11)
    drawn = run(dropout_p=0.3)
    assert not torch.equal(run(dropout_p=0.3)[0], drawn[0])
    torch.manual_seed(11)
    assert_same_bits(run(dropout_p=0.3), drawn)
    state = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_nothing_and_of_everything(backend):
    tensors = [t.to(device_of(backend)) for t in qkv(2, 2, 21, 8)]
    expected = with_gradients(mmfast.scaled_dot_product_attention, tensors)
    got = with_gradients(mmfast.scaled_dot_product_attention, tensors, dropout_p=0.0, seed=1)
    assert_same_bits(got, expected)
    nothing = with_gradients(mmfast.scaled_dot_product_attention, tensors, dropout_p=1.0, seed=1)
    assert not any(t.any() for t in nothing)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3, "seed": 4}])
def test_dropout_is_the_references(backend, options):
    device = device_of(backend)
    tensors = [t.to(device) for t in qkv(2, 2, 70, 16)]
    got = with_gradients(mmfast.scaled_dot_product_attention, tensors, **options)
    with mmfast.use_backend("reference"):
        expected = with_gradients(mmfast.scaled_dot_product_attention, tensors, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_bits_depend_neither_on_threads_nor_on_the_batch(backend, dtype):
    device = device_of(backend)
    given = [t.to(device) for t in qkv(3, 4, 150, 72, 170, dtype=dtype)]
    before = torch.get_num_threads()
    found = []
    with mmfast.use_backend(backend):
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(with_gradients(mmfast.scaled_dot_product_attention, given))
        torch.set_num_threads(before)
        one = [
            mmfast.scaled_dot_product_attention(*(t[b : b + 1] for t in given)) for b in range(3)
        ]
        head = mmfast.scaled_dot_product_attention(*(t[:, 1:2] for t in given))
    for other in found[1:]:
        assert_same_bits(other, found[0])
    assert_same_bits([torch.cat(one), head], [found[0][0], found[0][0][:, 1:2]])


def attending(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, seed: Tensor) -> Tensor:
    """What a model does."""
    query = mmfast.scaled_dot_product_attention(query * 2, key, value, mask)
    query = mmfast.scaled_dot_product_attention(query, key, value, dropout_p=0.2, seed=seed)
    return mmfast.scaled_dot_product_attention(query, key, value, is_causal=True) + 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_break(compiler, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(attending, fullgraph=True, dynamic=dynamic, backend=compiler)
    seed = torch.tensor(3)
    for length in (9, 12, 30) if dynamic else (9,):
        given = [*qkv(2, 2, length, 8), normal(2, 1, 1, length, seed=4)]
        got, expected = (
            with_gradients(lambda *t, run=run: run(*t, seed), given)
            for run in (compiled, attending)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compile_of_dropout_without_a_seed():
    torch.compiler.reset()

    def run(query, key, value):
        return mmfast.scaled_dot_product_attention(query, key, value, dropout_p=0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    tensors = qkv(1, 2, 9, 8)
    assert not torch.equal(compiled(*tensors), compiled(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_of_pytorch(backend, dtype):
    name, count = "nn.functional.scaled_dot_product_attention", 0
    for tensors, options in samples_of_pytorch(name, dtype, device_of(backend)):
        if options.get("dropout_p", 0.0):
            out = mmfast.scaled_dot_product_attention(*tensors, **options)
            theirs = functional.scaled_dot_product_attention(*tensors, **options)
            assert out.shape == theirs.shape
            continue
        options.pop("dropout_p", None)
        # Scores go into the hundreds. A backward starts from sums over the outputs, of which 16
        # bits were kept; PyTorch keeps probabilities here, and none of that.
        slack = 12.0 if dtype == torch.bfloat16 else 1.0
        check(backend, *tensors, slack=slack, **options)
        count += 1
    assert count > 10


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


QUERY = zeros(2, 4, 5, 8)
REFUSED: list[tuple[list[Any], dict[str, Any], type[Exception], str]] = [
    ([[1.0], QUERY, QUERY], {}, TypeError, "query must be a torch.Tensor, got list"),
    ([QUERY.int()] * 3, {}, TypeError, "query must be float32.*got int32"),
    ([QUERY, QUERY.double(), QUERY], {}, TypeError, "one dtype, got query float32, key float64"),
    ([QUERY, QUERY, zeros(2, 4, 5, 8, device="meta")], {}, ValueError, "value on meta"),
    ([zeros(8), QUERY, QUERY], {}, ValueError, r"query must be \(\.\.\., H, L, E\), got \(8,\)"),
    ([QUERY, QUERY, zeros(2, 4, 6, 8)], {}, ValueError, "one length, got 5 and 6"),
    ([QUERY, zeros(2, 4, 5, 9), QUERY], {}, ValueError, "one head size, at least 1, got 8 and 9"),
    ([zeros(2, 4, 5, 0)] * 3, {}, ValueError, "at least 1, got 0 and 0"),
    ([QUERY, zeros(2, 3, 5, 8), zeros(2, 3, 5, 8)], {}, ValueError, "leading dimensions must fit"),
    ([QUERY, *[zeros(2, 3, 5, 8)] * 2], {"enable_gqa": True}, ValueError, "divides 4, got 3"),
    (
        [QUERY, zeros(2, 2, 5, 8), zeros(2, 1, 5, 8)],
        {"enable_gqa": True},
        ValueError,
        "as many heads as each other, got 2 and 1",
    ),
    ([zeros(5, 8)] * 3, {"enable_gqa": True}, ValueError, "with enable_gqa all must be"),
    (
        [QUERY] * 3,
        {"attn_mask": zeros(5, 5), "is_causal": True},
        ValueError,
        "not possible: attn_mask with is_causal",
    ),
    ([QUERY] * 3, {"attn_mask": zeros(5, 4)}, ValueError, r"to \(2, 4, 5, 5\), got \(5, 4\)"),
    ([QUERY] * 3, {"attn_mask": zeros(1, 2, 4, 5, 5)}, ValueError, "attn_mask must broadcast"),
    ([QUERY] * 3, {"attn_mask": zeros(5, 5).long()}, TypeError, "bool, float32.*got int64"),
    ([QUERY] * 3, {"attn_mask": zeros(5, 5, device="meta")}, ValueError, "attn_mask on meta"),
    ([QUERY] * 3, {"dropout_p": 1.5}, ValueError, "dropout_p must be from 0 to 1, got 1.5"),
    ([QUERY] * 3, {"dropout_p": -0.1}, ValueError, "dropout_p must be from 0 to 1"),
    ([QUERY] * 3, {"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int"),
    (
        [QUERY] * 3,
        {"dropout_p": 0.1, "seed": torch.zeros(2).long()},
        ValueError,
        r"seed must be of shape \(\), got \(2,\)",
    ),
]


@pytest.mark.parametrize(("tensors", "options", "error", "message"), REFUSED)
def test_refusals(tensors, options, error, message):
    with pytest.raises(error, match=message):
        mmfast.scaled_dot_product_attention(*tensors, **options)


def test_signature_is_pytorchs():
    tensors = [*qkv(1, 2, 5, 8), normal(5, 5) < 0.5, 0.0, False]
    got = mmfast.scaled_dot_product_attention(*tensors, scale=0.3)
    torch.testing.assert_close(got, functional.scaled_dot_product_attention(*tensors, scale=0.3))


def test_only_what_is_needed_is_saved():
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    tensors = [t.requires_grad_() for t in qkv(1, 2, 200, 8)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mmfast.scaled_dot_product_attention(*tensors)
    numbers = {t.data_ptr(): t.numel() for t in saved}
    assert sum(numbers.values()) == 4 * 2 * 200 * 8 + 2 * 200
