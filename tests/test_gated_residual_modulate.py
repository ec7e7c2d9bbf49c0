"""gated_residual_modulate, and with it gated_residual and layer_norm_modulate: layouts of the
modulation, gradients, hard values, what is kept, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import backends_here, device_of, normal
from test_determinism import assert_same_bits
from torch.nn import functional as F

import mmfast
from mmfast.ops import gated_residual_modulate

BACKENDS = backends_here(gated_residual_modulate.OP)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def along(modulation: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A modulation (B, C), (B, F, C) or (B, L, C) for each of x's tokens."""
    if modulation.dim() == 2:
        modulation = modulation[:, None]
    return modulation.repeat_interleave(x.shape[1] // modulation.shape[1], 1)


def plain(x, gate, y, shift, scale, norm="layer", weight=None, bias=None, tanh=False):
    """As models write it."""
    gate = along(gate, x)
    residual = x + (gate.tanh() if tanh else gate) * y
    sizes = residual.shape[-1:]
    if norm == "layer":
        normed = F.layer_norm(residual, sizes, weight, bias, 1e-6)
    else:
        normed = F.rms_norm(residual, sizes, weight, 1e-6)
    return residual, normed * (1 + along(scale, x)) + along(shift, x)


def apart(x, gate, y, shift, scale, *, gate_activation="linear", **norm):
    """By the two ops."""
    residual = mmfast.gated_residual(x, gate, y, gate_activation=gate_activation)
    return residual, mmfast.layer_norm_modulate(residual, shift, scale, **norm)


def problem(frames: int, length: int = 70, channels: int = 40, dtype=torch.float64):
    """x, y, the modulation of six parts, weight, bias."""
    shape = (3, frames, 6 * channels) if frames else (3, 6 * channels)
    x, y = (normal(3, length, channels, seed=seed, dtype=dtype) for seed in range(2))
    weight, bias = (normal(channels, seed=seed, dtype=dtype) for seed in (3, 4))
    leaves = x, y, normal(*shape, seed=2, dtype=dtype), weight, bias
    return [t.requires_grad_() for t in leaves]


@pytest.mark.parametrize("function", [mmfast.gated_residual_modulate, apart])
@pytest.mark.parametrize("frames", [0, 1, 2, 7, 70])
def test_as_models_write_it(backend, function, frames):
    if backend == "triton" and frames not in (0, 70):
        pytest.skip("interpreting takes long")
    for norm, tanh in itertools.product(("layer", "rms"), (False, True)):
        leaves = [t.detach().to(device_of(backend)).requires_grad_() for t in problem(frames)]
        x, y, table, weight, bias = leaves if norm == "layer" else (*leaves[:4], None)
        gate, shift, scale = table.chunk(6, -1)[2:5]
        options = {"norm": norm, "weight": weight, "bias": bias}
        activation = "tanh" if tanh else "linear"
        got = function(x, gate, y, shift, scale, gate_activation=activation, **options)
        want = plain(x, gate, y, shift, scale, tanh=tanh, **options)
        grads = [torch.cos(t.detach()) for t in want]
        leaves = [t for t in (x, y, table, weight, bias) if t is not None]
        for a, b in zip(
            (*got, *torch.autograd.grad(got, leaves, grads)),
            (*want, *torch.autograd.grad(want, leaves, grads)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    for frames, norm, activation in (
        (1, "layer", "tanh"),
        (3, "rms", "linear"),
        (6, "layer", "tanh"),
    ):
        x, y, table, weight, bias = problem(frames, length=6, channels=4)

        def call(x, y, table, weight, bias, norm=norm, activation=activation):
            gate, shift, scale = table.chunk(6, -1)[:3]
            return mmfast.gated_residual_modulate(
                x, gate, y, shift, scale, norm=norm, weight=weight, bias=bias,
                gate_activation=activation,
            )  # fmt: skip

        assert torch.autograd.gradcheck(call, (x, y, table, weight, bias))


def test_shapes_of_the_modulation(backend):
    device = device_of(backend)
    x, y = normal(2, 4, 3, 8).to(device), normal(2, 4, 3, 8, seed=1).to(device)
    for shape in (
        (8,), (1, 8), (2, 8), (2, 1, 8), (2, 4, 8), (2, 6, 8), (2, 12, 8), (1, 4, 8),
        (2, 1, 1, 8), (2, 4, 1, 8), (1, 4, 3, 8), (2, 4, 3, 8),
    ):  # fmt: skip
        gate = normal(*shape, seed=2).to(device)
        per_token = gate
        if gate.dim() < 3:
            per_token = gate.view(-1, 1, 1, 8)
        elif gate.dim() == 3:
            per_token = gate.repeat_interleave(12 // gate.shape[1], 1).view(-1, 4, 3, 8)
        torch.testing.assert_close(mmfast.gated_residual(x, gate, y), x + per_token * y)


def test_frames_of_different_lengths(backend):
    device = device_of(backend)
    x, y = normal(2, 12, 8).to(device), normal(2, 12, 8, seed=1).to(device)
    gate, shift, scale = (normal(2, frames, 8, seed=frames).to(device) for frames in (4, 6, 1))
    got = mmfast.gated_residual_modulate(x, gate, y, shift, scale)
    want = plain(x, gate, y, shift, scale)
    torch.testing.assert_close(tuple(got), want)


def test_one_sample_of_vectors(backend):
    device = device_of(backend)
    x, y, gate = (normal(3, 8, seed=seed).to(device) for seed in range(3))
    torch.testing.assert_close(mmfast.gated_residual(x, gate, y), x + gate * y)
    got = mmfast.layer_norm_modulate(x, None, None)
    torch.testing.assert_close(got, F.layer_norm(x, (8,), eps=1e-6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float32_modulation_of_other_activations(backend, dtype):
    device = device_of(backend)
    x, y = (normal(2, 10, 24, seed=seed, dtype=dtype).to(device) for seed in range(2))
    table = normal(2, 1, 144, seed=2).to(device).requires_grad_()
    gate, shift, scale = table.chunk(6, -1)[1:4]
    residual, modulated = mmfast.gated_residual_modulate(x, gate, y, shift, scale)
    assert residual.dtype == modulated.dtype == dtype
    want, _ = plain(x.double(), gate.double(), y.double(), shift.double(), scale.double())
    _, modulated_want = plain(
        residual.double(), 0 * gate.double(), y.double(), shift.double(), scale.double()
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(residual.double(), want, rtol=eps, atol=1e-6)
    torch.testing.assert_close(modulated.double(), modulated_want, rtol=eps, atol=1e-5)
    modulated.sum().backward()
    assert table.grad.dtype == torch.float32


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, -1e6])
def test_error_is_at_most_twice_that_of_torch(backend, offset):
    device = device_of(backend)
    for channels in (64, 129, 1152):
        x = (normal(2, 16, channels, dtype=torch.float64) + offset).float().to(device)
        want = F.layer_norm(x.double(), (channels,), eps=1e-6)
        theirs = (F.layer_norm(x, (channels,), eps=1e-6) - want).abs().max()
        ours = (mmfast.layer_norm_modulate(x, None, None) - want).abs().max()
        assert ours <= 2 * theirs + 1e-6


def test_rows_without_variance(backend):
    x = torch.full((2, 3, 40), 7.25, device=device_of(backend))
    assert torch.equal(mmfast.layer_norm_modulate(x, None, None), torch.zeros_like(x))


def test_nonfinite_numbers_stay_in_their_rows(backend):
    device = device_of(backend)
    x, y = normal(2, 3, 40).to(device), normal(2, 3, 40, seed=1).to(device)
    gate, shift, scale = (normal(2, 40, seed=seed).to(device) for seed in range(3))
    want = mmfast.gated_residual_modulate(x, gate, y, shift, scale)
    x[0, 1, 3], x[1, 2, 39] = torch.nan, torch.inf
    got = mmfast.gated_residual_modulate(x, gate, y, shift, scale)
    for b, token in itertools.product(range(2), range(3)):
        if (b, token) in ((0, 1), (1, 2)):
            assert got.modulated[b, token].isnan().any()
        else:
            assert_same_bits([t[b, token] for t in got], [t[b, token] for t in want])


@pytest.mark.parametrize("frames", [1, 2, 70])
def test_same_bits_for_threads_and_batches(frames):
    def run(part: slice) -> list[torch.Tensor]:
        leaves = [t.detach() for t in problem(frames, dtype=torch.float32)]
        x, y, table = (t[part].requires_grad_() for t in leaves[:3])
        gate, shift, scale = table.chunk(6, -1)[2:5]
        outputs = mmfast.gated_residual_modulate(x, gate, y, shift, scale, gate_activation="tanh")
        grads = torch.autograd.grad(outputs, (x, y, table), [t.detach() for t in outputs])
        return [*outputs, *grads]

    before = torch.get_num_threads()
    whole = run(slice(None))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(run(slice(None)), whole)
            for b in range(3):
                assert_same_bits(run(slice(b, b + 1)), [t[b : b + 1] for t in whole])
    finally:
        torch.set_num_threads(before)


def test_outputs_past_the_cache():
    """Large enough for stores that leave the cache out."""
    x, y = normal(2, 1200, 1024), normal(2, 1200, 1024, seed=1)
    gate, shift, scale = normal(2, 3072, seed=2).chunk(3, -1)
    small = [
        mmfast.gated_residual_modulate(x[:, part], gate, y[:, part], shift, scale)
        for part in (slice(0, 600), slice(600, 1200))
    ]
    whole = mmfast.gated_residual_modulate(x, gate, y, shift, scale)
    assert_same_bits(whole, [torch.cat(parts, 1) for parts in zip(*small, strict=True)])


@pytest.mark.parametrize(
    "needed", [("x",), ("y",), ("gate",), ("shift",), ("weight",), ("y", "scale")]
)
def test_only_what_is_needed(needed):
    x, y, table, weight, bias = (t.detach() for t in problem(1))
    gate, shift, scale = (t.clone() for t in table.chunk(6, -1)[:3])
    given = {
        "x": x, "gate": gate, "y": y, "shift": shift, "scale": scale, "weight": weight, "bias": bias
    }  # fmt: skip
    for name in needed:
        given[name].requires_grad_()
    options = {name: given.pop(name) for name in ("weight", "bias")}
    got = mmfast.gated_residual_modulate(*given.values(), **options)
    want = plain(*given.values(), **options)
    leaves = [(given | options)[name] for name in needed]
    for which in ((0, 1), (0,), (1,)):
        outputs = [[made[i] for i in which if want[i].requires_grad] for made in (got, want)]
        if not outputs[0]:
            continue
        grads = [
            torch.autograd.grad(
                o, leaves, [t.detach() for t in outputs[1]], retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )
            for o in outputs
        ]  # fmt: skip
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_is_kept():
    """The residual and two numbers per token, beside the arguments."""
    x, y, table, *_ = problem(1, dtype=torch.float32)
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t

    def kept(function) -> int:
        sizes.clear()
        gate, shift, scale = table.chunk(6, -1)[2:5]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = function(x, gate, y, shift, scale)
        own = {t.untyped_storage().data_ptr() for t in (x, y, table)}
        assert outputs[0].requires_grad
        return sum(size for at, size in sizes.items() if at not in own)

    ours = kept(mmfast.gated_residual_modulate)
    assert ours == x.nbytes + 2 * 4 * 3 * 70
    assert 2 * ours <= kept(plain) + 4 * 4 * 3 * 70


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def call(x, y, table):
        gate, shift, scale = table.chunk(6, -1)[2:5]
        residual, modulated = mmfast.gated_residual_modulate(x, gate, y, shift, scale)
        return (residual * modulated).sum()

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (70, 14):
        x, y, table, *_ = problem(7, length=length)
        for a, b in zip(
            torch.autograd.grad(compiled(x, y, table), (x, y, table)),
            torch.autograd.grad(call(x, y, table), (x, y, table)),
            strict=True,
        ):
            assert torch.equal(a, b)


REFUSED = [
    (TypeError, "y must have x's dtype", {"y": torch.ones(2, 6, 8).half()}),
    (ValueError, "y must have x's shape", {"y": torch.ones(2, 5, 8)}),
    (ValueError, r"x must be \(B, ..., C\)", {"x": torch.ones(8)}),
    (
        ValueError,
        r"gate must be .* F a divisor of L.* got \(2, 4, 8\)",
        {"gate": torch.ones(2, 4, 8)},
    ),
    (ValueError, r"shift must be .* got \(3, 8\)", {"shift": torch.ones(3, 8)}),
    (ValueError, r"scale must be .* got \(2, 9\)", {"scale": torch.ones(2, 9)}),
    (TypeError, "gate must be float32", {"gate": torch.ones(2, 8, dtype=torch.int64)}),
    (ValueError, r"weight must be \(C,\) = \(8,\)", {"weight": torch.ones(9)}),
    (TypeError, "bias must be a torch.Tensor, got int", {"bias": 3}),
    (ValueError, "eps must be finite and not negative", {"eps": -1.0}),
    (ValueError, "norm must be one of layer, rms, got 'group'", {"norm": "group"}),
    (ValueError, "gate_activation must be one of linear, tanh", {"gate_activation": "relu"}),
    (ValueError, "all tensors must be on one device", {"scale": torch.ones(2, 8, device="meta")}),
]


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED, ids=lambda v: str(v)[:30])
def test_refusals(error, message, changed):
    given = {name: torch.ones(2, 8) for name in ("gate", "shift", "scale")}
    given |= {"x": torch.ones(2, 6, 8), "y": torch.ones(2, 6, 8)}
    with pytest.raises(error, match=message):
        mmfast.gated_residual_modulate(**(given | changed))
