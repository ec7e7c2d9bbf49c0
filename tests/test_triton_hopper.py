"""The attention kernels' ways for Hopper, each by name: in Triton's interpreter, or on a Hopper.

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_hopper.py

Which are chosen, and what they compile to, is in ``test_attention_tiles.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import test_joint_attention
import test_scaled_dot_product_attention as dense
import test_varlen_attention
import torch
from cases import device_of, normal
from test_determinism import assert_same_bits
from test_scaled_dot_product_attention import packed, plain, qkv, with_gradients
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmfast
from mmfast.backends import interpreting

pytest.importorskip("triton")
if interpreting():
    import quick_interpreter  # noqa: F401
elif not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper, or TRITON_INTERPRET=1", allow_module_level=True)
import triton

from mmfast.kernels.attention_forward import forward
from mmfast.kernels.attention_key_gradient import key_kernel
from mmfast.kernels.attention_query_gradient import query_kernel
from mmfast.kernels.scaled_dot_product_attention import HEAD_SIZES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BFLOAT16 = torch.bfloat16
AHEAD = {"TMA": False, "AHEAD": True, "SPECIAL": False}
TMA = {"TMA": True, "AHEAD": True, "SPECIAL": False}
SPECIAL = {"TMA": True, "AHEAD": True, "SPECIAL": True}


DEVICE = device_of("triton")
# Tiles are small where each takes milliseconds, and lengths are of several of them.
TIMES = 1 if interpreting() else 5


def config(rows: int, columns: int, warps: int, **flags: bool) -> triton.Config:
    """With tiles of so many queries and keys on a GPU."""
    smaller = 4 if interpreting() else 1
    sizes = {"BLOCK_M": rows // smaller, "BLOCK_N": columns // smaller}
    return triton.Config({**sizes, **flags}, num_warps=warps, num_stages=2)


@pytest.fixture(params=[AHEAD, TMA, SPECIAL], ids=["ahead", "descriptors", "specialised"])
def way(request) -> Iterator[dict[str, bool]]:
    """Every launch inside goes this way."""
    flags = request.param
    others = {name: flags[name] for name in ("TMA", "AHEAD")}
    # With specialised warps causality must cut no block but the last.
    tile = (128, 128, 4) if flags["SPECIAL"] else (128, 64, 8)
    with (
        mmfast.use_backend("triton"),
        forward.forcing(config(*tile, **flags)),
        query_kernel.forcing(config(128, 64, 8, **others)),
        key_kernel.forcing(config(64, 128, 8, **others)),
    ):
        yield flags


def several(batch: int, heads: int, length: int, num_dims: int, keys: int) -> list[Tensor]:
    """Query, key and value."""
    made = qkv(batch, heads, TIMES * length, num_dims, TIMES * keys, dtype=BFLOAT16)
    return [t.to(DEVICE) for t in made]


@pytest.mark.parametrize("num_dims", [8, 40, 72, 120])
def test_head_sizes(way, num_dims):
    dense.check("triton", *several(1, 1, 40, num_dims, 53))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (70, 1), (64, 64), (33, 97)])
def test_lengths(way, length, keys, is_causal):
    dense.check("triton", *several(1, 1, length, 16, keys), is_causal=is_causal)


def test_heads_of_two_widths(way):
    query, key, value = (t.half() for t in several(2, 2, 33, 40, 20))
    dense.check("triton", query, key, value[..., :24].contiguous())


def test_grouped_heads(way):
    query, key, value = several(2, 4, 33, 24, 50)
    key, value = key[:, :2], value[:, :2]
    dense.check("triton", query, key, value, enable_gqa=True)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 35), (1, 2, 33, 35)], ids=str)
def test_masks(way, shape, added):
    if way["SPECIAL"]:
        pytest.skip("has none")
    mask = normal(*shape[:2], *(n if n == 1 else TIMES * n for n in shape[2:]), seed=7)
    dense.check("triton", *several(2, 2, 33, 24, 35), mask if added else mask < 0.5)


def test_rows_that_attend_to_nothing(way):
    if way["SPECIAL"]:
        pytest.skip("has no masks")
    tensors = several(2, 1, 33, 24, 35)
    mask = torch.ones(2, 1, 1, 35 * TIMES, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    found = with_gradients(mmfast.scaled_dot_product_attention, [*tensors, mask])
    assert all(t[1].eq(0).all() and t[0].isfinite().all() for t in found)


def test_layouts(way):
    """Views of one projection, and beside numbers that must not be read."""
    views = [t[:1] for t in packed("triton", BFLOAT16)]
    tensors = [t.contiguous() for t in views]
    expected = with_gradients(mmfast.scaled_dot_product_attention, tensors)
    narrow = [torch.cat([t, t + torch.nan], 3)[..., :72] for t in tensors]
    for given in (views, narrow):
        assert_same_bits(with_gradients(mmfast.scaled_dot_product_attention, given), expected)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(3))
def test_not_finite(way, which, number):
    """They spoil what they have part in, and nothing else."""
    tensors = several(1, 2, 40, 24, 40)
    expected = mmfast.scaled_dot_product_attention(*tensors)
    tensors[which][0, 1, 3, 5] = number
    out = mmfast.scaled_dot_product_attention(*tensors)
    assert_same_bits([out[0, 0]], [expected[0, 0]])
    if which == 2:
        assert not out[0, 1, :, 5].isfinite().any()
        others = [i for i in range(24) if i != 5]
        assert_same_bits([out[0, 1][:, others]], [expected[0, 1][:, others]])
    elif math.isnan(number):
        spoiled = out[0, 1].isnan().any(1)
        assert spoiled[3]
        assert spoiled.sum() == (1 if which == 0 else 40 * TIMES)


def test_large_scores(way):
    query, key, value = several(1, 1, 33, 16, 70)
    for factor in (30.0, -30.0):
        out, *grads = with_gradients(
            mmfast.scaled_dot_product_attention, [query * abs(factor), key * factor, value]
        )
        assert all(t.isfinite().all() for t in (out, *grads))
    dense.check("triton", query * 8, key * 4, value)


def of_one_stream(way) -> None:
    if way["SPECIAL"]:
        pytest.skip("has one stream of keys, from the first token on")


def test_joint_streams(way):
    of_one_stream(way)
    lengths = 33 * TIMES, 20 * TIMES
    streams = test_joint_attention.streams(2, 1, lengths, 72, dtype=BFLOAT16)
    test_joint_attention.check("triton", streams, [20 * TIMES, 3])


def test_text_beyond_its_length_is_not_read(way):
    of_one_stream(way)
    rows = 35 * TIMES
    made = test_joint_attention.streams(3, 1, (20, rows), 24, dtype=BFLOAT16)
    streams = [t.to(DEVICE) for t in made]
    lengths = torch.tensor([rows, rows - 2, 0], device=DEVICE)
    expected = with_gradients(mmfast.joint_attention, streams, text_lengths=lengths)
    beyond = torch.arange(rows, device=DEVICE) >= lengths[:, None]
    beyond = beyond[:, None, :, None]
    spoiled = [*streams[:3], *(t.masked_fill(beyond, torch.nan) for t in streams[3:])]
    got = with_gradients(mmfast.joint_attention, spoiled, text_lengths=lengths)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_one_behind_the_other(way, causal):
    of_one_stream(way)
    lengths, keys = (TIMES * 33, 0, 7), (TIMES * 40, 3, 20)
    test_varlen_attention.check("triton", lengths, keys, num_dims=72, causal=causal, dtype=BFLOAT16)


@pytest.mark.parametrize("num_dims", HEAD_SIZES)
def test_error_at_most_twice_that_of_pytorchs_definition(way, num_dims):
    """Of outputs and gradients, against float64."""
    tensors = several(1, 1, 33, num_dims, 50)
    got = with_gradients(mmfast.scaled_dot_product_attention, tensors)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = with_gradients(functional.scaled_dot_product_attention, tensors)
    exact = with_gradients(plain, [t.double() for t in tensors])
    for name, a, b, want in zip(("out", "query", "key", "value"), got, theirs, exact, strict=True):
        errors = [(t.double() - want).norm().item() for t in (a, b)]
        assert errors[0] <= 2 * errors[1], (name, errors)
