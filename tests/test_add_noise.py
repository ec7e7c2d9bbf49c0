"""add_noise: targets, gradients, streams of noise, layouts, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from cases import backends_here, device_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_determinism import assert_same_bits

import mmfast
from mmfast import backends
from mmfast.ops import add_noise
from mmfast.schedule import FlowSchedule, NoiseSchedule

BACKENDS = backends_here(add_noise.OP)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("schedule", [NoiseSchedule.from_betas("linear"), FlowSchedule()])
@pytest.mark.parametrize("target", add_noise.TARGETS)
def test_schedules(schedule, target):
    x0, noise = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    got = mmfast.add_noise(x0, torch.tensor([3, 700]), schedule, noise=noise, target=target)
    table = schedule.noising_table(target)
    assert schedule.noising_table(target) is table
    a, s, with_x0, with_noise, _ = table[[3, 700]].float().T[:, :, None, None]
    torch.testing.assert_close(got.noisy, a * x0 + s * noise)
    torch.testing.assert_close(got.target, with_x0 * x0 + with_noise * noise)


def rows(count: int = 7) -> torch.Tensor:
    """A table of random rows."""
    return normal(count, 5, seed=9, dtype=torch.float64)


class CosineSchedule:
    """Continuous angles, as a schedule would hand them over."""

    def noising_table(self, target, weighting=None):
        angle = torch.linspace(0, math.pi / 2, 10, dtype=torch.float64)
        alpha, sigma = angle.cos(), angle.sin()
        of = {
            "epsilon": (0 * alpha, 1 + 0 * alpha),
            "sample": (1 + 0 * alpha, 0 * alpha),
            "v_prediction": (-sigma, alpha),
            "flow_prediction": (-1 + 0 * alpha, 1 + 0 * alpha),
        }
        weight = 1 + 0 * alpha if weighting is None else angle
        return torch.stack([alpha, sigma, *of[target], weight], 1)


@pytest.mark.parametrize("target", add_noise.TARGETS)
def test_targets(backend, target):
    device = device_of(backend)
    x0, noise = (normal(3, 4, 21, seed=s).to(device) for s in range(2))
    timesteps = torch.tensor([0, 4, 9], device=device)
    got = mmfast.add_noise(
        x0, timesteps, CosineSchedule(), noise=noise, target=target, weighting="angle"
    )
    angle = torch.linspace(0, math.pi / 2, 10)[[0, 4, 9]].to(device)
    a, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    expected = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": a * noise - s * x0,
        "flow_prediction": noise - x0,
    }[target]
    torch.testing.assert_close(got.noisy, a * x0 + s * noise)
    torch.testing.assert_close(got.target, expected)
    torch.testing.assert_close(got.weight, angle)
    if target == "flow_prediction":
        short = mmfast.add_noise(x0, timesteps, CosineSchedule(), noise=noise, target="flow")
        assert torch.equal(short.target, got.target)
    alone = mmfast.add_noise(x0, timesteps, CosineSchedule(), noise=noise, target=None)
    assert alone.target is None
    assert_same_bits([alone.noisy], [got.noisy])
    assert alone.weight.tolist() == [1, 1, 1]


@st.composite
def problems(draw):
    """Arguments of the op."""
    batch = draw(st.integers(1, 3))
    shape = (batch, *draw(st.sampled_from([(), (5,), (64,), (3, 43), (2, 3, 97)])))
    number = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(number)

    def tensor(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(draw(st.sampled_from(DTYPES)))

    table = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    table[torch.rand(4, 5, generator=generator) < draw(st.sampled_from([0.1, 0.6]))] = 0
    timesteps = torch.randint(4, (batch,) if draw(st.booleans()) else (), generator=generator)
    given = (tensor(*shape), None, None)
    if draw(st.booleans()):
        seeds = torch.randint(9, (batch,) if draw(st.booleans()) else (), generator=generator)
        offsets = torch.randint(9, (batch,) if draw(st.booleans()) else (), generator=generator)
        given = (None, seeds, offsets)
    return tensor(*shape), timesteps, table, *given, draw(st.booleans())


@settings(max_examples=10 if backends.interpreting() else 40)
@given(problem=problems())
def test_any_problem(problem):
    for name in BACKENDS:
        arguments = [a.to(device_of(name)) if isinstance(a, torch.Tensor) else a for a in problem]
        result = backends.select(add_noise.OP, name, *arguments)(*arguments)
        assert add_noise.OP.compare(result, arguments) == [], name


def test_gradients(backend):
    device = device_of(backend)
    x0 = normal(2, 33).to(device).requires_grad_()
    noise, g, h = (normal(2, 33, seed=s).to(device) for s in range(1, 4))
    timesteps, table = torch.tensor([1, 5], device=device), rows().to(device)
    alpha, _, of_x0, _, _ = table[timesteps].float().unbind(1)

    def gradient(*, of_noisy: bool, of_target: bool) -> torch.Tensor:
        x0.grad = None
        made = mmfast.add_noise(x0, timesteps, table, noise=noise)
        assert not made.weight.requires_grad
        loss = (made.noisy * g).sum() if of_noisy else 0
        (loss + ((made.target * h).sum() if of_target else 0)).backward()
        return x0.grad

    both = alpha[:, None] * g + of_x0[:, None] * h
    torch.testing.assert_close(gradient(of_noisy=True, of_target=True), both)
    torch.testing.assert_close(gradient(of_noisy=True, of_target=False), alpha[:, None] * g)
    torch.testing.assert_close(gradient(of_noisy=False, of_target=True), of_x0[:, None] * h)
    made = mmfast.add_noise(x0, timesteps, table, noise=noise, target=None)
    x0.grad = None
    (made.noisy * g).sum().backward()
    torch.testing.assert_close(x0.grad, alpha[:, None] * g)


@pytest.mark.parametrize("shape", [(5, 33), (3, 4), (3, 21000)], ids=str)
def test_noise_of_a_sample_does_not_depend_on_the_batch(backend, shape):
    if backend == "triton" and math.prod(shape) > 1000:
        pytest.skip("the interpreter takes seconds")
    device = device_of(backend)
    x0, table = normal(*shape).to(device), rows().to(device)
    seeds = torch.arange(shape[0], device=device) * 12345678901 - 7
    times = torch.arange(shape[0], device=device)
    together = mmfast.add_noise(x0, times, table, seed=seeds, offset=3)
    for b in range(shape[0]):
        one = slice(b, b + 1)
        alone = mmfast.add_noise(x0[one], times[one], table, seed=seeds[one], offset=3)
        assert_same_bits([t[one] for t in together], alone)


@pytest.mark.parametrize("numbers", [64, 33])
def test_one_seed_is_one_stream(backend, numbers):
    device = device_of(backend)
    table = torch.tensor([[0.0, 1, 0, 1, 1]], dtype=torch.float64, device=device)
    x0, times = torch.full((3, numbers), math.nan, device=device), torch.tensor(0, device=device)
    made = mmfast.add_noise(x0, times, table, seed=11, offset=4)
    expected = mmfast.randn((3, numbers), seed=11, offset=4, device=device)
    assert_same_bits([made.noisy], [expected])
    assert_same_bits([made.noisy], [made.target])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(backend, dtype):
    device = device_of(backend)
    x0, noise = (normal(2, 130, seed=s, dtype=dtype).to(device) for s in range(2))
    times, table = torch.tensor(3, device=device), rows().to(device)
    half = mmfast.add_noise(x0, times, table, noise=noise)
    wide = mmfast.add_noise(x0.float(), times, table, noise=noise.float())
    assert_same_bits([half.noisy, half.target], [t.to(dtype) for t in wide[:2]])
    assert_same_bits([half.weight], [wide.weight])


def test_layouts(backend):
    device = device_of(backend)
    x0, noise = (normal(2, 3, 5, 7, seed=s).to(device) for s in range(2))
    times, table = torch.tensor([3, 2], device=device), rows().to(device)
    expected = mmfast.add_noise(x0, times, table, noise=noise)
    views = [
        torch.cat([noise, x0], 1)[:, 3:],
        x0.to(memory_format=torch.channels_last),
        torch.stack([x0, noise], -1)[..., 0],
    ]
    for view in views:
        twice = torch.stack([times, times + 1], 1)[:, 0]
        assert_same_bits(mmfast.add_noise(view, twice, table, noise=noise), expected)


def test_timestep_out_of_range():
    x0 = normal(2, 5)
    for times in (torch.tensor(7), torch.tensor([0, -1])):
        for name in set(BACKENDS) - {"triton"}:
            with (
                mmfast.use_backend(name),
                pytest.raises(
                    (IndexError, RuntimeError), match="from 0 to 6 for a table of 7 rows"
                ),
            ):
                mmfast.add_noise(x0, times, rows(), seed=0)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter or a GPU")
def test_timestep_out_of_range_is_nan_on_a_device():
    device = device_of("triton")
    times = torch.tensor([-1, 2, 7], device=device)
    with mmfast.use_backend("triton"):
        made = mmfast.add_noise(normal(3, 5).to(device), times, rows().to(device), seed=0)
    for t in made:
        assert t.view(3, -1).isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.ones(2, 5, dtype=torch.int32)}, "x0 must be float32"),
        ({"x0": torch.tensor(1.0)}, "x0 must be"),
        ({"timesteps": torch.ones(2)}, "timesteps must be int64, got float32"),
        ({"timesteps": torch.ones(3, dtype=torch.int64)}, r"timesteps must be \(\) or \(B,\)"),
        ({"schedule": torch.ones(7, 5)}, "table must be float64"),
        ({"schedule": torch.ones(7, 4, dtype=torch.float64)}, r"must be \(T, 5\)"),
        ({"noise": None}, "one of noise and seed"),
        ({"seed": 1}, "one of noise and seed"),
        ({"noise": torch.ones(5)}, r"noise must have shape \(2, 5\), got \(5,\)"),
        ({"noise": torch.ones(2, 5, device="meta")}, "on one device"),
        ({"noise": None, "seed": 1, "offset": torch.ones(3, dtype=torch.int64)}, "offset must be"),
        ({"target": "noise"}, "target must be one of epsilon, sample, v_prediction, flow"),
    ],
    ids=str,
)
def test_refusals(change, message):
    x0, noise = normal(2, 5), normal(2, 5, seed=1)
    arguments = {"x0": x0, "timesteps": torch.tensor(1), "schedule": rows(), "noise": noise}
    with pytest.raises((TypeError, ValueError), match=message):
        mmfast.add_noise(**arguments | change)


def test_compile_without_a_break():
    table = rows()

    def train(x0, times):
        made = mmfast.add_noise(x0, times, table, seed=3, offset=times)
        return ((made.noisy - made.target) * made.weight[:, None]).sum()

    def gradient(run):
        x0 = normal(2, 35).requires_grad_()
        run(x0, torch.tensor([1, 4])).backward()
        return x0.grad

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(train))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_from_within_vmap():
    """Inside it the samples do not say that they require a gradient."""
    x = torch.randn(3, 4, 2, requires_grad=True)
    rows = torch.rand(9, 5, dtype=torch.float64)
    timesteps, noise = torch.randint(9, (4,)), torch.randn(4, 2)
    torch.func.vmap(
        lambda part: mmfast.add_noise(part, timesteps, rows, noise=noise, target=None).noisy
    )(x).sum().backward()
    wanted = rows[timesteps, 0].float()[None, :, None].expand(3, 4, 2)
    assert torch.allclose(x.grad, wanted)
