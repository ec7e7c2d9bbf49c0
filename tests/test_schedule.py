"""Schedules, grids, weights, and the loop that samples."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling import START, run
from torch import Tensor

import mmfast
import mmfast.schedule as S
from mmfast.schedule import weights
from mmfast.schedule.betas import BETAS, make_betas
from mmfast.schedule.predictions import PREDICTIONS, denoised_from, noise_from, target_of
from mmfast.schedule.sigmas import make_sigmas, shift, stretch_to_terminal

VP = S.NoiseSchedule.from_betas()

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


# Schedules against diffusers.


@pytest.mark.parametrize("name", BETAS)
def test_betas(name):
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    theirs = {"squared_cosine": "squaredcos_cap_v2", "exponential": "exp"}.get(name, name)
    module, cls = ("ddpm", "DDPMScheduler")
    if name == "exponential":
        module, cls = ("heun_discrete", "HeunDiscreteScheduler")
    made = other.scheduler(module, cls, beta_start=1e-3, beta_end=0.03, beta_schedule=theirs)
    torch.testing.assert_close(make_betas(name, 1000, 1e-3, 0.03), made.betas, rtol=1e-12, atol=0)


def test_zero_terminal_snr():
    plain, zero = VP, S.NoiseSchedule.from_betas(zero_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    assert float(zero.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-12)
    assert S.NoiseSchedule.from_betas(zero_snr=True, floor=2**-24).alphas_cumprod[-1] == 2**-24


@pytest.mark.parametrize("spacing", S.spacings.SPACINGS)
@pytest.mark.parametrize("skip_last", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 20, 999])
def test_spacings(spacing, skip_last, steps):
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    module, cls = ("ddpm", "DDPMScheduler")
    if skip_last:
        module, cls = ("dpmsolver_multistep", "DPMSolverMultistepScheduler")
    made = other.scheduler(module, cls, timestep_spacing=spacing)
    made.set_timesteps(steps)
    ours = VP.grid(steps, spacing=spacing, skip_last=skip_last).timesteps
    # A trailing spacing by additions of a rounded stride may end in one point too many.
    assert ours.tolist() == made.timesteps.tolist()[:steps]


@pytest.mark.parametrize("spacing", S.spacings.SPACINGS)
def test_least_lambda(spacing):
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    made = other.scheduler(
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        lambda_min_clipped=-5.1,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing=spacing,
    )
    made.set_timesteps(10)
    schedule = S.NoiseSchedule.from_betas("squared_cosine")
    grid = schedule.grid(10, spacing=spacing, skip_last=True, least_lambda=-5.1)
    assert grid.timesteps.tolist() == made.timesteps.tolist()


def test_lu_levels():
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    made = other.scheduler(
        "dpmsolver_multistep", "DPMSolverMultistepScheduler", use_lu_lambdas=True
    )
    made.set_timesteps(10)
    grid = VP.grid(10, skip_last=True, sigmas="lu")
    torch.testing.assert_close(grid.sigma / grid.alpha, made.sigmas, rtol=1e-10, atol=0)


# Points of schedules.


@given(st.floats(0, 999))
def test_points_keep_the_variance(timestep):
    alpha, sigma = VP.at(timestep)
    assert alpha**2 + sigma**2 == pytest.approx(1, rel=1e-12)
    assert math.floor(timestep) <= VP.timestep_of(sigma / alpha) + 1e-9
    assert VP.timestep_of(sigma / alpha) - 1e-9 <= math.ceil(timestep)


@pytest.mark.parametrize("schedule", [VP, S.FlowSchedule(), S.EDMSchedule()])
def test_grids_are_points_of_their_schedules(schedule):
    grid = schedule.grid(12, sigmas="karras")
    ratio = (grid.sigma / grid.alpha)[:-1]
    assert bool((ratio[1:] < ratio[:-1]).all())
    for i in range(12):
        assert schedule.timestep_of(float(ratio[i])) == pytest.approx(grid.timestep(i), abs=1e-9)
    assert grid.point(12) == (1.0, 0.0)
    later = schedule.grid(12, sigmas="karras", start=5)
    assert (len(later), later.total_steps) == (7, 12)
    assert torch.equal(later.timesteps, grid.timesteps[5:])
    assert torch.equal(later.sigma, grid.sigma[5:])


def test_final_points():
    lowest = float(VP.ratio[0])
    for final, expected in [("zero", 0.0), ("sigma_min", lowest), (0.125, 0.125)]:
        alpha, sigma = VP.grid(5, final=final).point(5)
        assert sigma / alpha == pytest.approx(expected, rel=1e-12)
    grid = VP.grid(5, final="last", spacing="leading", offset=3)
    assert grid.point(5) == grid.point(4)


# Noise levels.


def test_beta_quantiles():
    scipy = pytest.importorskip("scipy.stats")
    q = torch.linspace(0, 1, 33, dtype=torch.float64)
    for a, b in ((0.6, 0.6), (2.0, 0.7), (1.0, 1.0), (5.0, 3.0)):
        ours = S.sigmas.beta(33, 0.0, 1.0, a, b).flip(0)
        torch.testing.assert_close(
            ours, torch.from_numpy(scipy.beta.ppf(q.numpy(), a, b)), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", S.sigmas.SIGMAS)
def test_levels_run_between_their_ends(name):
    levels = make_sigmas(name, 9, 0.03, 14.6)
    assert bool((levels[1:] < levels[:-1]).all())
    assert [float(levels[0]), float(levels[-1])] == pytest.approx([14.6, 0.03], rel=1e-9)


def test_shifts():
    levels = torch.linspace(1, 0.1, 5, dtype=torch.float64)
    # exp(mu) / (exp(mu) + 1 / t - 1), as Flux writes it.
    expected = math.exp(0.7) / (math.exp(0.7) + 1 / levels - 1)
    torch.testing.assert_close(shift(levels, math.exp(0.7)), expected, rtol=1e-12, atol=0)
    stretched = stretch_to_terminal(levels, 0.02)
    assert [float(stretched[0]), float(stretched[-1])] == pytest.approx([1, 0.02])
    assert S.dynamic_mu(256) == 0.5
    assert S.dynamic_mu(4096) == pytest.approx(1.15)


# Predictions.


@given(st.sampled_from(PREDICTIONS), st.floats(0.01, 3), st.floats(0.01, 50))
def test_predictions_invert_their_targets(kind, alpha, sigma):
    clean, noise = 0.7, -1.3
    x = alpha * clean + sigma * noise
    t_x, t_n = target_of(kind, alpha, sigma, 0.5)
    output = t_x * clean + t_n * noise
    a, b = denoised_from(kind, alpha, sigma, 0.5)
    c, d = noise_from(kind, alpha, sigma, 0.5)
    condition = 1e-9 * (1 + sigma / alpha) * (1 + alpha / sigma)
    assert a * x + b * output == pytest.approx(clean, abs=condition)
    assert c * x + d * output == pytest.approx(noise, abs=condition)


# Training.


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
def test_noising_tables(target):
    table = VP.noising_table(target, weights.min_snr)
    assert table.shape == (1000, 5)
    assert table.dtype == torch.float64
    snr = VP.alphas_cumprod / (1 - VP.alphas_cumprod)
    clipped = snr.clamp(max=5)
    expected = {"epsilon": clipped / snr, "sample": clipped, "v_prediction": clipped / (snr + 1)}
    torch.testing.assert_close(table[:, 4], expected[target], rtol=1e-10, atol=0)
    torch.testing.assert_close(table[:, 0] ** 2 + table[:, 1] ** 2, torch.ones(1000).double())
    assert torch.equal(VP.noising_table(target)[:, 4], torch.ones(1000).double())
    if target == "v_prediction":
        assert torch.equal(table[:, 2:4], torch.stack([-VP.sigma, VP.alpha], 1))


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
def test_noising_tables_are_what_add_noise_takes(target):
    x0, noise = START, START.flip(0)
    timesteps = torch.tensor([3, 700])
    made = mmfast.add_noise(x0, timesteps, VP, noise=noise, target=target, weighting="min_snr")
    alpha, sigma = (v[timesteps][:, None] for v in (VP.alpha, VP.sigma))
    expected = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
    torch.testing.assert_close(made.noisy, alpha * x0 + sigma * noise, rtol=1e-12, atol=0)
    torch.testing.assert_close(made.target, expected[target], rtol=1e-12, atol=1e-15)
    weight = VP.noising_table(target, weights.min_snr)[timesteps, 4]
    torch.testing.assert_close(made.weight, weight, rtol=1e-12, atol=0)


def test_noising_tables_of_flows_and_edm():
    flow = S.FlowSchedule(1000, 3.0).noising_table()
    torch.testing.assert_close(flow[:, 0] + flow[:, 1], torch.ones(1000).double())
    assert flow[0, 2:4].tolist() == [-1.0, 1.0]
    assert flow[-1, 1] == 1
    levels = torch.tensor([0.01, 0.5, 80.0], dtype=torch.float64)
    edm = S.EDMSchedule().noising_table(weighting=lambda snr: weights.edm(snr**-0.5), levels=levels)
    torch.testing.assert_close(edm[:, 4], torch.ones(3).double())  # that is what EDM's weight is
    # For data of standard deviation sigma_data, inputs and targets have variance 1.
    torch.testing.assert_close(edm[:, 0] ** 2 / 4 + edm[:, 1] ** 2, torch.ones(3).double())
    torch.testing.assert_close(edm[:, 2] ** 2 / 4 + edm[:, 3] ** 2, torch.ones(3).double())


def test_weights_of_the_signal_to_noise_ratio():
    snr = torch.tensor([0.1, 4.0, 1e6], dtype=torch.float64)
    assert weights.min_snr(snr).tolist() == [0.1, 4.0, 5.0]
    assert weights.max_snr(snr).tolist() == [1.0, 4.0, 1e6]
    torch.testing.assert_close(weights.soft_min_snr(snr), 1 / (1 / snr + 1 / 4))


@pytest.mark.parametrize(
    "density",
    [
        lambda t: weights.logit_normal_density(t, 0.3, 0.8),
        weights.mode_density,
        lambda t: weights.mode_density(t, -0.5),
        weights.cosmap_density,
    ],
    ids=["logit-normal", "mode", "negative mode", "cosmap"],
)
def test_densities(density):
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    values = density(t)
    assert bool((values > 0).all())
    assert float(torch.trapezoid(values, t)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["logit_normal", "mode"])
def test_quantiles_have_their_densities(name):
    u = torch.linspace(0.05, 0.95, 91, dtype=torch.float64)
    quantile, density = getattr(weights, f"{name}_quantile"), getattr(weights, f"{name}_density")
    step = 1e-6
    slope = (quantile(u + step) - quantile(u - step)) / (2 * step)
    torch.testing.assert_close(density(quantile(u)), 1 / slope.abs(), rtol=1e-6, atol=0)


# The loop.


def model(x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
    assert t.shape == x.shape[:1]
    return torch.tanh(x) * 0.9 + (0 if shift is None else shift[:, None])


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "pndm"])
def test_sample_is_the_loop(name):
    table = getattr(S, name)(VP.grid(8, spacing="leading"))
    seen = []
    result = S.sample(
        lambda x, t: (model(x, t),),
        START,
        table,
        callback=lambda i, x, denoised: seen.append((i, x.clone(), denoised.clone())),
        progress=False,
    )
    expected = run(table, lambda x, t: torch.tanh(x) * 0.9, START * table.initial_scale)
    for (i, x, denoised), y in zip(seen, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        assert denoised.isfinite().all()
        assert i < len(table)
    assert torch.equal(result, seen[-1][1])


def test_sample_keeps_float32_for_half_precision():
    table = S.ddim(VP.grid(8))
    x = START.bfloat16()
    dtypes = []

    def told(x: Tensor, t: Tensor) -> Tensor:
        dtypes.append((x.dtype, t.dtype))
        return model(x, t)

    half = S.sample(told, x, table, progress=False)
    assert half.dtype == torch.bfloat16
    assert set(dtypes) == {(torch.bfloat16, torch.int64)}
    full = S.sample(model, x, table, progress=False, dtype=torch.float32)
    exact = S.sample(model, x.double(), table, progress=False)
    torch.testing.assert_close(full.double(), exact, rtol=2**-8, atol=0)
    S.sample(told, x, S.euler(VP.grid(7, rounded=False)), progress=False)
    assert dtypes[-1] == (torch.bfloat16, torch.float32)


def test_sample_guides():
    table = S.dpm_solver(VP.grid(8))
    shift = torch.tensor([0.0, 0.0, 0.1, 0.2], dtype=torch.float64)

    def mixed(scale: Tensor) -> Tensor:
        def guided(x: Tensor, t: Tensor) -> Tensor:
            plain, wanted = model(x, t, shift[:2]), model(x, t, shift[2:])
            return plain + scale * (wanted - plain)

        return S.sample(guided, START, table, progress=False)

    def guided(scale: float | Tensor, table: S.SamplerTable = table) -> Tensor:
        kwargs = {"shift": shift}
        return S.sample(
            model, START, table, model_kwargs=kwargs, guidance_scale=scale, progress=False
        )

    torch.testing.assert_close(guided(4.0), mixed(torch.tensor(4.0)), rtol=1e-5, atol=1e-6)
    scales = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(guided(scales), mixed(scales[:, None]), rtol=1e-5, atol=1e-6)
    nowhere = guided(4.0, table.guided_between(2000, 3000))
    torch.testing.assert_close(nowhere, mixed(torch.tensor(1.0)), rtol=1e-6, atol=1e-7)
    assert torch.equal(guided(4.0, table.guided_between(0, 999)), guided(4.0))


def test_sample_starts_from_an_image():
    grid = VP.grid(10, skip_last=True, start=6)
    image = torch.full_like(START, 0.25)
    for make in (S.dpm_solver, S.euler):
        table = make(grid)
        alpha, sigma = table.start
        result = S.sample(model, START, table, image=image, progress=False)
        begun = alpha * image + sigma * START
        expected = run(table, lambda x, t: torch.tanh(x) * 0.9, begun)[-1]
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert S.dpm_solver(grid).start == grid.point(0)


def test_sample_draws_noise_by_seed():
    table = S.ddpm(VP.grid(6))
    once = [S.sample(model, START, table, seed=s, progress=False) for s in (1, 1, 2)]
    assert torch.equal(once[0], once[1])
    assert not torch.equal(once[0], once[2])
    # With a seed each, a sample does not depend on its batch.
    seeds = torch.tensor([5, 6])
    both = S.sample(model, START, table, seed=seeds, progress=False)
    alone = S.sample(model, START[1:], table, seed=seeds[1:], progress=False)
    assert torch.equal(both[1:], alone)
    torch.manual_seed(3)
    first = S.sample(model, START, table, progress=False)
    second = S.sample(model, START, table, progress=False)
    torch.manual_seed(3)
    assert torch.equal(S.sample(model, START, table, progress=False), first)
    assert not torch.equal(first, second)


def test_sample_takes_learned_variances():
    table = S.ddpm(VP.grid(6), variance="learned_range")
    results = []
    for level in (-1.0, 1.0):

        def both(x: Tensor, t: Tensor, level: float = level) -> Tensor:
            return torch.cat([model(x, t), torch.full_like(x, level)], 1)

        results.append(S.sample(both, START, table, seed=1, progress=False))
    small, large = (
        S.sample(model, START, S.ddpm(VP.grid(6), variance=v), seed=1, progress=False)
        for v in ("fixed_small", "fixed_large")
    )
    torch.testing.assert_close(results[0], small, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[1], large, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "unipc", "deis"])
def test_sample_thresholds(name):
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    module, cls = {
        "ddim": ("ddim", "DDIMScheduler"),
        "dpm_solver": ("dpmsolver_multistep", "DPMSolverMultistepScheduler"),
        "unipc": ("unipc_multistep", "UniPCMultistepScheduler"),
        "deis": ("deis_multistep", "DEISMultistepScheduler"),
    }[name]
    final = "sigma_min" if name == "deis" else "zero"
    config = {"final_sigmas_type": final} if name in ("dpm_solver", "unipc") else {}
    made = other.scheduler(
        module,
        cls,
        thresholding=True,
        dynamic_thresholding_ratio=0.8,
        sample_max_value=1.5,
        timestep_spacing="leading",
        **config,
    )
    made.set_timesteps(8)
    x = START.view(2, 2, 3)  # with channels, as diffusers wants it
    guided = torch.tensor([2.0, 3.0]).double().view(2, 1, 1)

    def told(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(x[:2], t[:2]) * 0.5, model(x[2:], t[2:])])

    def mixed(x: Tensor, t: float) -> Tensor:
        wanted = model(x, torch.full((2,), t))
        return guided * wanted + (1 - guided) * 0.5 * wanted

    theirs = other.loop(module, made, mixed, x, x[None])[-1]
    grid = VP.grid(8, spacing="leading", skip_last=name != "ddim", final=final)
    clip = math.inf if name == "deis" else None
    ours = S.sample(
        told,
        x,
        getattr(S, name)(grid, clip=clip),
        guidance_scale=guided.flatten(),
        dynamic_threshold=(0.8, 1.5),
        progress=False,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_loops_take_another_table():
    first, second = (S.dpm_solver(VP.grid(6), solver_type=s) for s in ("midpoint", "heun"))
    loop = S.SampleLoop(model, START, first)
    for table in (first, second, first):
        loop.set_table(table)
        expected = S.sample(model, START, table, progress=False)
        assert torch.equal(loop.run(START), expected)
    with pytest.raises(ValueError, match=r"the table must be \(6, 19\) as the one before, got"):
        loop.set_table(S.dpm_solver(VP.grid(7)))
    with pytest.raises(ValueError, match="the table must be without noise as the one before"):
        loop.set_table(S.dpm_solver(VP.grid(6), algorithm="sde-dpmsolver++"))
    with pytest.raises(ValueError, match="a callback needs keep_denoised=True"):
        loop.run(START, callback=lambda i, x, denoised: None)
    with pytest.raises(ValueError, match="whole timesteps as the one before"):
        loop.set_table(S.dpm_solver(VP.grid(6, rounded=False)))


def test_sample_shows_a_bar(capsys):
    S.sample(model, START, S.ddim(VP.grid(3)))
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    assert captured.out == ""


def test_nothing_is_tracked():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    result = S.sample(lambda x, t: x * weight, START, S.ddim(VP.grid(3)), progress=False)
    assert not result.requires_grad


def test_the_guide_runs():
    guide = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    own = names["table"].coefficients
    ours = S.ipndm(names["schedule"].grid(20), order=2).coefficients
    torch.testing.assert_close(own, ours, rtol=1e-12, atol=1e-12)
    assert names["images"].shape == (4, 3, 8, 8)
    for name in S.samplers.__all__:
        assert f"| `{name}` |" in guide


# The builder.


def test_the_guide_tells_the_slots():
    guide = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", guide, re.MULTILINE)
    told = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    for name in S.samplers.__all__:
        schedule = S.FlowSchedule() if "flow" in name else S.EDMSchedule() if "edm" in name else VP
        table = getattr(S, name)(schedule.grid(8))
        _, _, calls, slots, noise = told[name]
        assert len(table) == eval(calls.split(",")[0].replace("2 S", "2 * S"), {"S": 8})
        order = 4 if name in ("lms", "ipndm") else 2
        if name == "sa_solver":
            assert table.slots == 2
        else:
            assert table.slots == eval(slots.split(",")[0], {"order": order})
        assert table.stochastic == (noise == "yes" or name in ("sa_solver", "tcd"))


def test_linear_maps():
    from mmfast.schedule.table import denoised, x

    both = 2 * x - denoised / 4 + x
    assert both.weights == {0: 3.0, 3: -0.25}
    assert repr(both) == "Linear(+3 x -0.25 p)"
    assert (-both).weights == {0: -3.0, 3: 0.25}


def test_the_builder_remembers():
    from mmfast.schedule.table import denoised, x

    builder = S.TableBuilder(ring=2)
    with pytest.raises(ValueError, match=r"last\(1\): 0 values were pushed, 2 are remembered"):
        builder.last(1)
    for value in (1.0, 2.0, 3.0):
        builder.row(0, next=x, push=value * x)
    builder.row(0, next=builder.last(1) + 10 * builder.last(2), denoised=x)
    last = run(builder.build(), lambda x, t: x)[-1]
    torch.testing.assert_close(last, 23 * START, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"last\(3\): 3 values were pushed, 2 are remembered"):
        builder.last(3)
    with pytest.raises(ValueError, match="row 4 has a coefficient inf"):
        builder.row(0, next=math.inf * x)
    with pytest.raises(ValueError, match="denoised may hold x, the model's output and noise"):
        builder.row(0, next=x, denoised=denoised)


# Refusals.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_betas("cosine", 10), "betas must be one of linear, scaled_linear"),
        (lambda: make_betas("linear", 0), "num_steps must be at least 1, got 0"),
        (lambda: make_sigmas("edm", 5, 0.1, 1), "sigmas must be one of karras, exponential"),
        (lambda: make_sigmas("karras", 5, 0.0, 1), "0 < low <= high < infinity, got 0.0 to 1"),
        (lambda: S.NoiseSchedule([0.5, 0.6]), "alphas_cumprod must fall"),
        (lambda: S.NoiseSchedule(torch.ones(2, 2)), r"must be \(T,\), got shape \(2, 2\)"),
        (lambda: VP.grid(10, spacing="even"), "spacing must be one of linspace, leading, trailing"),
        (lambda: VP.grid(0), "num_steps must be from 1 to 1000, got 0"),
        (lambda: VP.grid(1001), "num_steps must be from 1 to 1000, got 1001"),
        (lambda: VP.grid(), "one of num_steps and timesteps must be given"),
        (lambda: VP.grid(timesteps=[10, 20]), r"timesteps must be \(S,\) and falling"),
        (lambda: VP.grid(timesteps=[1000]), "timestep must be from 0 to 999, got 1000"),
        (lambda: VP.grid(5, final="one"), "final must be one of zero, sigma_min, last or a number"),
        (lambda: VP.grid(5, start=5), "start must be from 0 to 4, got 5"),
        (lambda: VP.noising_table("noise"), "prediction must be one of epsilon"),
        (lambda: VP.noising_table("edm"), "needs sigma_data"),
        (lambda: VP.noising_table(weighting="snr"), "weighting must be one of min_snr, soft"),
        (lambda: S.NoiseSchedule.from_betas(zero_snr=True).grid(5, sigmas="karras"),
         "sigmas need sigma_max, or a floor"),
        (lambda: S.FlowSchedule(0), "num_steps and factor must be above 0, got 0 and 1.0"),
        (lambda: S.FlowSchedule().grid(), "one of num_steps and levels must be given"),
        (lambda: S.FlowSchedule().grid(0), "num_steps must be at least 1, got 0"),
        (lambda: S.FlowSchedule().grid(levels=[0.1, 0.2]), r"levels must be \(S,\), falling"),
        (lambda: S.FlowSchedule().grid(5, final="sigma_min"), "final must be one of zero, last"),
        (lambda: S.EDMSchedule(sigma_min=0.0), "0 < sigma_min <= sigma_max"),
        (lambda: S.EDMSchedule().grid(5, sigmas="linear"), "sigmas must be one of karras"),
        (lambda: S.EDMSchedule().grid(5, final="last"), "final must be one of zero, sigma_min"),
        (lambda: VP.grid(5, final=-1.0), "final must be from 0 to 1.798e.308, got -1.0"),
        (lambda: VP.grid(5, final=math.nan), "final must be from 0 to .*, got nan"),
        (lambda: VP.grid(5, sigmas="karras", rho=0), "rho must be a finite number other than 0"),
        (lambda: S.FlowSchedule().grid(5, final=1.5), "final must be from 0 to 1, got 1.5"),
        (lambda: S.FlowSchedule().grid(5, mu=math.nan), "mu must be finite, got nan"),
        (lambda: S.FlowSchedule().grid(5, terminal=1.0), "terminal must be from 0 to below 1"),
        (lambda: S.ddim(VP.grid(5), clip=0.0), "clip must be a number above 0, or a low and a hig"),
        (lambda: S.ddim(VP.grid(5), clip=(1.0, -1.0)), r"higher one, got \(1.0, -1.0\)"),
        (lambda: S.spacings.consistency(1000, 51), "original_steps . strength = 50, got 51"),
        (lambda: weights.mode_quantile(torch.ones(1), 3.0), "scale must be from -1 to 1.752"),
        (lambda: S.Grid(torch.ones(3), torch.ones(3), torch.ones(4), torch.ones(4), VP),
         r"alpha must be \(4,\) for 3 timesteps, got \(3,\)"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cuda_graph": True}, ValueError, "cuda_graph needs x on a CUDA device, got cpu"),
        ({"cuda_graph": "all"}, ValueError, "must be a bool, 'step' or 'loop', got 'all'"),
        ({"image": torch.ones(3, 6)}, ValueError, r"image must have shape \(2, 6\), got \(3, 6\)"),
        ({"guidance_scale": torch.ones(3)}, ValueError, r"must be a number or \(B,\) = \(2,\)"),
        ({"seed": torch.ones(3, dtype=torch.int64)}, ValueError, r"seed must be \(\) or \(B,\)"),
        ({"dynamic_threshold": (0.9, 0.0)}, ValueError, "a quantile from 0 to 1 and a maximum ab"),
        ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
    ],
)
def test_sample_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        S.sample(model, START, S.ddpm(VP.grid(4)), progress=False, **arguments)
    churned = S.euler(VP.grid(4), churn=1.0)
    with pytest.raises(ValueError, match="not possible: dynamic_threshold with churn"):
        S.sample(model, START, churned, dynamic_threshold=(0.9, 2.0), progress=False)
    with pytest.raises(TypeError, match="table must be a SamplerTable, got Tensor"):
        S.sample(model, START, S.ddpm(VP.grid(4)).coefficients)
    with pytest.raises(
        TypeError, match="the model must return a tensor, or a tensor first, got No"
    ):
        S.sample(lambda x, t: None, START, S.ddpm(VP.grid(4)), progress=False)
    with pytest.raises(TypeError, match="x must be float32, float16, bfloat16, float64, got int64"):
        S.sample(model, torch.ones(2, 6, dtype=torch.int64), S.ddpm(VP.grid(4)), progress=False)


@pytest.mark.cuda
@pytest.mark.parametrize("captured", [True, "step", "loop"])
def test_sample_as_a_cuda_graph(captured):
    x = START.float().cuda()
    first = S.sa_solver(VP.grid(8, skip_last=True))
    second = S.sa_solver(VP.grid(8, skip_last=True), predict_x0=False)
    plain, graph = (S.SampleLoop(model, x, first, cuda_graph=g) for g in (False, captured))
    for table in (first, second):
        plain.set_table(table)
        graph.set_table(table)
        for seed in (1, 2):
            assert torch.equal(graph.run(x, seed=seed), plain.run(x, seed=seed))
