"""What the attention kernels have to choose from on each kind of device, and what comes of it."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

import mmfast
from mmfast import backends

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("Triton interprets in this process", allow_module_level=True)
import triton

from mmfast.kernels import attention_tiles, offline
from mmfast.kernels.attention import BEGINS, DENSE, Limits, Tokens, factor_of, head_strides
from mmfast.kernels.attention_forward import attention_forward, forward
from mmfast.kernels.attention_fused_gradient import fused_kernel, places_of
from mmfast.kernels.attention_gradients import _fits
from mmfast.kernels.attention_key_gradient import key_kernel
from mmfast.kernels.attention_query_gradient import query_kernel
from mmfast.kernels.attention_tiles import TWO_KERNELS
from mmfast.kernels.scaled_dot_product_attention import (
    HEAD_SIZES,
    scaled_dot_product_attention,
    scaled_dot_product_attention_bwd,
    tuning,
)
from mmfast.kernels.tuned import Tuned

TUNED = {"forward": forward, "query": query_kernel, "key": key_kernel}
FUSED = ["unordered", "ordered"]
HOPPER = "sm_90"


def ways(kernel, constants) -> list[str]:
    """Of the candidates, in their order."""
    flags = ("TMA", "AHEAD", "SPECIAL")
    return [
        " ".join(n.lower() for n in flags if c.kwargs.get(n)) or "plain"
        for c in kernel.candidates(constants)
    ]


def asked(name, target=HOPPER, *, length=1024, width=72, dtype=torch.bfloat16, **options):
    """The ways that a launch has to choose from."""
    query, key, value = (torch.ones(1, 2, 1, width, dtype=dtype) for _ in range(3))
    query, key, value = (t.expand(1, 2, length, width).contiguous() for t in (query, key, value))
    if options.pop("crooked", False):
        key = torch.ones(1, 2, length, width + 1, dtype=dtype)[..., :width]
    mask = options.pop("mask", None)
    others = options.get("dropout_p", 0.0), options.get("causal", False), options.get("scale", 0.1)
    seed = torch.ones((), dtype=torch.int64)
    found = []

    def run(self, *arguments, grid, facts, **constants):
        if self is TUNED[name]:
            found.append(ways(self, {**constants, **facts}))

    with offline.compiling(offline.TARGETS[target]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuned, "run", run)
        if name == "forward":
            scaled_dot_product_attention(query, key, value, mask, *others, seed, seed)
        else:
            lse = torch.ones(query.shape[:3])
            scaled_dot_product_attention_bwd(
                query, query, key, value, query, lse, mask, *others, seed, seed, False
            )
    (only,) = found
    return only


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("target", [t for t in offline.TARGETS if t != HOPPER])
def test_other_devices_have_one(name, target):
    assert asked(name, target) == ["plain"]


@pytest.mark.parametrize("width", HEAD_SIZES)
def test_what_hopper_has(width):
    long, short = (asked("forward", length=n, width=width) for n in (1024, 256))
    assert long == ["tma ahead", "tma ahead special", "ahead", "ahead", "plain"]
    assert sorted(short) == sorted(long)
    assert short[0] == "ahead"
    for name in ("query", "key"):
        long, short = (asked(name, length=n, width=width) for n in (1024, 256))
        assert (long[0], long[-1], short[0]) == ("tma ahead", "plain", "ahead")
        assert sorted(short) == sorted(long)


@pytest.mark.parametrize("name", TUNED)
def test_where_descriptors_cannot_be_made(name):
    """A row's stride that is no multiple of 16 bytes."""
    assert set(asked(name, crooked=True)) == {"ahead", "plain"}


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": 0.1},
        {"scale": -0.1},
        {"scale": 0.0},
        {"width": 136},
        {"dtype": torch.float32},
        {"mask": torch.ones(1, 1, 1024, 1024, dtype=torch.bool)},
    ],
    ids=str,
)
def test_what_is_left_to_the_plain_kernels(name, options):
    assert asked(name, **options) == ["plain"]


@pytest.mark.parametrize("width", [8, 72, 128])
def test_a_single_token_has_a_stride_that_descriptors_take(width):
    """Whatever torch says that it is, which nothing reads: a query for a long sequence of keys."""
    for stride in (0, 1, width):
        query = torch.ones(6 * width).as_strided((2, 3, 1, width), (3 * width, width, stride, 1))
        batch, head, row = head_strides(query)
        assert (batch, head) == (3 * width, width)
        assert row >= width
        assert row % 16 == 0
        assert factor_of(query) % 8 == 0


def test_specialised_warps_have_neither_masks_nor_two_streams():
    padding = torch.ones(1, 1, 1, 1024, dtype=torch.bool)
    assert "tma ahead special" not in asked("forward", mask=padding)
    assert "tma ahead" in asked("forward", mask=padding)
    assert "tma ahead special" in asked("forward", causal=True)
    # There causality cuts more than the last block.
    assert "tma ahead special" not in asked("forward", causal=True, width=128)


def compiled(config, width):
    """The forward by one way."""
    query = torch.ones(1, 2, 64, width, dtype=torch.bfloat16)
    keys = [(query, query, Tokens.of(query))]
    with (
        offline.compiling(offline.TARGETS[HOPPER]) as kernels,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(type(forward), "candidates", lambda self, constants: [config])
        out, lse = query.clone(), torch.ones(1, 2, 64)
        attention_forward(query, keys, out, lse, 0.1, keys[0][2], Limits())
    return kernels[0]


def instructions(kernel, tmp_path) -> str:
    """SASS."""
    tool = offline.cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump beside Triton")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    done = subprocess.run([tool, "-sass", path], check=True, capture_output=True, text=True)
    return done.stdout


def test_exponentials_are_made_between_products(tmp_path):
    """Of a block while those of the one before, which stay in registers, meet their values."""
    config = attention_tiles._config(128, 128, 8, 2, TMA=True, AHEAD=True, SPECIAL=False)
    kernel = compiled(config, 64)
    found = re.findall(
        r"\b(HGMMA\S* R\d+, R\d+, gdesc|MUFU\.EX2|BRA)\b", instructions(kernel, tmp_path)
    )
    text = "".join({"M": "x", "H": "p", "B": "|"}[word[0]] for word in found)
    # Of the loops two, with and without masks, have eight products with 64 exponentials among them.
    among = [part.strip("x").count("x") for part in text.split("|") if part.count("p") == 8]
    assert sum(n >= 32 for n in among) >= 2, text


def test_warps_have_tasks_of_their_own(tmp_path):
    """One group copies, with few registers; two multiply, with many."""
    config = attention_tiles._config(128, 128, 4, 2, TMA=True, AHEAD=True, SPECIAL=True)
    kernel = compiled(config, 64)
    assert kernel.metadata.num_warps == 12
    text = instructions(kernel, tmp_path)
    given = {int(n, 16) for n in re.findall(r"USETMAXREG\S*(?: UP\d,)? (0x[0-9a-f]+)", text)}
    assert min(given) <= 40
    assert 232 in given
    assert "STL" not in text


@pytest.fixture
def newer(monkeypatch):
    """As with a Triton of which nothing in one pass spills."""
    monkeypatch.setattr(attention_tiles, "_BEFORE_3_7", False)


@pytest.mark.parametrize(("kernel", "problems"), tuning, ids=[*TUNED, "fused"])
def test_problems_of_the_search(kernel, problems, newer):
    def run(self, *arguments, grid, facts, **constants):
        self.choose({**constants, **facts})

    with offline.compiling(offline.TARGETS[HOPPER]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuned, "run", run)
        made = list(problems(torch.device("cpu"), 16))
        keys = {kernel.key_of(problem.constants) for problem in made}
        assert len(keys) == len(made)
        fewest = 2 if kernel is fused_kernel else 3
        assert all(len(kernel.candidates(problem.constants)) >= fewest for problem in made)


def one_pass(target=HOPPER, *, width=72, length=1024, heads=2, **options) -> list[str]:
    """What the gradients have to choose from, in order; "two" is a kernel each."""
    query = torch.ones(1, 2, length, width, dtype=options.get("dtype", torch.bfloat16))
    key = torch.ones(1, heads, length, width, dtype=query.dtype)
    if "crooked" in options:
        query = torch.ones(1, 2, length, width + 1, dtype=query.dtype)[..., :width]
    mask, seed = options.get("mask"), torch.ones((), dtype=torch.int64)
    others = mask, options.get("dropout_p", 0.0), "causal" in options, options.get("scale", 0.1)
    found = [TWO_KERNELS]

    def choose(constants):
        found[:] = fused_kernel.candidates(constants)
        return TWO_KERNELS

    with offline.compiling(offline.TARGETS[target]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuned, "run", lambda *arguments, **more: None)
        patch.setattr(fused_kernel, "choose", choose)
        scaled_dot_product_attention_bwd(
            query, query, key, key, query, torch.ones(1, 2, length), *others, seed, seed,
            options.get("want_mask_grad", False),
        )  # fmt: skip
    return ["two" if c is TWO_KERNELS else FUSED[c.kwargs["ORDERED"]] for c in found]


@pytest.mark.parametrize("width", HEAD_SIZES)
def test_gradients_in_one_pass_by_triton_3_6(width, monkeypatch):
    monkeypatch.setattr(attention_tiles, "_BEFORE_3_7", True)
    with mmfast.sums_in_any_order():
        several = ["unordered", "ordered", "two"]
        assert one_pass(width=width) == (["two"] if width > 96 else several)


@pytest.mark.parametrize("width", HEAD_SIZES)
def test_gradients_in_one_pass(width, newer):
    """By default only such that give the same bits, and not before they were measured."""
    assert one_pass(width=width) == ["two", "ordered"]
    with mmfast.sums_in_any_order():
        assert one_pass(width=width) == ["unordered", "ordered", "two"]
        assert one_pass(width=width, length=256) == ["two", "unordered", "ordered"]
        torch.use_deterministic_algorithms(True)
        try:
            assert one_pass(width=width) == ["two", "ordered"]
        finally:
            torch.use_deterministic_algorithms(False)
    assert one_pass(width=width) == ["two", "ordered"]


def test_turns_take_registers(newer):
    padding = torch.ones(1, 1, 1, 1024, dtype=torch.bool)
    with mmfast.sums_in_any_order():
        for options in ({"causal": True}, {"mask": padding}):
            assert one_pass(width=96, **options) == ["unordered", "ordered", "two"]
            assert one_pass(width=128, **options) == ["unordered", "two"]


@pytest.mark.parametrize(
    "options",
    [
        {"target": "sm_80"},
        {"target": "sm_100"},
        {"target": "gfx942"},
        {"crooked": True},
        {"heads": 1},
        {"dropout_p": 0.1},
        {"scale": -0.1},
        {"scale": 1e-30},
        {"width": 136},
        {"length": 0},
        {"dtype": torch.float32},
        {"mask": torch.ones(1, 1, 1024, 1024, dtype=torch.bool)},
        {"mask": torch.ones(1, 1, 1, 1024, dtype=torch.bfloat16), "want_mask_grad": True},
    ],
    ids=str,
)
def test_gradients_that_take_two_kernels(options):
    with mmfast.sums_in_any_order():
        assert one_pass(**options) == ["two"]


@pytest.mark.parametrize("ordered", [False, True], ids=FUSED)
def test_products_of_one_pass(ordered, tmp_path):
    """Of a step of the loop: those of queries, scores, then values with the exponentials among
    them, and those of dV and dK, which nothing waits for. None waits for another of its kind."""
    query = torch.ones(1, 2, 64, 64, dtype=torch.bfloat16)
    sizes = {"BLOCK_M": 64, "BLOCK_N": 128, "ORDERED": ordered}
    forced = fused_kernel.forcing(triton.Config(sizes, num_warps=8, num_stages=2))
    others = None, 0.0, False, 0.1, None, None, False
    with offline.compiling(offline.TARGETS[HOPPER]) as kernels, forced:
        scaled_dot_product_attention_bwd(*[query] * 5, torch.ones(1, 2, 64), *others)
    (kernel,) = (k for k in kernels if k.src.fn.__name__ == fused_kernel.name)
    words = r"\b(HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2|UTMAREDG)\b"
    found = re.findall(words, instructions(kernel, tmp_path))
    letters = {"H": "p", "W": "w", "M": "x", "U": "a"}
    text = "".join(letters[word[0]] for word in found)
    step = re.match(r"p{8}w+ap{4}w([px]+)w([px]+)w", text)
    assert step, text
    assert [part.count("p") for part in step.groups()] == [4, 8]
    assert step[1].count("x") >= 16


@pytest.mark.parametrize(
    ("rows", "batch", "kind", "places"),
    [
        (1024, 3, DENSE, 3072),
        (1000, 3, DENSE, 3072),
        (4096, 4, BEGINS, 4608),
        (1000, 8, BEGINS, 2048),  # of 1000 queries in 8 sequences
        (100000, 5000, BEGINS, 740096),
    ],
)
def test_short_sequences_do_not_take_the_memory_of_one_pass(rows, batch, kind, places):
    queries = Tokens(None, rows, 1024, kind.value)
    assert places_of(queries, batch) == places
    packed = rows if kind is BEGINS else rows * batch
    assert _fits(queries, batch) == (places <= 2 * packed)
    assert _fits(queries, batch) == (rows not in (1000, 100000) or kind is DENSE)
