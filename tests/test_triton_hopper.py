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
from benchmarks import gpu_attention_peers
from mmfast import backends
from mmfast.backends import interpreting

pytest.importorskip("triton")
if interpreting():
    import quick_interpreter  # noqa: F401
elif not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper, or TRITON_INTERPRET=1", allow_module_level=True)
import triton

from mmfast.kernels import attention_gradients
from mmfast.kernels.attention_forward import forward
from mmfast.kernels.attention_fused_gradient import fused_gradient, fused_kernel
from mmfast.kernels.attention_key_gradient import key_kernel
from mmfast.kernels.attention_query_gradient import query_kernel
from mmfast.kernels.attention_tiles import TWO_KERNELS
from mmfast.kernels.scaled_dot_product_attention import HEAD_SIZES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BFLOAT16 = torch.bfloat16
AHEAD = {"TMA": False, "AHEAD": True, "SPECIAL": False}
TMA = {"TMA": True, "AHEAD": True, "SPECIAL": False}
SPECIAL = {"TMA": True, "AHEAD": True, "SPECIAL": True}
FUSED = {**TMA, "ORDERED": False}
ORDERED = {**TMA, "ORDERED": True}


DEVICE = device_of("triton")
# Tiles are small where each takes milliseconds, and lengths are of several of them.
TIMES = 1 if interpreting() else 5


def config(rows: int, columns: int, warps: int, **flags: bool) -> triton.Config:
    """With tiles of so many queries and keys on a GPU."""
    smaller = 4 if interpreting() else 1
    sizes = {"BLOCK_M": rows // smaller, "BLOCK_N": columns // smaller}
    return triton.Config({**sizes, **flags}, num_warps=warps, num_stages=2)


def in_one_pass(ordered: bool) -> triton.Config:
    """Gradients of queries, keys and values by one kernel."""
    return config(64, 128, 8, ORDERED=ordered)


@pytest.fixture(
    # The interpreter's programs run in their order anyway.
    params=[AHEAD, TMA, SPECIAL, FUSED, *([] if interpreting() else [ORDERED])],
    ids=["ahead", "descriptors", "specialised", "fused", *([] if interpreting() else ["ordered"])],
)
def way(request) -> Iterator[dict[str, bool]]:
    """Every launch inside goes this way."""
    flags = request.param
    others = {name: flags[name] for name in ("TMA", "AHEAD")}
    fused = in_one_pass(flags["ORDERED"]) if "ORDERED" in flags else TWO_KERNELS
    flags = {name: flags[name] for name in TMA}
    # With specialised warps causality must cut no block but the last.
    tile = (128, 128, 4) if flags["SPECIAL"] else (128, 64, 8)
    with (
        mmfast.use_backend("triton"),
        forward.forcing(config(*tile, **flags)),
        query_kernel.forcing(config(128, 64, 8, **others)),
        key_kernel.forcing(config(64, 128, 8, **others)),
        fused_kernel.forcing(fused),
    ):
        yield request.param


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


# Gradients in one pass.


@pytest.fixture(params=[False, True], ids=["unordered", "ordered"])
def passes(request, monkeypatch) -> Iterator[list[int]]:
    """Gradients are made in one pass where they can be; how often they were."""
    made = []

    def counted(*arguments):
        made.append(1)
        fused_gradient(*arguments)

    monkeypatch.setattr(attention_gradients, "fused_gradient", counted)
    forced = fused_kernel.forcing(in_one_pass(request.param))
    with mmfast.use_backend("triton"), forced:
        yield made


def test_one_pass_is_taken(passes):
    dense.check("triton", *several(2, 2, 40, 72, 53))
    test_varlen_attention.check("triton", (TIMES * 33, 0, 7), (TIMES * 40, 3, 20), dtype=BFLOAT16)
    assert len(passes) == 2


def test_one_pass_in_its_order_gives_the_same_bits(passes, request):
    """Each time; in the interpreter programs have one anyway."""
    if not interpreting() and "unordered" in request.node.name:
        pytest.skip("has no order")
    tensors = several(2, 2, 40, 40, 100)
    expected = with_gradients(mmfast.scaled_dot_product_attention, tensors)
    for _ in range(TIMES):
        assert_same_bits(with_gradients(mmfast.scaled_dot_product_attention, tensors), expected)
    assert len(passes) == 1 + TIMES


def test_one_pass_begins_with_zeros(passes):
    """Its workspace is not filled by whoever allocates it."""
    tensors = several(2, 1, 40, 40, 53)
    expected = with_gradients(mmfast.scaled_dot_product_attention, tensors)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        got = with_gradients(mmfast.scaled_dot_product_attention, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(passes) == 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_scores_far_below_zero(passes):
    """exp2(-sum) of keys that are not there, zeros, would be infinite."""
    query, key, value = several(1, 1, 20, 16, 33)
    query, key = query.abs() + 4, -(key.abs() + 4)
    dense.check("triton", query, key, value)
    assert len(passes) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": 0.2, "seed": 3},
        {"scale": -0.3},
        {"enable_gqa": True},
        {"attn_mask": torch.ones(33, 33, dtype=torch.bool)},
    ],
    ids=str,
)
def test_what_one_pass_does_not_take(passes, options):
    query, key, value = (t[:, :, :33] for t in several(1, 2, 33, 24, 33))
    if "enable_gqa" in options:
        key, value = key[:, :1], value[:, :1]
    if "attn_mask" in options:
        options = {"attn_mask": options["attn_mask"].to(DEVICE)}
    with_gradients(mmfast.scaled_dot_product_attention, [query, key, value], **options)
    assert passes == []


def test_one_pass_of_a_mask_that_needs_no_gradient(passes):
    query, key, value = several(2, 2, 33, 24, 35)
    mask = normal(2, 1, 1, 35 * TIMES, seed=7).to(BFLOAT16).to(DEVICE)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out = mmfast.scaled_dot_product_attention(*leaves, attn_mask=mask)
    got = torch.autograd.grad(out.float().square().sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = plain(*exact, mask.double())
    wanted = torch.autograd.grad(wanted.square().sum(), exact)
    assert passes == [1]
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).norm() <= 0.01 * b.norm()


def test_each_way_has_a_row_in_the_benchmarks(passes):
    """Beside what mmfast chooses, with the same gradients of queries."""
    sample = dense.op._backward_of(dense.op._sample(1, 2, 33, 24))
    arguments = sample.make(torch.device(DEVICE), BFLOAT16, 0)
    expected = backends.call(dense.op.BACKWARD, *arguments)[0]
    assert passes == [1]
    rows = gpu_attention_peers.PEERS[dense.op.BACKWARD.name]
    names = {"mmfast, two kernels", "mmfast, in turns", "mmfast, in any order"}
    assert names <= rows.keys()
    for name in names:
        if not interpreting():
            assert rows[name].unsupported(*arguments) == []
            found = rows[name].make(*arguments)()
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    found = rows["mmfast, two kernels"].make(*arguments)()
    assert len(passes) == (1 if interpreting() else 3)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
