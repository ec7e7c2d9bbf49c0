"""joint_attention: against attention to both streams one behind the other, lengths, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import backends_here, device_of, normal
from test_determinism import assert_same_bits
from test_scaled_dot_product_attention import assert_as_good, plain, with_gradients
from torch import Tensor
from torch.nn import functional

import mmfast
from mmfast.ops import joint_attention as op

BACKENDS = backends_here(op.OP)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def streams(
    batch: int, heads: int, lengths: tuple[int, int], num_dims: int, *, kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """Queries, keys and values of image and text."""
    kv_heads = heads if kv_heads is None else kv_heads
    return [
        normal(batch, h, length, num_dims, seed=3 * i + j, dtype=dtype)
        for i, length in enumerate(lengths)
        for j, h in enumerate((heads, kv_heads, kv_heads))
    ]


def joined(attention: Any, *tensors: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """``attention`` with a mask, of the streams put together."""
    query, key, value = (torch.cat(pair, 2) for pair in zip(tensors[:3], tensors[3:], strict=True))
    image, total = tensors[0].shape[2], query.shape[2]
    mask = torch.ones(len(query), 1, total, total, dtype=torch.bool, device=query.device)
    if lengths is not None:
        there = torch.arange(total, device=query.device) < image + lengths[:, None]
        mask = there[:, None, :, None] & there[:, None, None, :]
    out = attention(query, key, value, mask, enable_gqa=True)
    return list(out.split([image, total - image], 2))


def check(backend: str, tensors: list[Tensor], lengths: list[int] | None = None) -> None:
    """Outputs and gradients against PyTorch and float64."""
    device = device_of(backend)
    given = [t.to(device) for t in tensors]
    text_lengths = None if lengths is None else torch.tensor(lengths, device=device)
    got = with_gradients(mmfast.joint_attention, given, text_lengths=text_lengths)
    theirs = with_gradients(
        lambda *t: joined(functional.scaled_dot_product_attention, *t, lengths=text_lengths), given
    )
    exact = with_gradients(
        lambda *t: joined(plain, *t, lengths=text_lengths), [t.double() for t in given]
    )
    assert_as_good(got, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_dims", [8, 64, 72, 96, 128, 256])
def test_head_sizes(backend, num_dims, dtype):
    check(backend, streams(2, 2, (33, 20), num_dims, dtype=dtype), [20, 3])
    check(backend, streams(1, 2, (33, 20), num_dims, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes(backend, dtype):
    check(backend, streams(2, 2, (17, 9), 24, dtype=dtype), [9, 1])


@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 70), (64, 64), (65, 63), (129, 77), (0, 9), (9, 0)], ids=str
)
def test_lengths(backend, lengths):
    text = lengths[1]
    check(backend, streams(3, 2, lengths, 16), [text, max(text - 1, 0), text // 2])
    check(backend, streams(2, 2, lengths, 16))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(backend, kv_heads):
    check(backend, streams(2, 6, (20, 9), 16, kv_heads=kv_heads), [9, 4])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_text_beyond_its_length_is_not_read(backend, dtype):
    device = device_of(backend)
    tensors = [t.to(device) for t in streams(3, 2, (20, 70), 24)]
    lengths = torch.tensor([70, 66, 0], dtype=dtype, device=device)
    expected = with_gradients(mmfast.joint_attention, tensors, text_lengths=lengths)
    beyond = (torch.arange(70, device=device) >= lengths[:, None])[:, None, :, None]
    spoiled = [*tensors[:3], *(t.masked_fill(beyond, torch.nan) for t in tensors[3:])]
    assert_same_bits(
        with_gradients(mmfast.joint_attention, spoiled, text_lengths=lengths), expected
    )
    _, text, *grads = expected
    for t in (text, *grads[3:]):
        assert not t.masked_select(beyond).any()
    alone = mmfast.joint_attention(
        *(t[1:2] for t in tensors[:3]), *(t[1:2, :, :66] for t in tensors[3:])
    )
    torch.testing.assert_close(alone.image[0], expected[0][1])
    torch.testing.assert_close(alone.text[0], text[1, :, :66])


def test_lengths_out_of_range(backend):
    device = device_of(backend)
    tensors = [t.to(device) for t in streams(2, 2, (5, 7), 8)]
    for far in (1, 1 << 20, 1 << 40):
        wild = torch.tensor([7 + far, -far], device=device)
        tame = torch.tensor([7, 0], device=device)
        assert_same_bits(
            with_gradients(mmfast.joint_attention, tensors, text_lengths=wild),
            with_gradients(mmfast.joint_attention, tensors, text_lengths=tame),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend, dtype):
    device = device_of(backend)
    made = [normal(2, n, 3, 2, 72, seed=n, dtype=dtype).to(device) for n in (33, 20)]
    views = [t.transpose(1, 2) for qkv in made for t in qkv.unbind(2)]
    lengths = torch.tensor([20, 7], device=device)
    dense = [t.contiguous() for t in views]
    expected = with_gradients(mmfast.joint_attention, dense, text_lengths=lengths)
    for given in (views, [t.mT.contiguous().mT for t in dense]):
        got = with_gradients(mmfast.joint_attention, given, text_lengths=lengths)
        assert_same_bits(got, expected)
    for t in with_gradients(mmfast.joint_attention, views, text_lengths=lengths):
        assert t.transpose(1, 2).is_contiguous()


def test_gradients_of_one_output(backend):
    device = device_of(backend)
    lengths = torch.tensor([4, 2], device=device)
    for which in range(2):
        tensors = [t.to(device) for t in streams(2, 2, (5, 4), 8)]
        got = with_gradients(
            lambda *t, w=which: mmfast.joint_attention(*t, text_lengths=lengths)[w], tensors
        )
        exact = with_gradients(
            lambda *t, w=which: joined(plain, *t, lengths=lengths)[w], [t.double() for t in tensors]
        )
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradcheck(backend):
    device = device_of(backend)
    tensors = [t.to(device).requires_grad_() for t in streams(2, 2, (3, 2), 3, dtype=torch.float64)]
    lengths = torch.tensor([2, 1], device=device)
    assert torch.autograd.gradcheck(
        lambda *t: tuple(mmfast.joint_attention(*t, text_lengths=lengths, scale=0.4)), tensors
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_bits_depend_neither_on_threads_nor_on_the_batch(backend, dtype):
    device = device_of(backend)
    given = [t.to(device) for t in streams(3, 2, (150, 77), 72, dtype=dtype)]
    lengths = torch.tensor([77, 13, 50], device=device)
    before = torch.get_num_threads()
    found = []
    with mmfast.use_backend(backend):
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(with_gradients(mmfast.joint_attention, given, text_lengths=lengths))
        torch.set_num_threads(before)
        one = mmfast.joint_attention(*(t[1:2] for t in given), text_lengths=lengths[1:2])
    for other in found[1:]:
        assert_same_bits(other, found[0])
    assert_same_bits([t[0] for t in one], [t[1] for t in found[0][:2]])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_break(dynamic):
    torch.compiler.reset()

    def attending(*tensors):
        *streams, lengths = tensors
        image, text = mmfast.joint_attention(*streams, text_lengths=lengths)
        return image * 2, text

    compiled = torch.compile(attending, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((9, 5), (6, 12)) if dynamic else ((9, 5),):
        given = [*streams(2, 2, lengths, 8), torch.tensor([2, 5])]
        for a, b in zip(
            with_gradients(compiled, given), with_gradients(attending, given), strict=True
        ):
            torch.testing.assert_close(a, b)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


IMAGE, TEXT = zeros(2, 4, 5, 8), zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: [1.0]}, TypeError, "q_image must be a torch.Tensor, got list"),
        ({4: TEXT.bool()}, TypeError, "k_text must be float32.*got bool"),
        ({4: TEXT.half()}, TypeError, "one dtype.*k_text float16"),
        ({5: zeros(2, 4, 3, 8, device="meta")}, ValueError, "v_text on meta"),
        ({1: IMAGE[0]}, ValueError, r"k_image must be \(B, H, L, E\), got \(4, 5, 8\)"),
        ({1: IMAGE[:, :3]}, ValueError, "k_image.*divides 4, got 3"),
        ({1: IMAGE[..., :7]}, ValueError, r"k_image must be \(2, 4, 5, 8\), got \(2, 4, 5, 7\)"),
        ({2: IMAGE[:, :, :4]}, ValueError, r"v_image must be \(2, 4, 5, 8\)"),
        ({3: TEXT[:1]}, ValueError, r"q_text must be \(2, 4, 3, 8\), got \(1, 4, 3, 8\)"),
        ({4: TEXT[:, :2]}, ValueError, r"k_text must be \(2, 4, 3, 8\)"),
        ({5: TEXT[:, :, :2]}, ValueError, r"v_text must be \(2, 4, 3, 8\)"),
        ({6: torch.zeros(2)}, TypeError, "text_lengths must be int64, int32, got float32"),
        ({6: torch.zeros(3).long()}, ValueError, r"text_lengths must be \(B,\) = \(2,\)"),
        ({6: torch.zeros(2, device="meta").long()}, ValueError, "text_lengths on meta"),
    ],
)
def test_refusals(changes, error, message):
    arguments: list[Any] = [IMAGE, IMAGE, IMAGE, TEXT, TEXT, TEXT, None]
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(error, match=message):
        mmfast.joint_attention(*arguments[:6], text_lengths=arguments[6])
