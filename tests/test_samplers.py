"""Samplers against diffusers in double precision, against the theory, and what they refuse."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from sampling import NOISES, START, network, run
from torch import Tensor

import mmfast.schedule as S
from mmfast.schedule import Grid, SamplerTable
from mmfast.schedule.predictions import target_of
from mmfast.schedule.samplers import exponential

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
VP = S.NoiseSchedule.from_betas()
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("linspace", "leading", "trailing")
PLACED = {
    None: {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def compare(
    table: SamplerTable,
    module: str,
    cls: str,
    *,
    steps: int = 10,
    begin: int = 0,
    skip_last_rows: int = 0,
    config: dict | None = None,
    options: dict | None = None,
    timesteps: bool = True,
    **set_timesteps: object,
) -> None:
    """Every sample of a loop is that of diffusers, and so are the timesteps."""
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    made = other.scheduler(module, cls, **(config or {}))
    with other.double():
        made.set_timesteps(steps, **set_timesteps)
    theirs = other.loop(module, made, network, START, NOISES, begin, **(options or {}))
    ours = run(table)
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if i >= len(ours) - skip_last_rows:
            break
        error = float((a - b).abs().max() / b.abs().max())
        assert error < 1e-9, f"row {i}: {error}"
    if timesteps:
        expected = made.timesteps[begin:].double()
        torch.testing.assert_close(table.timesteps, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(prediction, spacing):
    config = {"prediction_type": prediction, "timestep_spacing": spacing}
    table = S.ddim(VP.grid(10, spacing=spacing), prediction=prediction, eta=0.7)
    compare(
        table,
        "ddim",
        "DDIMScheduler",
        config={**config, "clip_sample": False},
        options={"eta": 0.7},
    )
    if spacing == "trailing":
        return
    grid = VP.grid(10, spacing=spacing, offset=1, final="sigma_min")
    config |= {"steps_offset": 1, "set_alpha_to_one": False}
    for clip_noise in (False, True):
        table = S.ddim(grid, prediction=prediction, clip=1.0, clip_noise=clip_noise)
        options = {"use_clipped_model_output": clip_noise}
        compare(table, "ddim", "DDIMScheduler", config=config, options=options)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm(prediction, spacing):
    for variance in ("fixed_small", "fixed_small_log", "fixed_large"):
        table = S.ddpm(
            VP.grid(10, spacing=spacing),
            prediction=prediction,
            clip=1.5,
            variance=variance,
            noise_at_end=True,
        )
        config = {"prediction_type": prediction, "timestep_spacing": spacing}
        config |= {"clip_sample_range": 1.5, "variance_type": variance}
        compare(table, "ddpm", "DDPMScheduler", config=config)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_ddpm_with_learned_variances(kind):
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    variances = NOISES[:10].tanh()
    if kind == "learned":  # diffusers takes the variance itself, the paper its logarithm
        variances = variances.abs() + 0.01
    told = iter(variances)
    made = other.scheduler("ddpm", "DDPMScheduler", variance_type=kind, timestep_spacing="trailing")
    made.set_timesteps(10)
    theirs = other.loop(
        "ddpm", made, lambda x, t: torch.cat([network(x, t), next(told)], 1), START, NOISES
    )
    grid = VP.grid(10, spacing="trailing")
    table = S.ddpm(grid, clip=1.0, variance=kind, noise_at_end=True)
    assert table.learned_variance
    ours = run(table, variances=variances.log() if kind == "learned" else variances)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("spacing", "sigmas"),
    [
        *itertools.product(SPACINGS, [None, "karras"]),
        ("leading", "exponential"),
        ("linspace", "beta"),
    ],
)
def test_in_sigma(prediction, spacing, sigmas):
    grid = VP.grid(10, spacing=spacing, rounded=False, sigmas=sigmas)
    config = {"prediction_type": prediction, "timestep_spacing": spacing, **LINEAR}
    placed = config | PLACED[sigmas]

    compare(
        S.euler(grid, prediction=prediction),
        "euler_discrete",
        "EulerDiscreteScheduler",
        config=placed,
    )
    table = S.euler(grid, prediction=prediction, churn=3.0, churn_noise=1.003, churn_min=0.05)
    options = {"s_churn": 3.0, "s_noise": 1.003, "s_tmin": 0.05}
    compare(table, "euler_discrete", "EulerDiscreteScheduler", config=placed, options=options)
    compare(
        S.lms(grid, prediction=prediction), "lms_discrete", "LMSDiscreteScheduler", config=placed
    )
    clip = 1.0 if sigmas is None else None
    compare(
        S.heun(grid, prediction=prediction, clip=clip),
        "heun_discrete",
        "HeunDiscreteScheduler",
        config=placed | {"clip_sample": clip is not None},
    )
    if prediction == "sample" or (sigmas is not None and prediction != "epsilon"):
        return
    if sigmas is None:
        compare(
            S.euler_ancestral(grid, prediction=prediction),
            "euler_ancestral_discrete",
            "EulerAncestralDiscreteScheduler",
            config=config,
        )
    # With karras these two round timesteps that the model is told.
    told = sigmas != "karras"
    compare(
        S.kdpm2(grid, prediction=prediction),
        "k_dpm_2_discrete",
        "KDPM2DiscreteScheduler",
        config=placed,
        timesteps=told,
    )
    compare(
        S.kdpm2_ancestral(grid, prediction=prediction),
        "k_dpm_2_ancestral_discrete",
        "KDPM2AncestralDiscreteScheduler",
        config=placed,
        timesteps=told,
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_where_sampling_in_sigma_starts_and_ends(spacing):
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    config = {"timestep_spacing": spacing, "final_sigmas_type": "sigma_min"}
    grid = VP.grid(10, spacing=spacing, rounded=False, final="sigma_min")
    table = S.euler(grid)
    compare(table, "euler_discrete", "EulerDiscreteScheduler", config=config)
    made = other.scheduler("euler_discrete", "EulerDiscreteScheduler", **config)
    made.set_timesteps(10)
    assert table.initial_scale == pytest.approx(float(made.init_noise_sigma), rel=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("runge_kutta", [False, True])
def test_pndm(prediction, runge_kutta):
    config = {"prediction_type": prediction, "skip_prk_steps": not runge_kutta, "steps_offset": 1}
    for final, to_one in (("sigma_min", False), ("zero", True)):
        grid = VP.grid(10, spacing="leading", offset=1, final=final)
        table = S.pndm(grid, prediction=prediction, runge_kutta=runge_kutta, mix_outputs=True)
        compare(table, "pndm", "PNDMScheduler", config={**config, "set_alpha_to_one": to_one})


def test_ipndm():
    pytest.importorskip("diffusers")
    import diffusers_float64 as other

    sigmas = torch.linspace(0.99, 0.05, 11, dtype=torch.float64)
    made = other.scheduler("ipndm", "IPNDMScheduler", trained_betas=sigmas.tolist())
    with other.double():
        made.set_timesteps(10)
    theirs = other.loop("ipndm", made, network, START, NOISES)
    alphas = (1 - sigmas**2).sqrt()
    grid = Grid(made.timesteps, alphas, sigmas, torch.ones_like(sigmas), VP)
    for a, b in zip(run(S.ipndm(grid, prediction="v_prediction")), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


MULTISTEP = [
    (prediction, spacing, sigmas, final)
    for prediction in PREDICTIONS
    for spacing, sigmas in [
        ("linspace", None),
        ("leading", None),
        ("trailing", "karras"),
        ("linspace", "exponential"),
        ("leading", "beta"),
    ]
    for final in ("zero", "sigma_min")
    if final == "zero" or sigmas is None
]


@pytest.mark.parametrize(("prediction", "spacing", "sigmas", "final"), MULTISTEP)
def test_dpm_solver(prediction, spacing, sigmas, final):
    config = {"prediction_type": prediction, "final_sigmas_type": final, **PLACED[sigmas]}
    few = spacing != "linspace"
    for order, algorithm, solver_type, steps in [
        (1, "dpmsolver++", "midpoint", 10),
        (2, "dpmsolver++", "midpoint", 10),
        (2, "dpmsolver++", "heun", 16),
        (3, "dpmsolver++", "midpoint", 16),
        (2, "dpmsolver", "midpoint", 10),
        (2, "dpmsolver", "heun", 10),
        (3, "dpmsolver", "midpoint", 16),
        (1, "sde-dpmsolver++", "midpoint", 10),
        (2, "sde-dpmsolver++", "midpoint", 10),
        (2, "sde-dpmsolver++", "heun", 16),
        (2, "sde-dpmsolver", "midpoint", 10),
        (2, "sde-dpmsolver", "heun", 10),
    ]:
        if final == "zero" and not algorithm.endswith("++"):
            continue
        grid = VP.grid(steps, spacing=spacing, skip_last=True, sigmas=sigmas, final=final)
        same = {
            "prediction": prediction,
            "order": order,
            "algorithm": algorithm,
            "solver_type": solver_type,
        }
        theirs = config | {
            "solver_order": order,
            "algorithm_type": algorithm,
            "solver_type": solver_type,
        }
        table = S.dpm_solver(grid, **same, euler_at_final=order == 3)
        compare(
            table,
            "dpmsolver_multistep",
            "DPMSolverMultistepScheduler",
            steps=steps,
            timesteps=sigmas is None,
            config=theirs | {"timestep_spacing": spacing, "euler_at_final": order == 3},
        )
        if few or algorithm == "sde-dpmsolver":
            continue
        compare(
            S.dpm_solver_singlestep(grid, **same),
            "dpmsolver_singlestep",
            "DPMSolverSinglestepScheduler",
            steps=steps,
            timesteps=sigmas is None,
            config=theirs | {"lower_order_final": True},
        )


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
def test_dpm_solver_singlestep_of_order_3(algorithm, solver_type):
    for steps, lower in ((9, True), (9, False), (10, True), (11, True)):
        grid = VP.grid(steps, skip_last=True, final="sigma_min")
        table = S.dpm_solver_singlestep(
            grid, order=3, algorithm=algorithm, solver_type=solver_type, lower_order_final=lower
        )
        compare(
            table,
            "dpmsolver_singlestep",
            "DPMSolverSinglestepScheduler",
            steps=steps,
            config={
                "solver_order": 3,
                "algorithm_type": algorithm,
                "solver_type": solver_type,
                "lower_order_final": lower,
                "final_sigmas_type": "sigma_min",
            },
        )


@pytest.mark.parametrize(("prediction", "spacing", "sigmas", "final"), MULTISTEP)
def test_unipc(prediction, spacing, sigmas, final):
    grid = VP.grid(10, spacing=spacing, skip_last=True, sigmas=sigmas, final=final)
    for order, variant, predict_x0 in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False)):
        if final == "zero" and not predict_x0:
            continue  # diffusers gives NaN
        table = S.unipc(
            grid,
            prediction=prediction,
            order=order,
            variant=variant,
            predict_x0=predict_x0,
            without_corrector=[2, 5],
        )
        config = {"prediction_type": prediction, "timestep_spacing": spacing, **PLACED[sigmas]}
        config |= {"solver_order": order, "solver_type": variant, "predict_x0": predict_x0}
        config |= {"final_sigmas_type": final, "disable_corrector": [2, 5]}
        nan = final == "zero" and variant == "bh1"
        compare(
            table,
            "unipc_multistep",
            "UniPCMultistepScheduler",
            config=config,
            skip_last_rows=int(nan),
            timesteps=sigmas is None,
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "sigmas"), [("linspace", None), ("leading", "karras")])
def test_deis_and_sa_solver(prediction, spacing, sigmas):
    config = {"prediction_type": prediction, "timestep_spacing": spacing, **PLACED[sigmas]}
    final = "sigma_min" if sigmas is None else "last"
    for order, steps in itertools.product((1, 2, 3), (10, 16)):
        grid = VP.grid(steps, spacing=spacing, skip_last=True, sigmas=sigmas, final=final)
        compare(
            S.deis(grid, prediction=prediction, order=order),
            "deis_multistep",
            "DEISMultistepScheduler",
            steps=steps,
            timesteps=sigmas is None,
            config=config | {"solver_order": order},
        )
    grid = VP.grid(10, spacing=spacing, skip_last=True, sigmas=sigmas, final=final)
    for order, corrector, x0 in itertools.product((1, 2, 3), (1, 2, 4), (True, False)):
        table = S.sa_solver(
            grid,
            prediction=prediction,
            predictor_order=order,
            corrector_order=corrector,
            predict_x0=x0,
        )
        kind = "data_prediction" if x0 else "noise_prediction"
        compare(
            table,
            "sasolver",
            "SASolverScheduler",
            timesteps=sigmas is None,
            config=config
            | {"predictor_order": order, "corrector_order": corrector, "algorithm_type": kind},
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_consistency(prediction, steps):
    schedule = S.NoiseSchedule.from_betas("scaled_linear", start=0.00085, end=0.012)
    visited = S.spacings.consistency(1000, steps)
    config = {"prediction_type": prediction}
    table = S.lcm(schedule.grid(timesteps=visited), prediction=prediction, clip=1.0)
    compare(table, "lcm", "LCMScheduler", steps=steps, config=config | {"clip_sample": True})
    for eta in (0.0, 0.3, 1.0):
        grid = schedule.grid(timesteps=visited, final="sigma_min")
        table = S.tcd(grid, prediction=prediction, eta=eta)
        compare(table, "tcd", "TCDScheduler", steps=steps, config=config, options={"eta": eta})


@pytest.mark.parametrize("sigmas", [None, "karras", "exponential", "beta"])
@pytest.mark.parametrize(("factor", "mu"), [(1.0, None), (3.0, None), (1.0, 0.8)])
def test_flow_euler(sigmas, factor, mu):
    for terminal, stochastic in itertools.product((None, 0.1), (False, True)):
        grid = S.FlowSchedule(1000, factor).grid(10, mu=mu, terminal=terminal, sigmas=sigmas)
        config = {"shift": factor, "use_dynamic_shifting": mu is not None, **PLACED[sigmas]}
        config |= {"shift_terminal": terminal, "stochastic_sampling": stochastic}
        compare(
            S.flow_euler(grid, stochastic=stochastic),
            "flow_match_euler_discrete",
            "FlowMatchEulerDiscreteScheduler",
            config=config,
            mu=mu,
        )


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_flow_of_other_solvers(factor):
    schedule = S.FlowSchedule(1000, factor)
    compare(
        S.flow_heun(schedule.grid(10)),
        "flow_match_heun_discrete",
        "FlowMatchHeunDiscreteScheduler",
        config={"shift": factor},
    )
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": factor}
    levels = 1 - torch.linspace(1, 1e-3, 11, dtype=torch.float64).flip(0)[:-1]
    grid = schedule.grid(levels=levels)
    for order in (1, 2, 3):
        table = S.dpm_solver(grid, prediction="flow_prediction", order=order)
        compare(
            table,
            "dpmsolver_multistep",
            "DPMSolverMultistepScheduler",
            timesteps=False,
            config=config | {"solver_order": order},
        )
    # diffusers' UniPC starts a little below 1, where it would divide by 0.
    grid = schedule.grid(levels=torch.linspace(1, 1e-3, 11, dtype=torch.float64)[:-1])
    sigma = grid.sigma - 1e-6 * (grid.sigma == 1)
    grid = dataclasses.replace(grid, sigma=sigma, alpha=1 - sigma)
    for order in (1, 2, 3):
        table = S.unipc(grid, prediction="flow_prediction", order=order)
        compare(
            table,
            "unipc_multistep",
            "UniPCMultistepScheduler",
            timesteps=False,
            config=config | {"solver_order": order},
        )


@pytest.mark.parametrize("prediction", ["edm", "edm_v"])
@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
def test_edm(prediction, sigmas):
    config = {"prediction_type": "epsilon" if prediction == "edm" else "v_prediction"}
    config |= {"sigma_schedule": sigmas}
    for final in ("zero", "sigma_min"):
        grid = S.EDMSchedule().grid(10, sigmas=sigmas, final=final)
        compare(
            S.edm_euler(grid, prediction=prediction),
            "edm_euler",
            "EDMEulerScheduler",
            config=config | {"final_sigmas_type": final},
        )
    grid = S.EDMSchedule().grid(10, sigmas=sigmas)
    compare(
        S.edm_euler(grid, prediction=prediction, churn=4.0, churn_noise=1.01),
        "edm_euler",
        "EDMEulerScheduler",
        config=config,
        options={"s_churn": 4.0, "s_noise": 1.01},
    )
    for order, algorithm, solver_type in [
        (1, "dpmsolver++", "midpoint"),
        (2, "dpmsolver++", "midpoint"),
        (2, "dpmsolver++", "heun"),
        (3, "dpmsolver++", "midpoint"),
        (2, "sde-dpmsolver++", "heun"),
    ]:
        table = S.edm_dpm(
            grid, prediction=prediction, order=order, algorithm=algorithm, solver_type=solver_type
        )
        compare(
            table,
            "edm_dpmsolver_multistep",
            "EDMDPMSolverMultistepScheduler",
            config=config
            | {"solver_order": order, "algorithm_type": algorithm, "solver_type": solver_type},
        )


@pytest.mark.parametrize("begin", [1, 4])
def test_from_an_image(begin):
    grid = VP.grid(10, skip_last=True, start=begin)
    assert len(grid) == 10 - begin
    compare(
        S.dpm_solver(grid, order=3),
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        begin=begin,
        config={"solver_order": 3},
    )
    compare(
        S.dpm_solver_singlestep(grid, order=3),
        "dpmsolver_singlestep",
        "DPMSolverSinglestepScheduler",
        begin=begin,
        config={"solver_order": 3, "lower_order_final": True},
    )
    compare(
        S.unipc(grid, order=3),
        "unipc_multistep",
        "UniPCMultistepScheduler",
        begin=begin,
        config={"solver_order": 3},
    )
    ending = VP.grid(10, skip_last=True, start=begin, final="sigma_min")
    compare(S.sa_solver(ending), "sasolver", "SASolverScheduler", begin=begin)
    table = S.euler(VP.grid(10, rounded=False, start=begin), churn=2.0)
    compare(
        table, "euler_discrete", "EulerDiscreteScheduler", begin=begin, options={"s_churn": 2.0}
    )
    assert table.start == pytest.approx((1.0, float(VP.ratio[grid_timestep(table)])), rel=0.2)


def grid_timestep(table: SamplerTable) -> int:
    """The first timestep, rounded."""
    return round(float(table.timesteps[0]))


def test_zero_terminal_snr():
    exact = S.NoiseSchedule.from_betas(zero_snr=True)
    floored = S.NoiseSchedule.from_betas(zero_snr=True, floor=2**-24)
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config |= {"timestep_spacing": "trailing"}
    table = S.ddim(exact.grid(10, spacing="trailing"), prediction="v_prediction")
    compare(table, "ddim", "DDIMScheduler", config={**config, "clip_sample": False})
    grid = floored.grid(10, spacing="trailing")
    for made, module, cls in [
        (S.euler, "euler_discrete", "EulerDiscreteScheduler"),
        (S.dpm_solver, "dpmsolver_multistep", "DPMSolverMultistepScheduler"),
        (S.unipc, "unipc_multistep", "UniPCMultistepScheduler"),
    ]:
        compare(made(grid, prediction="v_prediction"), module, cls, config=config)
    # Solvers of the clean sample also start where alpha is exactly 0, to the same result.
    for made in (S.dpm_solver, S.dpm_solver_singlestep, S.unipc, S.sa_solver):
        for steps in (10, 16):
            ours = [
                run(made(s.grid(steps, spacing="trailing"), prediction="v_prediction"))[-1]
                for s in (exact, floored)
            ]
            torch.testing.assert_close(*ours, rtol=0, atol=2e-3)


# What diffusers doesn't get right, or can't.


def test_unipc_bh1_ends_finite_at_sigma_zero():
    grid = VP.grid(10, skip_last=True)
    for order in (1, 2, 3):
        for lower_order_final in (True, False):
            table = S.unipc(grid, order=order, variant="bh1", lower_order_final=lower_order_final)
            before, last = run(table)[-2:]
            alpha, sigma = grid.point(9)
            expected = (before - sigma * network(before, 0.0)) / alpha
            torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-10)


def test_large_log_variance_is_the_large_variance():
    grid = VP.grid(10)
    log, plain = (S.ddpm(grid, variance=v) for v in ("fixed_large_log", "fixed_large"))
    assert torch.equal(log.coefficients, plain.coefficients)


def test_a_step_of_no_length_changes_nothing():
    grid = VP.grid(16, skip_last=True, sigmas="exponential", final="last")
    for table in (
        S.dpm_solver(grid, solver_type="heun", lower_order_final=False),
        S.dpm_solver(grid, order=3, algorithm="sde-dpmsolver++", lower_order_final=False),
        S.deis(grid, order=3, lower_order_final=False),
        S.lms(grid),
    ):
        before, last = run(table)[-2:]
        torch.testing.assert_close(last, before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [-30.0, -2.0, -0.9, -1e-3, 0.0, 1e-9, 0.5, 1.0, 3.0, 40.0])
def test_moments_are_integrals(k):
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    kernel = k * torch.exp(-k * (1 - u))
    expected = [float(torch.trapezoid(kernel * u**j, u)) for j in range(4)]
    assert exponential.moments(k, 4) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("k", [-4.5, -1.1, 1.1, 4.5])
def test_moments_of_high_orders_lose_no_digits(k):
    def exact(j: int) -> float:
        terms = (
            Fraction(-k) ** n * math.factorial(j) / math.factorial(j + n + 1) for n in range(60)
        )
        return float(Fraction(k) * sum(terms))

    assert exponential.moments(k, 12) == pytest.approx([exact(j) for j in range(12)], rel=1e-13)


def test_moments_of_an_infinite_interval():
    assert exponential.moments(math.inf, 3) == [1.0, 1.0, 1.0]


def test_polynomials_interpolate():
    nodes = [0.0, -0.7, -2.0, -math.inf]
    values = [S.Linear({i: 1.0}) for i in range(4)]
    powers = exponential.polynomial(nodes, values)
    for i, node in enumerate(nodes[:3]):
        at = sum(c * node**j for j, c in enumerate(powers))
        for source in range(4):
            assert at.weights.get(source, 0.0) == pytest.approx(float(source == i), abs=1e-12)


@pytest.mark.parametrize("tau", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("order", [2, 3])
def test_adams_is_exact_for_polynomials(tau, order):
    """A clean sample that is a polynomial of lambda, of the order less one, makes no error."""
    grid = VP.grid(10, skip_last=True, final="sigma_min")
    i = 4
    interval = exponential.Interval(grid, i, i + 1, tau=tau)
    points = [(i - k, S.Linear({k: 1.0})) for k in range(order)]
    found = interval.integral(interval.through(points))

    def clean(lam: Tensor | float) -> Tensor | float:
        return 0.3 - 0.8 * lam + 0.25 * (lam**2 if order == 3 else 0)

    lam = [exponential.log_ratio(grid, j) for j in range(11)]
    ours = sum(found.weights[k] * clean(lam[i - k]) for k in range(order))
    x = torch.linspace(lam[i], lam[i + 1], 200_001, dtype=torch.float64)
    sigma = grid.point(i + 1)[1]
    factor = 1 + tau**2
    integrand = factor * torch.exp(factor * x - tau**2 * lam[i + 1]) * clean(x)
    assert ours == pytest.approx(sigma * float(torch.trapezoid(integrand, x)), rel=1e-8)


@pytest.mark.parametrize("name", S.samplers.__all__)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(name, steps):
    schedule = VP
    if "edm" in name or "flow" in name:
        schedule = S.EDMSchedule() if "edm" in name else S.FlowSchedule()
    for final in ("zero", "last" if "flow" in name else "sigma_min"):
        table = getattr(S, name)(schedule.grid(steps, final=final))
        assert len(table) >= steps
        assert bool(run(table)[-1].isfinite().all())


# Any prediction of the same denoiser leads to the same samples.

ALL = {name: getattr(S, name) for name in S.samplers.__all__}


@pytest.mark.parametrize("name", ALL)
def test_predictions_agree(name):
    if name.startswith("edm"):
        grid, kinds = S.EDMSchedule().grid(8), S.PREDICTIONS
    elif name.startswith("flow"):
        grid = S.FlowSchedule().grid(8, start=1)
        kinds = ("epsilon", "sample", "v_prediction", "flow_prediction")
    elif name.startswith("kdpm2"):  # has points between timesteps
        grid = circle(8, warm_up=False)
        kinds = ("epsilon", "sample", "v_prediction", "flow_prediction")
    else:
        grid = VP.grid(8, skip_last=True)
        kinds = ("epsilon", "sample", "v_prediction", "flow_prediction")
    results = []
    for kind in kinds:
        table = ALL[name](grid, prediction=kind)

        def model(x: Tensor, timestep: float, kind: str = kind) -> Tensor:
            alpha, sigma = grid.schedule.at(timestep)
            scale = grid.schedule.input_scale(sigma / alpha) / alpha
            alpha, sigma = alpha * scale, sigma * scale
            clean = torch.tanh(x @ torch.eye(6, dtype=x.dtype)) * 0.8
            t_x, t_n = target_of(kind, alpha, sigma, grid.sigma_data)
            return t_x * clean + t_n * (x - alpha * clean) / sigma

        results.append(run(table, model)[-1])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-8, atol=1e-8)


# Convergence on Gaussian data, whose score and flow are known.

MEAN, STD = 0.3, 0.5


class Circle:
    """alpha = cos t, sigma = sin t: a schedule for every t."""

    def at(self, timestep: float) -> tuple[float, float]:
        return math.cos(timestep), math.sin(timestep)

    def timestep_of(self, ratio: float) -> float:
        return math.atan(ratio)

    def input_scale(self, ratio: float) -> float:
        return 1 / math.hypot(1.0, ratio)


def circle(steps: int, warm_up: bool) -> Grid:
    """Even in lambda; with ``warm_up`` the first steps, which are of low order, are tiny."""
    first, last = (math.log(1 / math.tan(t)) for t in (1.3, 0.2))
    h = (last - first) / steps
    begin = [0.0, *itertools.accumulate([h**2.5, h ** (5 / 3), h**1.25])] if warm_up else [0.0]
    even = torch.linspace(first + begin[-1], last, steps + 2 - len(begin), dtype=torch.float64)
    lam = torch.cat([first + torch.tensor(begin[:-1], dtype=torch.float64), even])
    t = torch.atan(torch.exp(-lam))
    return Grid(t[:-1], t.cos(), t.sin(), torch.ones_like(t), Circle())


def error(make: Callable[[Grid], SamplerTable], steps: int, warm_up: bool) -> float:
    """Of the result, for the model that knows the noise of Gaussian data."""
    grid = circle(steps, warm_up)

    def model(x: Tensor, timestep: float) -> Tensor:
        alpha, sigma = math.cos(timestep), math.sin(timestep)
        variance = (alpha * STD) ** 2 + sigma**2
        return sigma * (x - alpha * MEAN) / variance

    (alpha, sigma), (alpha_end, sigma_end) = grid.point(0), grid.point(steps)
    widths = [math.hypot(a * STD, s) for a, s in ((alpha, sigma), (alpha_end, sigma_end))]
    exact = alpha_end * MEAN + widths[1] / widths[0] * (START - alpha * MEAN)
    table = make(grid)
    alpha_of_x = alpha if table.start[0] == 1 else 1.0  # x / alpha is what some samplers move
    back = alpha_end if table.start[0] == 1 else 1.0
    found = run(table, model, START / alpha_of_x, torch.zeros(2 * steps + 9, 2, 6))[-1] * back
    return float((found - exact).abs().max())


def orders(name: str, **options: object) -> Callable[[Grid], SamplerTable]:
    def make(grid: Grid) -> SamplerTable:
        return ALL[name](grid, **options)

    return make


FULL = {"lower_order_final": False}


@pytest.mark.parametrize(
    ("make", "expected", "warm_up"),
    [
        (orders("ddim"), 1, False),
        (orders("euler"), 1, False),
        (orders("heun"), 2, False),
        (orders("kdpm2"), 2, False),
        (orders("pndm"), 2, False),  # fixed coefficients, for steps even in t
        (orders("dpm_solver", order=2, **FULL), 2, True),
        (orders("dpm_solver", order=2, algorithm="dpmsolver", **FULL), 2, True),
        (orders("dpm_solver", order=3, solver_type="adams", **FULL), 3, True),
        (
            orders("dpm_solver", order=3, solver_type="adams", algorithm="dpmsolver", **FULL),
            3,
            True,
        ),
        (orders("dpm_solver", order=3, algorithm="dpmsolver", **FULL), 2, True),  # the authors'
        (orders("dpm_solver_singlestep", order=2, **FULL), 2, False),
        (orders("dpm_solver_singlestep", order=3, **FULL), 3, False),
        (orders("dpm_solver_singlestep", order=3, solver_type="heun", **FULL), 3, True),
        (orders("deis", order=2, **FULL), 2, False),
        (orders("deis", order=3, **FULL), 3, True),
        (orders("deis", order=4, **FULL), 4, True),
        (orders("lms", order=2), 2, True),
        (orders("lms", order=3), 3, True),
        (orders("lms", order=4), 4, True),
        (orders("unipc", order=1, corrector=False, **FULL), 1, False),
        (orders("unipc", order=1, **FULL), 2, False),
        (orders("unipc", order=2, corrector=False, variant="bh1", **FULL), 2, False),
        (orders("unipc", order=2, **FULL), 3, False),
        (orders("unipc", order=3, corrector=False, **FULL), 3, True),
        (
            orders("sa_solver", predictor_order=3, corrector_order=3, tau=lambda t: 0.0, **FULL),
            3,
            True,
        ),
    ],
)
def test_convergence(make, expected, warm_up):
    # 48 and 96 are multiples of all orders, so that singlestep groups are whole.
    coarse, fine = (error(make, steps, warm_up) for steps in (48, 96))
    slope = math.log2(coarse / fine)
    assert expected - 0.3 < slope < expected + 0.5


# Refusals.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: S.ddim(g, prediction="noise"), "prediction must be one of epsilon, sample"),
        (lambda g: S.ddim(g, prediction="edm"), "'edm' needs sigma_data: a grid of an EDMSchedule"),
        (lambda g: S.ddim(g, eta=-1.0), "eta must be at least 0, got -1.0"),
        (lambda g: S.ddpm(g, variance="large"), "variance must be one of fixed_small"),
        (lambda g: S.dpm_solver(g, order=4), "order must be from 1 to 3, got 4"),
        (lambda g: S.dpm_solver(g, algorithm="dpm"), "algorithm must be one of dpmsolver, "),
        (lambda g: S.dpm_solver(g, solver_type="bh1"), "solver_type must be one of midpoint, heun"),
        (lambda g: S.dpm_solver_singlestep(g, order=0), "order must be from 1 to 3, got 0"),
        (lambda g: S.deis(g, order=5), "order must be from 1 to 4, got 5"),
        (lambda g: S.unipc(g, variant="bh3"), "variant must be one of bh1, bh2, got 'bh3'"),
        (
            lambda g: S.sa_solver(g, corrector_order=13),
            "corrector_order must be from 0 to 12, got 13",
        ),
        (lambda g: S.lms(g, order=0), "order must be from 1 to 12, got 0"),
        (lambda g: S.ipndm(g, order=5), "order must be from 1 to 4, got 5"),
        (lambda g: S.euler_ancestral(g, eta=-0.5), "eta must be from 0 to 1, got -0.5"),
        (lambda g: S.kdpm2_ancestral(g, eta=2.0), "eta must be from 0 to 1, got 2.0"),
        (lambda g: S.tcd(g, eta=1.5), "eta must be from 0 to 1, got 1.5"),
        (lambda g: S.pndm(g.skip(7), runge_kutta=True), "needs at least 4 steps, got 3"),
        (lambda g: S.pndm(g, mix_outputs=True, clip=1.0), "not possible: mix_outputs with clip"),
        (lambda g: S.flow_euler(g), "flow samplers need alpha"),
        (lambda g: S.flow_heun(g), "flow samplers need alpha"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(VP.grid(10))


def test_refused_where_alpha_is_zero():
    grid = S.NoiseSchedule.from_betas(zero_snr=True).grid(10, spacing="trailing")
    with pytest.raises(ValueError, match="'epsilon' says nothing of the sample where alpha is 0"):
        S.ddim(grid)
    for make in (S.euler, S.heun, S.kdpm2, S.lms):
        with pytest.raises(ValueError, match="divides by alpha, which is 0 at the start"):
            make(grid, prediction="v_prediction")
    with pytest.raises(ValueError, match="can't start where alpha is 0"):
        S.deis(grid, prediction="v_prediction")
    with pytest.raises(ValueError, match="which is 0: use a schedule with a floor"):
        S.pndm(grid, prediction="v_prediction")
