"""sampler_step beyond its samples: any table, aliasing, strides, what is not read, refusals."""

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
from mmfast.ops import sampler_step
from mmfast.schedule.layout import HISTORY, Layout, M, N, P, X
from mmfast.schedule.table import Linear, SamplerTable, TableBuilder

BACKENDS = backends_here(sampler_step.OP)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
x_, m_, n_, p_ = (Linear({place: 1.0}) for place in (X, M, N, P))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on this backend."""
    with mmfast.use_backend(request.param):
        yield request.param


def multistep(steps: int = 6) -> SamplerTable:
    """Second order, two slots."""
    table = TableBuilder(ring=2)
    for i in range(steps):
        next = (0.9 - i / 20) * x_ + 0.3 * p_
        if table.pushed:
            next = next - (0.1 + i / 30) * table.last(1)
        table.row(i, denoised=1.2 * x_ - 0.3 * m_, next=next, push=p_)
    return table.build()


def stochastic(steps: int = 4) -> SamplerTable:
    """Noise, of which the last row takes none."""
    table = TableBuilder()
    for i in range(steps):
        noise = (0.5 + i / 7) * n_ if i < steps - 1 else Linear({})
        table.row(i, denoised=1.2 * x_ - 0.3 * m_, clip=2.0, next=0.4 * x_ + 0.5 * p_ + noise)
    return table.build()


def one_row(**row) -> SamplerTable:
    """A table of a single row."""
    table = TableBuilder(ring=row.pop("ring", 0))
    table.row(0.0, **row)
    return table.build()


def inputs(*shape: int, dtype: torch.dtype = torch.float32, number: int = 2, device="cpu"):
    """So many tensors of random numbers."""
    return [normal(*shape, seed=seed).to(device, dtype) for seed in range(number)]


@st.composite
def problems(draw):
    """Arguments of the op: any table, any of its tensors, any dtypes."""
    slots = draw(st.integers(0, 4))
    layout = Layout(slots)
    rows = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    table = some(rows, layout.columns)
    table[torch.rand(table.shape, generator=generator) < draw(st.sampled_from([0.2, 0.6, 0.9]))] = 0
    unclamped = draw(st.booleans())
    limits = some(rows, 2).sort(1).values
    table[:, Layout.LOW] = -math.inf if unclamped else limits[:, 0]
    table[:, Layout.HIGH] = math.inf if unclamped else limits[:, 1]
    for s in range(slots):
        if draw(st.booleans()):
            row = draw(st.integers(0, rows - 1))
            unit = torch.eye(layout.sources, dtype=torch.float64)[HISTORY + s]
            table[row, layout.slot(s) : layout.slot(s) + layout.sources] = unit
    batch = draw(st.integers(1, 3))
    shape = (batch, *draw(st.sampled_from([(), (5,), (64,), (3, 43), (2, 3, 97)])))
    dtypes = st.sampled_from(DTYPES)

    def tensor(*size: int) -> torch.Tensor:
        return some(*size).to(draw(dtypes))

    def maybe(*size: int) -> torch.Tensor | None:
        return tensor(*size) if draw(st.booleans()) else None

    step = torch.randint(rows, (batch,) if draw(st.booleans()) else (), generator=generator)
    unconditional = maybe(*shape)
    guidance = maybe(draw(st.sampled_from([1, batch])), 2) if unconditional is not None else None
    drawn = draw(st.booleans())
    threshold = maybe(batch)
    copies = draw(st.sampled_from([1, 2]))
    return (
        tensor(*shape),
        tensor(*shape),
        unconditional,
        draw(st.sampled_from([1.0, 0.0, 7.5])),
        guidance,
        table,
        step,
        None if drawn else tensor(*shape),
        torch.tensor(seed) if drawn else None,
        tensor(*shape),
        None if threshold is None else 0.5 + threshold.abs(),
        tensor(*shape),
        tensor(slots, *shape) if slots else None,
        maybe(*shape),
        maybe(copies * batch, *shape[1:]),
    )


@settings(max_examples=10 if backends.interpreting() else 60)
@given(problem=problems())
def test_any_table(problem):
    expected = sampler_step.OP.result(sampler_step.OP.reference, problem)
    for name in BACKENDS:
        arguments = [a.to(device_of(name)) if isinstance(a, torch.Tensor) else a for a in problem]
        run = backends.select(sampler_step.OP, name, *arguments)
        result = sampler_step.OP.result(run, arguments)
        assert sampler_step.OP.compare(result, arguments, expected) == [], name


def test_samples_at_their_own_steps(backend):
    device = device_of(backend)
    table, stepping = multistep().to(device), torch.tensor([3, 0, 5], device=device)
    x, m = inputs(3, 4, 35, device=device)
    history = normal(2, 3, 140, seed=7).view(2, 3, 4, 35).to(device)
    kept = history.clone()
    got = mmfast.sampler_step(x, m, table, stepping, history=history)
    for b, step in enumerate(stepping.tolist()):
        own = kept[:, b : b + 1].clone()
        alone = mmfast.sampler_step(x[b : b + 1], m[b : b + 1], table, step, history=own)
        assert_same_bits([got[b : b + 1], history[:, b : b + 1]], [alone, own])


@pytest.mark.parametrize("shape", [(5, 33), (3, 4), (3, 21000)], ids=str)
def test_noise_of_a_sample_does_not_depend_on_the_batch(backend, shape):
    if backend == "triton" and math.prod(shape) > 1000:
        pytest.skip("the interpreter takes seconds")
    device = device_of(backend)
    table, (x, m) = stochastic().to(device), inputs(*shape, device=device)
    seeds = torch.arange(shape[0], device=device) * 12345678901 - 7
    steps = torch.arange(shape[0], device=device) % 3
    together = mmfast.sampler_step(x, m, table, steps, seed=seeds)
    for b in range(shape[0]):
        one = slice(b, b + 1)
        alone = mmfast.sampler_step(x[one], m[one], table, steps[one], seed=seeds[one])
        assert_same_bits([together[one]], [alone])
    assert len({float(t[0]) for t in together - 0.4 * x}) == shape[0]


@pytest.mark.parametrize("numbers", [64, 33])
def test_one_seed_is_one_stream(backend, numbers):
    """As randn with an int seed, row number for offset."""
    device = device_of(backend)
    rows = torch.cat([one_row(next=n_).coefficients] * 3).to(device)
    x, m = inputs(3, numbers, device=device)
    for seed in (11, torch.tensor([5, -7, 1 << 40], device=device)):
        got = mmfast.sampler_step(x, m, rows, 2, seed=seed)
        expected = mmfast.randn((3, numbers), seed=seed, offset=2, device=device)
        assert_same_bits([got], [expected])


def test_out_may_be_x(backend):
    device = device_of(backend)
    for dtype in DTYPES:
        x, m, h0, h1 = inputs(2, 3, 55, dtype=dtype, number=4, device=device)
        history = torch.stack([h0, h1])
        expected = mmfast.sampler_step(x, m, multistep().to(device), 3, history=history.clone())
        assert expected is not x
        versions = x._version, history._version
        got = mmfast.sampler_step(x, m, multistep().to(device), 3, history=history, out=x)
        assert got is x
        assert x._version > versions[0]  # autograd is told
        assert history._version > versions[1]
        assert_same_bits([got], [expected])


@pytest.mark.parametrize("numbers", [1 << 19, 530_003])  # the second: of samples at any address
def test_large_samples_are_their_parts(backend, numbers):
    """Results of so many numbers go past the cache."""
    if backend == "triton":
        pytest.skip("only where it does not take long")
    x, m, u, h0, h1 = inputs(2, numbers, number=5)
    table = multistep()
    parts, part = [], numbers // 3 + 1
    for begin in range(0, numbers, part):
        at = slice(begin, begin + part)
        history = torch.stack([h0, h1])[:, :, at].contiguous()
        out = mmfast.sampler_step(
            x[:, at].contiguous(), m[:, at], table, 3, unconditional=u[:, at], history=history
        )
        parts.append(torch.cat([out[None], history]))
    for in_place in (False, True):
        history, given = torch.stack([h0, h1]), x.clone()
        out = given if in_place else torch.empty_like(x)
        denoised, doubled = torch.empty_like(x), torch.empty(4, numbers)
        mmfast.sampler_step(
            given, m, table, 3, unconditional=u, history=history, out=out, denoised=denoised,
            model_input=doubled,
        )  # fmt: skip
        whole = torch.cat([out[None], history])
        assert_same_bits([whole], [torch.cat(parts, -1)])
        scale = table.coefficients[3, Layout.INPUT_SCALE].float()
        assert_same_bits(doubled.chunk(2), [out * scale] * 2)
        assert denoised.isfinite().all()


def test_slots_that_move(backend):
    """Each slot gets what another held before, in a circle."""
    layout = Layout(3)
    table = torch.zeros(1, layout.columns, dtype=torch.float64)
    table[0, Layout.LOW], table[0, Layout.HIGH] = -math.inf, math.inf
    table[0, layout.NEXT + HISTORY] = 1
    for s in range(3):
        table[0, layout.slot(s) + HISTORY + (s + 1) % 3] = 1
    device = device_of(backend)
    x, m = inputs(2, 45, device=device)
    history = torch.stack(inputs(2, 45, number=3, device=device))
    before = history.clone()
    out = mmfast.sampler_step(x, m, table.to(device), 0, history=history, out=x)
    assert_same_bits([out, history], [before[0], before[[1, 2, 0]]])


def views(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors equal to t (B, C, H, W), laid out otherwise."""
    other = torch.full_like(t, math.nan)
    return {
        "half of a batch": torch.cat([other, t]).chunk(2)[1],
        "half of the channels": torch.cat([t, other], 1)[:, : t.shape[1]],
        "channels last": t.to(memory_format=torch.channels_last),
        "every other": torch.stack([t, other], -1)[..., 0],
        "expanded": t,
    }


@pytest.mark.parametrize("layout", views(torch.zeros(1, 1, 1, 1)))
def test_layouts(backend, layout):
    device = device_of(backend)
    x, m, u, noise, out, denoised = inputs(2, 3, 5, 7, number=6, device=device)
    if layout == "expanded":
        m = m[:1].expand(2, -1, -1, -1)
    table = stochastic().to(device)
    expected = mmfast.sampler_step(x, m, table, 1, unconditional=u, noise=noise)
    wide = torch.full((2, 6, 5, 7), math.nan, device=device)
    got = mmfast.sampler_step(
        views(x)[layout],
        views(m)[layout],
        table,
        1,
        unconditional=views(u)[layout],
        noise=views(noise)[layout],
        out=views(out)[layout],
        denoised=wide[:, 3:],
    )
    assert_same_bits([got], [expected])
    assert wide[:, :3].isnan().all()
    mmfast.sampler_step(x, m, table, 1, unconditional=u, noise=noise, denoised=denoised)
    assert_same_bits([wide[:, 3:]], [denoised])


def test_what_has_no_weight_is_not_read(backend):
    device = device_of(backend)
    nan = torch.full((2, 77), math.nan, device=device)
    history = torch.full((2, 2, 77), math.nan, device=device)
    x, m = inputs(2, 77, device=device)
    table = multistep().to(device)
    own = history.clone()
    out = mmfast.sampler_step(x, m, table, 0, history=own, unconditional=nan, guidance_scale=2)
    assert out.isnan().all()
    out = mmfast.sampler_step(x, m, table, 0, history=history, unconditional=nan)
    assert not out.isnan().any()
    assert not history[0].isnan().any()
    assert history[1].isnan().all()
    # Outside the interval of the guidance, and a model's output that nobody asks for.
    off = one_row(next=x_ + m_, guidance=0.0).to(device)
    out = mmfast.sampler_step(x, m, off, 0, unconditional=nan, guidance_scale=7.5)
    assert_same_bits([out], [x + m])
    last = stochastic().to(device)
    assert not mmfast.sampler_step(x, m, last, 3, noise=nan).isnan().any()
    assert_same_bits(
        [mmfast.sampler_step(x, nan, one_row(next=x_).to(device), 0, variance=nan)], [x]
    )


def test_nan_stays_nan(backend):
    device = device_of(backend)
    x, m = inputs(1, 70, device=device)
    x[0, [3, 66]] = math.nan
    x[0, 4] = math.inf
    out = mmfast.sampler_step(
        x, m, one_row(denoised=x_, clip=1.0, next=p_).to(device), 0,
        threshold=torch.full((1,), 2.0, device=device),
    )  # fmt: skip
    assert out.isnan().nonzero()[:, 1].tolist() == [3, 66]
    assert out[0, 4] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(backend, dtype):
    device = device_of(backend)
    tensors = inputs(2, 130, dtype=dtype, number=5, device=device)
    results = []
    for t in (dtype, torch.float32):
        x, m, u, *h = (a.to(t) for a in tensors)
        history = torch.stack(h)
        out = mmfast.sampler_step(
            x, m, multistep().to(device), 3, history=history, unconditional=u, guidance_scale=3.0
        )
        results.append([out.to(dtype), history.to(dtype)])
    assert_same_bits(*results)


def test_threads(threads):
    table = stochastic()
    x, m = inputs(3, 50_001)
    got = mmfast.sampler_step(x, m, table, 1, seed=3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert_same_bits([got], [mmfast.sampler_step(x, m, table, 1, seed=3)])
    torch.set_num_threads(before)


def test_dynamic_threshold(backend):
    device = device_of(backend)
    x, m = inputs(2, 40, device=device)
    x *= 3
    t = torch.tensor([1.5, 2.0], device=device)
    table = one_row(denoised=x_, next=p_).to(device)
    got = mmfast.sampler_step(x, m, table, 0, threshold=t)
    torch.testing.assert_close(got, x.clamp(-t[:, None], t[:, None]) / t[:, None])


def test_step_out_of_range():
    x, m = inputs(2, 5)
    for step in (-1, 4):
        with pytest.raises(IndexError, match=rf"from 0 to 3 for a table of 4, got {step}"):
            mmfast.sampler_step(x, m, stochastic(4), step, seed=0)
        for steps in (torch.tensor(step), torch.tensor([0, step])):
            for name in ("reference", "cpp"):
                if name in BACKENDS:
                    with (
                        mmfast.use_backend(name),
                        pytest.raises((IndexError, RuntimeError), match="a table of 4 rows, got"),
                    ):
                        mmfast.sampler_step(x, m, stochastic(4), steps, seed=0)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter or a GPU")
def test_step_out_of_range_is_nan_on_a_device():
    device = device_of("triton")
    x, m = inputs(3, 70, device=device)
    history = torch.zeros(2, 3, 70, device=device)
    steps = torch.tensor([-1, 2, 6], device=device)
    with mmfast.use_backend("triton"):
        out = mmfast.sampler_step(x, m, multistep(6).to(device), steps, history=history)
        assert out.isnan().all(1).tolist() == [True, False, True]
        assert history[0].isnan().all(1).tolist() == [True, False, True]
        out = mmfast.sampler_step(x, m, stochastic().to(device), 0)
        assert out.isnan().all()


def test_noise_is_missing():
    x, m = inputs(2, 5)
    scaled = one_row(next=n_, log_scale=(0.0, 0.5))
    for name in ("reference", "cpp"):
        if name not in BACKENDS:
            continue
        with mmfast.use_backend(name):
            with pytest.raises(RuntimeError, match="takes noise: give noise or seed"):
                mmfast.sampler_step(x, m, stochastic(), 1)
            with pytest.raises(RuntimeError, match="give variance"):
                mmfast.sampler_step(x, m, scaled, 0, noise=x)
            mmfast.sampler_step(x, m, stochastic(), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x must be"),
        ({"x": torch.ones(2, 5, dtype=torch.int32)}, "x must be float32, float16"),
        (
            {"model_output": torch.ones(2, 6)},
            r"model_output must have shape \(2, 5\), got \(2, 6\)",
        ),
        ({"unconditional": torch.ones(1, 5)}, r"unconditional must have shape \(2, 5\)"),
        ({"guidance": torch.ones(2, 2)}, "guidance without unconditional"),
        ({"unconditional": torch.ones(2, 5), "guidance": torch.ones(2)}, r"\(1, 2\) or \(B, 2\)"),
        ({"table": torch.ones(2, 13)}, "table must be float64, got float32"),
        ({"table": torch.ones(2, 14, dtype=torch.float64)}, "has 14 columns"),
        ({"table": torch.ones(0, 13, dtype=torch.float64)}, "at least one row"),
        ({"table": multistep()}, r"history must be \(2, 2, 5\) for this table, got None"),
        ({"table": multistep(), "history": torch.ones(1, 2, 5)}, r"history must have shape \(2, 2"),
        ({"step": torch.ones(3, dtype=torch.int64)}, r"step must be \(\) or \(B,\) = \(2,\)"),
        ({"step": torch.tensor(1.0)}, "step must be int64, got float32"),
        ({"noise": torch.ones(2, 5), "seed": 1}, "noise and seed"),
        ({"seed": torch.ones(3, dtype=torch.int64)}, r"seed must be \(\) or \(B,\)"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"threshold": torch.ones(3)}, r"threshold must have shape \(2,\)"),
        ({"out": torch.ones(5)}, r"out must have shape \(2, 5\)"),
        ({"denoised": torch.ones(5)}, r"denoised must have shape \(2, 5\)"),
        ({"model_input": torch.ones(6, 5)}, r"model_input must have shape \(2, 5\)"),
        ({"out": torch.ones(2, 5, device="meta")}, "on one device, got x on cpu, out on meta"),
        ({"step": 1.0}, "step must be an int, got float"),
        ({"out": torch.ones(5).expand(2, 5)}, "out is written and must not be an expanded tensor"),
        ({"denoised": torch.ones(2, 1).expand(2, 5)}, "denoised is written and must not be"),
        ({"noise": 3.0}, "noise must be a torch.Tensor, got float"),
    ],
    ids=str,
)
def test_refusals(change, message):
    x, m = inputs(2, 5)
    arguments = {"x": x, "model_output": m, "table": one_row(next=x_ + m_), "step": 0} | change
    with pytest.raises((TypeError, ValueError), match=message):
        mmfast.sampler_step(**arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_without_a_break(compiler):
    table = multistep()

    def loop(x, history):
        for i in range(3):
            x = mmfast.sampler_step(x, x * 0.5, table.coefficients, i, history=history)
        mmfast.sampler_step(x, x + 1, table.coefficients, torch.tensor(3), history=history, out=x)
        return x * 2

    compiled = torch.compile(loop, fullgraph=True, backend=compiler)
    x, *h = inputs(2, 35, number=3)
    history = torch.stack(h)
    own = history.clone()
    torch.testing.assert_close(compiled(x.clone(), own), loop(x.clone(), history))
    torch.testing.assert_close(own, history)


def test_a_counter_on_the_device_goes_on_by_itself(backend):
    device = device_of(backend)
    table, step = multistep().to(device), torch.zeros((), dtype=torch.int64, device=device)
    x, m, *h = inputs(2, 35, number=4, device=device)
    history = torch.stack(h)
    own, start = history.clone(), x.clone()
    for i in range(4):
        mmfast.sampler_step(x, m, table, step, history=history, out=x)
        mmfast.sampler_step(start, m, table, i, history=own, out=start)
        step += 1
    assert_same_bits([x, history], [start, own])


def test_gradients():
    """Of a clipped, guided step with noise and a history, in float64 against differences."""
    row = one_row(
        denoised=0.7 * x_ - 0.4 * m_ + 0.1 * n_,
        clip=0.8,
        next=0.5 * x_ + 0.3 * m_ + 0.2 * n_ + 0.6 * p_ - 0.1 * Linear({HISTORY: 1.0}),
        push=0.5 * p_ + 0.25 * m_,
        ring=1,
    )
    numbers = [t.double().requires_grad_() for t in inputs(2, 5, number=5)]

    def step(x, m, u, n, h):
        history, denoised = torch.stack([h]), torch.empty_like(x)
        model_input = torch.empty_like(x)
        out = mmfast.sampler_step(
            x, m, row, 0, unconditional=u, guidance_scale=1.5, noise=n, history=history,
            denoised=denoised, model_input=model_input,
        )  # fmt: skip
        return out, history, denoised, model_input

    assert torch.autograd.gradcheck(step, numbers)
    with torch.no_grad():
        want = step(*numbers)
    for got, expected in zip(step(*numbers), want, strict=True):
        assert got.requires_grad
        torch.testing.assert_close(got.detach(), expected)
    assert not any(t.requires_grad for t in want)


def test_gradients_into_the_tensor_that_is_stepped():
    x, m = inputs(2, 5)
    with pytest.raises(RuntimeError, match="in-place operation"):
        mmfast.sampler_step(x.requires_grad_(), m, one_row(next=x_ + m_), 0, out=x)


def test_gradients_of_thresholds():
    x, m = (t.double().requires_grad_() for t in inputs(2, 5))
    row = one_row(denoised=2 * x_ - m_, next=p_)

    def threshold(x, m):
        return mmfast.dynamic_threshold(x, m, row, 0, ratio=0.8, maximum=9.0)

    assert torch.autograd.gradcheck(threshold, (x, m))
