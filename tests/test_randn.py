"""randn: the published words, the streams, and whether the numbers are normal."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from cases import backends_here, device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmfast
from mmfast import philox
from mmfast.backends import interpreting
from mmfast.ops import randn

BACKENDS = backends_here(randn.OP)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WORD = 0xFFFFFFFF


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


# counter, key and result of philox4x32 with 10 rounds in Random123's file kat_vectors.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
def test_published_answers(counter, key, result):
    tensors = [[torch.tensor(n) for n in numbers(text)] for text in (counter, key)]
    assert [int(word) for word in philox.philox4x32(*tensors)] == numbers(result)
    c, k = numbers(counter), numbers(key)
    # As seed, offset and block, whose words come low first.
    signed = [
        torch.tensor(low | (high << 32) - (high >> 31 << 64))
        for low, high in ((k[0], k[1]), (c[2], c[3]), (c[0], c[1]))
    ]
    assert philox.words(*signed).tolist() == numbers(result)


def expected(seed: int, offset: int, element: int) -> float:
    """A normal number by Python's integers and math."""
    block = element // 4
    c = [block & WORD, block >> 32, offset & WORD, offset >> 32 & WORD]
    k = [seed & WORD, seed >> 32 & WORD]
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(q >> 32) ^ c[1] ^ k[0], q & WORD, (p >> 32) ^ c[3] ^ k[1], p & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    even = element % 4 // 2 * 2

    def rounded(x: float) -> float:
        return torch.tensor(x, dtype=torch.float64).float().item()

    first, second = c[even : even + 2]
    u = rounded(rounded(first) * 2.0**-32 + 2.0**-33)
    signed = (second % 2**30 ^ 2**29) - 2**29
    turns = rounded(rounded(4 * signed) * 2.0**-34 + 2.0**-33)
    radius = math.sqrt(-2 * math.log(u)) * (-1 if second >= 2**31 else 1)
    changed = element % 2 ^ second >> 30 & 1
    return radius * (math.sin if changed else math.cos)(2 * math.pi * turns)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5, -(2**63), 2**64 - 3])
@pytest.mark.parametrize("offset", [0, 7, 2**33 + 1, -2])
def test_definition(backend, seed, offset):
    device = device_of(backend)
    got = mmfast.randn((13,), seed=seed, offset=offset, dtype=torch.float64, device=device)
    want = [expected(seed % 2**64, offset % 2**64, i) for i in range(13)]
    torch.testing.assert_close(
        got.cpu(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )


def test_extreme_words():
    """The least and the largest uniform number, and angles about right ones."""
    assert philox.uniform(torch.tensor([0, WORD])).tolist() == [2.0**-33, 1.0]
    second = torch.tensor([0, WORD >> 2, 1 << 29, (1 << 29) - 1, 1 << 30, 1 << 31, 3 << 30])
    assert philox.angle(second).tolist() == [
        2.0**-33, -(2.0**-33), -0.125, 0.125, 2.0**-33, 2.0**-33, 2.0**-33
    ]  # fmt: skip
    first = torch.zeros_like(second)
    made = philox.box_muller(torch.stack((first, second, first + WORD, second), -1))
    assert not made[:, 2:].any()
    large = math.sqrt(66 * math.log(2))
    small, even = large * math.pi * 2.0**-32, large / math.sqrt(2)
    want = [(large, small), (large, -small), (even, -even), (even, even), (small, large),
            (-large, -small), (-small, -large)]  # fmt: skip
    torch.testing.assert_close(
        made[:, :2], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_stream_appends(backend, dtype):
    device = device_of(backend)
    long = mmfast.randn((9, 7), seed=3, offset=4, dtype=dtype, device=device)
    for rows in (0, 1, 5):
        short = mmfast.randn((rows, 7), seed=3, offset=4, dtype=dtype, device=device)
        assert torch.equal(short, long[:rows])
    assert torch.equal(
        mmfast.randn((3, 21), seed=3, offset=4, dtype=dtype, device=device), long.view(3, 21)
    )
    assert torch.equal(
        mmfast.randn((), seed=3, offset=4, dtype=dtype, device=device), long.flatten()[0]
    )


@settings(max_examples=40)
@given(count=st.integers(0, 700), seed=st.integers(-(2**63), 2**63 - 1))
def test_any_count(count, seed):
    for backend in BACKENDS:
        device = device_of(backend)
        with mmfast.use_backend(backend):
            got = mmfast.randn((count,), seed=seed, device=device)
            assert torch.equal(got, mmfast.randn((700,), seed=seed, device=device)[:count])
        assert not randn.compare(
            got, (torch.tensor(seed, device=device), torch.tensor(0, device=device), [count],
                  torch.float32),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["seeds", "offsets", "both"])
def test_samples_do_not_see_the_batch(backend, kind, dtype):
    device = device_of(backend)
    many = torch.tensor([5, -7, 2**45, 0, 5], device=device)
    one = torch.tensor(11, device=device)
    seed = many if kind != "offsets" else one
    offset = many.flip(0) if kind != "seeds" else one
    whole = mmfast.randn((5, 3, 11), seed=seed, offset=offset, dtype=dtype)
    assert whole.device == seed.device
    for b in range(5):
        alone = mmfast.randn(
            (1, 3, 11),
            seed=seed[b] if seed.dim() else seed,
            offset=offset[b : b + 1] if offset.dim() else 11,
            dtype=dtype,
        )
        assert torch.equal(alone[0], whole[b])
    assert torch.equal(
        mmfast.randn((2, 3, 11), seed=seed[3:] if seed.dim() else seed,
                     offset=offset[3:] if offset.dim() else offset, dtype=dtype),
        whole[3:],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(threads, dtype):
    seeds = torch.arange(3)
    many = mmfast.randn((3, 50_001), seed=seeds, dtype=dtype)
    long = mmfast.randn((150_003,), seed=1, dtype=dtype)
    torch.set_num_threads(1)
    assert torch.equal(many, mmfast.randn((3, 50_001), seed=seeds, dtype=dtype))
    assert torch.equal(long, mmfast.randn((150_003,), seed=1, dtype=dtype))
    assert torch.equal(long[:50_001], many[1])


def sample(
    backend: str, count: int = 1 << 14 if interpreting() else 1 << 17, **arguments: int
) -> Tensor:
    return mmfast.randn((count,), device=device_of(backend), **arguments).cpu().double()


def z_score(products: Tensor) -> float:
    """How many standard deviations the mean of independent products of variance 1 is from 0."""
    return abs(float(products.mean())) * math.sqrt(products.numel())


def test_moments(backend):
    x = sample(backend, seed=1)
    n = x.numel()
    # Variances of the first powers' means: E x^2p - (E x^p)^2.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((x**power).mean()) - moment) < 4 * math.sqrt(variance / n)


def test_kolmogorov_smirnov(backend):
    for seed in range(2):
        x = sample(backend, seed=seed, offset=seed).numpy()
        assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
        assert scipy.stats.kstest(x[::4], "norm").pvalue > 1e-3


def test_tails(backend):
    x = sample(backend, 1 << 18, seed=2).abs()
    for limit in (2.5, 3.5, 4.0):
        wanted = x.numel() * math.erfc(limit / math.sqrt(2))
        assert abs(int((x > limit).sum()) - wanted) < 4 * math.sqrt(wanted)
    assert float(x.max()) < math.sqrt(66 * math.log(2))


def test_neighbours_are_independent(backend):
    x = sample(backend, seed=3)
    for lag in (1, 2, 3, 4, 5, 8, 16, 32, 64, 1024):
        assert z_score(x[lag:] * x[:-lag]) < 4
        # A radius in common would show in the squares.
        assert z_score((x[lag:].square() - 1) * (x[:-lag].square() - 1) / 2) < 4


def test_streams_are_independent(backend):
    x = sample(backend, seed=3)
    for other in ({"seed": 4}, {"seed": 3 + 2**32}, {"seed": 3, "offset": 1},
                  {"seed": 3, "offset": 2**32}, {"seed": -3}):  # fmt: skip
        y = sample(backend, **other)
        assert not torch.isclose(x, y, rtol=1e-6, atol=0).sum() > 4
        assert z_score(x * y) < 4
        assert z_score(x[1:] * y[:-1]) < 4


def test_float32_has_fine_small_numbers(backend):
    x = sample(backend, 1 << 18, seed=5)
    assert x.unique().numel() > 0.995 * x.numel()
    assert 0 < float(x.abs().min()) < 1e-4


def test_ints_are_tensors(backend):
    device = device_of(backend)
    by_tensor = mmfast.randn((40,), seed=torch.tensor(-1, device=device))
    assert by_tensor.device == torch.zeros(0, device=device).device
    for seed in (-1, 2**64 - 1):
        assert torch.equal(mmfast.randn((40,), seed=seed, device=device), by_tensor)
    assert mmfast.randn((40,), seed=0).device.type == "cpu" or device.type == "cuda"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed must be .* int64 tensor, got float32"),
        ({"seed": 1, "offset": None}, TypeError, "offset must be .*, got NoneType"),
        ({"seed": 2**64}, ValueError, "seed must have at most 64 bits, got 18446744073709551616"),
        ({"seed": torch.zeros(2, 1).long()}, ValueError, r"seed must be of shape .*\(2, 1\)"),
        ({"seed": torch.arange(3)}, ValueError, r"seed .* with the shape's B = 2, got \(3,\)"),
        ({"seed": 0, "offset": torch.arange(1)}, ValueError, r"offset .* B = 2, got \(1,\)"),
        ({"seed": 0, "dtype": torch.int64}, TypeError, "dtype must be float32, .*, got int64"),
        (
            {"seed": torch.tensor(0), "device": "meta"},
            ValueError,
            "seed must be on meta, got one on cpu",
        ),
    ],
)
def test_messages(arguments, error, message):
    with pytest.raises(error, match=message):
        mmfast.randn((2, 3), **arguments)


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match=r"shape must have no negative size, got \[2, -1\]"):
        mmfast.randn((2, -1), seed=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [(5, "a sequence of ints, got int"), ((2, 1.5), "size of shape must be an int, got float")],
)
def test_shapes_of_other_kinds_are_refused(shape, message):
    with pytest.raises(TypeError, match=message):
        mmfast.randn(shape, seed=0)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(compiler):
    def noise(x, seed, step):
        return x + mmfast.randn(x.shape, seed=seed, offset=step) * mmfast.randn(x.shape, seed=step)

    torch.compiler.reset()
    compiled = torch.compile(noise, fullgraph=True, backend=compiler)
    for batch, step in ((3, 0), (5, 1), (6, 2)):
        x, seed = torch.ones(batch, 7), torch.arange(batch)
        torch.testing.assert_close(compiled(x, seed, step), noise(x, seed, step))


def test_reference_compiles():
    def numbers(seed, offset):
        return philox.normals(seed, offset, 37), philox.uniforms(seed, offset, 37)

    torch.compiler.reset()
    compiled = torch.compile(numbers, fullgraph=True, backend="aot_eager")
    seed, offset = torch.tensor([1, -5]), torch.tensor(2**40)
    for got, want in zip(compiled(seed, offset), numbers(seed, offset), strict=True):
        torch.testing.assert_close(got, want)
