"""diffusers' schedulers on tables, against diffusers' own."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

import diffusers_float64  # noqa: E402

import mmfast.integrations  # noqa: E402
import mmfast.integrations.diffusers as drop_in  # noqa: E402
from mmfast.integrations.diffusers.placed import find  # noqa: E402
from mmfast.integrations.diffusers.schedulers import CLASSES, on_tables  # noqa: E402

FILES = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
    "HeunDiscreteScheduler": "heun_discrete",
    "KDPM2DiscreteScheduler": "k_dpm_2_discrete",
    "KDPM2AncestralDiscreteScheduler": "k_dpm_2_ancestral_discrete",
    "LMSDiscreteScheduler": "lms_discrete",
    "PNDMScheduler": "pndm",
    "IPNDMScheduler": "ipndm",
    "DEISMultistepScheduler": "deis_multistep",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "dpmsolver_singlestep",
    "UniPCMultistepScheduler": "unipc_multistep",
    "SASolverScheduler": "sasolver",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler_discrete",
    "FlowMatchHeunDiscreteScheduler": "flow_match_heun_discrete",
    "EDMEulerScheduler": "edm_euler",
    "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep",
}

SPACINGS = ("linspace", "leading", "trailing")


def _with(name: str, *configs: dict[str, Any], **every: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(name, {**config, **every}) for config in configs]


def _spaced(name: str) -> list[tuple[str, dict[str, Any]]]:
    return _with(name, *({"timestep_spacing": s, "steps_offset": 1} for s in SPACINGS[:2]))


def _placed(name: str) -> list[tuple[str, dict[str, Any]]]:
    return _with(
        name, *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))
    )


def _predicting(name: str, *names: str) -> list[tuple[str, dict[str, Any]]]:
    return _with(name, *({"prediction_type": kind} for kind in names))


# "step": options of step; "set": of set_timesteps; the rest is the scheduler's configuration.
CASES = [
    # Predictions that do not fit the sigmas: the library converts them by its rules all the same.
    *(
        (name, {"prediction_type": kind, "use_flow_sigmas": kind[0] == "v"})
        for name in (
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler",
            "SASolverScheduler",
        )
        for kind in ("v_prediction", "flow_prediction")
    ),
    *_with("DDPMScheduler", {}, {"clip_sample": False}, {"beta_schedule": "squaredcos_cap_v2"}),
    *(
        (name, {"thresholding": True, "sample_max_value": 1.5, **more})
        for name, more in (
            ("DDPMScheduler", {}),
            ("DDIMScheduler", {"step": {"use_clipped_model_output": True}}),
            ("DEISMultistepScheduler", {}),
            ("DPMSolverMultistepScheduler", {}),
            (
                "DPMSolverMultistepScheduler",
                {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            ),
            ("DPMSolverSinglestepScheduler", {}),
            ("UniPCMultistepScheduler", {}),
            ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
            ("SASolverScheduler", {}),
            ("LCMScheduler", {}),
            ("EDMDPMSolverMultistepScheduler", {}),
        )
    ),
    *_with("DDPMScheduler", {"variance_type": "fixed_large"}, {"variance_type": "fixed_small_log"}),
    *_with(
        "DDPMScheduler", {"set": {"timesteps": [900, 500, 20, 3]}}, {"timestep_spacing": "trailing"}
    ),
    *_predicting("DDPMScheduler", "sample", "v_prediction"),
    *_with("DDIMScheduler", {}, {"clip_sample": False, "set_alpha_to_one": False}),
    *_with("DDIMScheduler", {"step": {"eta": 0.7}}, {"step": {"use_clipped_model_output": True}}),
    *_predicting("DDIMScheduler", "sample", "v_prediction"),
    *_with("DDIMScheduler", *({"timestep_spacing": s} for s in SPACINGS)),
    *_with("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    *_with("EulerDiscreteScheduler", {}, {"final_sigmas_type": "sigma_min"}),
    *_with("EulerDiscreteScheduler", {"step": {"s_churn": 3.0, "s_tmax": 9.0, "s_noise": 1.1}}),
    *_with("EulerDiscreteScheduler", {"set": {"sigmas": [9.0, 3.0, 0.5, 0.0]}}),
    *_with("EulerDiscreteScheduler", {"step": {"s_churn": 3.0}}, interpolation_type="log_linear"),
    *_with(
        "EulerDiscreteScheduler", {"timestep_type": "continuous"}, prediction_type="v_prediction"
    ),
    *_predicting("EulerDiscreteScheduler", "sample", "v_prediction"),
    *_placed("EulerDiscreteScheduler"),
    *_spaced("EulerDiscreteScheduler"),
    *_with("EulerAncestralDiscreteScheduler", {}, {"rescale_betas_zero_snr": True}),
    *_predicting("EulerAncestralDiscreteScheduler", "v_prediction"),
    *_with("HeunDiscreteScheduler", {}, {"clip_sample": True}),
    *_predicting("HeunDiscreteScheduler", "sample", "v_prediction"),
    *_placed("HeunDiscreteScheduler"),
    *_with("KDPM2DiscreteScheduler", {}),
    *_predicting("KDPM2DiscreteScheduler", "v_prediction"),
    *_placed("KDPM2DiscreteScheduler"),
    *_with("KDPM2AncestralDiscreteScheduler", {}),
    *_predicting("KDPM2AncestralDiscreteScheduler", "v_prediction"),
    *_placed("KDPM2AncestralDiscreteScheduler"),
    *_with("LMSDiscreteScheduler", {}, {"step": {"order": 1}}, {"step": {"order": 6}}),
    *_predicting("LMSDiscreteScheduler", "sample", "v_prediction"),
    *_placed("LMSDiscreteScheduler"),
    *_with("PNDMScheduler", {}, {"skip_prk_steps": True}, {"set_alpha_to_one": True}),
    *_with("PNDMScheduler", *({"timestep_spacing": s} for s in SPACINGS), skip_prk_steps=True),
    *_with("PNDMScheduler", {}, {"skip_prk_steps": True}, prediction_type="v_prediction"),
    *_with("IPNDMScheduler", {}),
    *_with("DEISMultistepScheduler", *({"solver_order": k} for k in (1, 2, 3))),
    *_with("DEISMultistepScheduler", {"lower_order_final": False}),
    *_with(
        "DEISMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    ),
    *_predicting("DEISMultistepScheduler", "sample", "v_prediction"),
    *_placed("DEISMultistepScheduler"),
    *_with("DPMSolverMultistepScheduler", *({"solver_order": k} for k in (1, 2, 3))),
    *_with("DPMSolverMultistepScheduler", {"solver_type": "heun"}, {"euler_at_final": True}),
    *_with(
        "DPMSolverMultistepScheduler",
        *({"algorithm_type": kind} for kind in ("dpmsolver", "sde-dpmsolver")),
        final_sigmas_type="sigma_min",
    ),
    *_with(
        "DPMSolverMultistepScheduler", {}, {"solver_type": "heun"}, algorithm_type="sde-dpmsolver++"
    ),
    *_with("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {"lambda_min_clipped": -5.1}),
    *_with(
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
    *_with("DPMSolverMultistepScheduler", {"lower_order_final": False, "solver_order": 3}),
    *_predicting("DPMSolverMultistepScheduler", "sample", "v_prediction"),
    *_placed("DPMSolverMultistepScheduler"),
    *_spaced("DPMSolverMultistepScheduler"),
    *_with("DPMSolverSinglestepScheduler", *({"solver_order": k} for k in (1, 2, 3))),
    *_with("DPMSolverSinglestepScheduler", {"solver_type": "heun", "solver_order": 3}),
    *_with("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    *_with(
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    *_placed("DPMSolverSinglestepScheduler"),
    *_with(
        "UniPCMultistepScheduler",
        *({"solver_order": k, "solver_type": b} for k in (1, 2, 4) for b in ("bh1", "bh2")),
        final_sigmas_type="sigma_min",
    ),
    *_with(
        "UniPCMultistepScheduler", {}, {"disable_corrector": [0, 2]}, {"lower_order_final": False}
    ),
    *_with("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    *_with(
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
    *_predicting("UniPCMultistepScheduler", "sample", "v_prediction"),
    *_placed("UniPCMultistepScheduler"),
    *_with(
        "SASolverScheduler",
        *(
            {"predictor_order": k, "corrector_order": c}
            for k, c in ((1, 1), (2, 2), (3, 3), (4, 4))
        ),
    ),
    *_with(
        "SASolverScheduler", {"algorithm_type": "noise_prediction"}, {"tau_func": lambda t: 0.0}
    ),
    *_predicting("SASolverScheduler", "sample", "v_prediction"),
    *_with("LCMScheduler", {}, {"clip_sample": True}, {"set_alpha_to_one": False}),
    *_with("LCMScheduler", {"set": {"timesteps": [999, 700, 19]}}),
    *_predicting("LCMScheduler", "sample", "v_prediction"),
    *_with("TCDScheduler", *({"step": {"eta": eta}} for eta in (0.0, 0.3, 1.0))),
    *_predicting("TCDScheduler", "sample", "v_prediction"),
    *_with("FlowMatchEulerDiscreteScheduler", {}, {"shift": 3.0}, {"stochastic_sampling": True}),
    *_with("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {"shift_terminal": 0.1}),
    *_with("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "set": {"mu": 0.8}}),
    *_with("FlowMatchEulerDiscreteScheduler", {"set": {"sigmas": [1.0, 0.6, 0.2]}}),
    *_placed("FlowMatchEulerDiscreteScheduler"),
    *_with("FlowMatchHeunDiscreteScheduler", {}, {"shift": 3.0}),
    *_with(
        "FlowMatchHeunDiscreteScheduler",
        {"step": {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 0.9, "s_noise": 1.1}},
    ),
    *_with(
        "EDMEulerScheduler",
        {},
        {"sigma_schedule": "exponential"},
        {"final_sigmas_type": "sigma_min"},
    ),
    *_with("EDMEulerScheduler", {"step": {"s_churn": 3.0, "s_noise": 1.1}}),
    *_predicting("EDMEulerScheduler", "v_prediction"),
    *_with("EDMDPMSolverMultistepScheduler", *({"solver_order": k} for k in (1, 2, 3))),
    *_with(
        "EDMDPMSolverMultistepScheduler",
        {"solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    *_predicting("EDMDPMSolverMultistepScheduler", "v_prediction"),
]


def _name(case: tuple[str, dict[str, Any]]) -> str:
    name, config = case
    parts = (f"{key}={getattr(value, '__name__', value)}" for key, value in config.items())
    return "-".join([name.removesuffix("Scheduler"), *parts]).replace(" ", "")


def _model(x: Tensor) -> Tensor:
    return torch.tanh(0.7 * x + 0.1) + 0.05 * x.roll(1, -1)


def _run(
    scheduler: Any,
    *,
    steps: int = 8,
    begin: int = 0,
    step: dict[str, Any] | None = None,
    set: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (2, 3, 4, 5),
    times: Any = lambda t: t,
    return_dict: bool = False,
) -> list[tuple[Tensor, ...]]:
    """All outputs of a run."""
    options = dict(step or {})
    if set is not None and {"timesteps", "sigmas"} & {*set}:
        scheduler.set_timesteps(**set)
    else:
        scheduler.set_timesteps(steps, **(set or {}))
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    outputs = []
    for t in scheduler.timesteps[begin:]:
        t = times(t)
        model_input = x
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(x, t)
        output = scheduler.step(_model(model_input), t, x, return_dict=return_dict, **options)
        x = output.prev_sample if return_dict else output[0]
        outputs.append(tuple(output.values()) if return_dict else output)
    return outputs


def _error(got: list[tuple[Tensor, ...]], want: list[tuple[Tensor, ...]]) -> float:
    """The largest, relative to the norm of each output."""
    assert len(got) == len(want)
    worst = 0.0
    for ours, theirs in zip(got, want, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert bool(a.isfinite().all())
            worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


def _split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    made = {key: value for key, value in config.items() if key not in ("step", "set")}
    return made, {key: config[key] for key in ("step", "set") if key in config}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers.utils.logging.set_verbosity_error()
        with torch.no_grad():
            yield


def _doubled(theirs: Any) -> Any:
    """Ours of a class in double precision, which draws noise in that too."""
    kind: Any = on_tables(theirs)
    kind._single = torch.float64
    return kind


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_whole_runs_in_double_precision(case: tuple[str, dict[str, Any]]) -> None:
    name, config = case
    made, options = _split(config)
    with diffusers_float64.double():
        theirs = getattr(diffusers_float64.module(FILES[name]), name)
        want = _run(theirs(**made), dtype=torch.float64, **options)
        got = _run(_doubled(theirs)(**made), dtype=torch.float64, **options)
    assert _error(got, want) < 1e-9


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("return_dict", [False, True])
def test_whole_runs_in_single_precision(name: str, return_dict: bool) -> None:
    want = _run(getattr(diffusers, name)(), return_dict=return_dict)
    got = _run(CLASSES[name](), return_dict=return_dict)
    assert _error(got, want) < 1e-5


@pytest.mark.parametrize("name", FILES)
def test_outputs_are_the_librarys(name: str) -> None:
    x = torch.randn(2, 3, 4)
    outputs = []
    for kind in (getattr(diffusers, name), CLASSES[name]):
        scheduler = kind()
        scheduler.set_timesteps(5)
        outputs.append(scheduler.step(x, scheduler.timesteps[0], x))
    theirs, ours = outputs
    assert type(ours) is type(theirs)
    assert list(ours) == list(theirs)
    assert vars(ours).keys() >= dict(theirs).keys()
    assert ours.prev_sample is ours[0]


MIXED = [
    *((name, {}) for name in FILES),
    *(
        ("DPMSolverMultistepScheduler", {"algorithm_type": kind, "prediction_type": prediction})
        for kind in ("dpmsolver++", "sde-dpmsolver++")
        for prediction in ("sample", "v_prediction")
    ),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
]


@pytest.mark.parametrize(
    ("sample", "output"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("case", MIXED, ids=_name)
def test_dtypes_of_samples_and_outputs(
    case: tuple[str, dict[str, Any]], sample: torch.dtype, output: torch.dtype
) -> None:
    """A model in bfloat16 steps samples in float32, and the like."""
    name, made = case
    runs = []
    for kind in (getattr(diffusers, name), CLASSES[name]):
        scheduler = kind(num_train_timesteps=100, **made)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(5)
        drawn = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if drawn else {}
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).to(sample)
        samples = []
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step((0.5 * torch.tanh(x)).to(output), t, x, **options).prev_sample
            samples.append(x)
        runs.append(samples)
    low = torch.bfloat16 in (sample, output)
    for theirs, ours in zip(*runs, strict=True):
        assert ours.dtype == theirs.dtype
        least = float(theirs.abs().max())
        assert (
            float((ours.double() - theirs.double()).abs().max()) <= (0.05 if low else 1e-4) * least
        )


@pytest.mark.parametrize("predictor", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_unipc_corrects_for_another_solver(predictor: str) -> None:
    """``solver_p`` takes the steps, from samples that UniPC has corrected."""
    results = []
    for library in (diffusers, drop_in):
        with diffusers_float64.double():
            unipc, other = (
                getattr(diffusers_float64.module(FILES[name]), name)
                for name in ("UniPCMultistepScheduler", predictor)
            )
            if library is drop_in:
                unipc, other = _doubled(unipc), _doubled(other)
            solver = other(timestep_spacing="leading")
            made = unipc(timestep_spacing="leading", solver_p=solver, solver_order=3)
            results.append(_run(made, dtype=torch.float64, return_dict=library is drop_in))
    assert _error(results[1], results[0]) < 1e-9


STARTS = [
    *_with("DDIMScheduler", {}),
    *_with("EulerDiscreteScheduler", {}),
    *_with("EulerAncestralDiscreteScheduler", {}),
    *_with("HeunDiscreteScheduler", {}),
    *_with("KDPM2DiscreteScheduler", {}),
    *_with("KDPM2AncestralDiscreteScheduler", {}),
    *_with("PNDMScheduler", {"skip_prk_steps": True}),
    *_with("IPNDMScheduler", {}),
    *_with("DEISMultistepScheduler", {"solver_order": 3}),
    *_with("DPMSolverMultistepScheduler", *({"solver_order": k} for k in (1, 2, 3))),
    *_with("DPMSolverSinglestepScheduler", *({"solver_order": k} for k in (2, 3))),
    *_with("UniPCMultistepScheduler", {"solver_order": 3}, {"disable_corrector": [4]}),
    *_with("SASolverScheduler", {"predictor_order": 3, "corrector_order": 4}),
    *_with("LCMScheduler", {}),
    *_with("TCDScheduler", {}),
    *_with("FlowMatchEulerDiscreteScheduler", {}),
    *_with("FlowMatchHeunDiscreteScheduler", {}),
    *_with("EDMEulerScheduler", {}),
    *_with("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
]


@pytest.mark.parametrize("case", STARTS, ids=_name)
def test_starts_from_an_image(case: tuple[str, dict[str, Any]]) -> None:
    name, made = case
    with diffusers_float64.double():
        theirs = getattr(diffusers_float64.module(FILES[name]), name)
        ours = _doubled(theirs)(**made)
        for begin in (4, 2):  # and again with the same scheduler
            want = _run(theirs(**made), dtype=torch.float64, begin=begin)
            assert _error(_run(ours, dtype=torch.float64, begin=begin), want) < 1e-9


@pytest.mark.parametrize(
    "times",
    [float, lambda t: t.clone(), lambda t: t[None][0], lambda t: t.numpy()],
    ids=["float", "clone", "view", "numpy"],
)
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_timesteps_of_any_type(name: str, times: Any) -> None:
    ours = CLASSES[name]()
    want = _run(getattr(diffusers, name)())
    assert _error(_run(ours, times=times), want) < 1e-5
    # The first step finds where it is by the timestep.
    ours.set_timesteps(8)
    x = torch.randn(2, 3)
    ours.step(x, times(ours.timesteps[3]), x)
    assert ours.step_index == 4


@pytest.mark.parametrize("times", [int, lambda t: t.clone()], ids=["int", "clone"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_whole_timesteps_of_any_type(name: str, times: Any) -> None:
    want = _run(getattr(diffusers, name)(), times=int)
    assert _error(_run(CLASSES[name](), times=times), want) < 1e-5


def test_ddim_steps_at_timesteps_that_are_not_its_own() -> None:
    theirs, ours = diffusers.DDIMScheduler(), drop_in.DDIMScheduler()
    x = torch.randn(2, 3, 4, 4)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for t in (3, 417, torch.tensor(55)):
        want = theirs.step(_model(x), t, x).prev_sample
        assert torch.allclose(ours.step(_model(x), t, x).prev_sample, want, rtol=1e-5, atol=1e-6)


def test_ddpm_without_set_timesteps() -> None:
    theirs, ours = diffusers.DDPMScheduler(), drop_in.DDPMScheduler()
    x = torch.randn(2, 3, 4, 4)
    for t in (999, 412, 0):
        want = theirs.step(x, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        got = ours.step(x, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    ours.set_timesteps(10)
    with pytest.raises(IndexError, match="timestep 7 is none of the scheduler's"):
        ours.step(x, 7, x)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances(variance_type: str) -> None:
    theirs, ours = (
        kind(variance_type=variance_type)
        for kind in (diffusers.DDPMScheduler, drop_in.DDPMScheduler)
    )
    x, output = torch.randn(2, 3, 4, 4), torch.rand(2, 6, 4, 4)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for t in theirs.timesteps:
        want = theirs.step(output, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        got = ours.step(output, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs 6 channels of the model's output, got 3"):
        ours.step(x, 0, x)
    kept = diffusers.DPMSolverMultistepScheduler(variance_type="learned")
    mine = drop_in.DPMSolverMultistepScheduler(variance_type="learned")
    for scheduler in (kept, mine):
        scheduler.set_timesteps(5)
    want, got = (s.step(output, s.timesteps[0], x).prev_sample for s in (kept, mine))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_signatures_are_the_librarys(name: str) -> None:
    theirs, ours = getattr(diffusers, name), CLASSES[name]
    for method in ("__init__", "step", "set_timesteps"):
        want, got = (inspect.signature(getattr(c, method)).parameters for c in (theirs, ours))
        assert [(p.name, p.default) for p in got.values()] == [
            (p.name, p.default) for p in want.values()
        ]
    for method in ("add_noise", "scale_noise", "scale_model_input"):
        assert hasattr(ours, method) == hasattr(theirs, method)


@pytest.mark.parametrize("name", FILES)
def test_configurations_go_both_ways(name: str, tmp_path) -> None:
    theirs, ours = getattr(diffusers, name), CLASSES[name]
    theirs(num_train_timesteps=500).save_config(tmp_path / "theirs")
    mine = ours.from_pretrained(tmp_path / "theirs")
    assert type(mine) is ours
    assert mine.config.num_train_timesteps == 500
    mine.save_config(tmp_path / "ours")
    back = theirs.from_pretrained(tmp_path / "ours")
    assert type(back) is theirs
    assert {**back.config} == {**theirs.from_pretrained(tmp_path / "theirs").config}
    assert type(ours.from_config(back.config)) is ours
    assert type(theirs.from_config(mine.config)) is theirs


def test_a_configuration_of_another_scheduler() -> None:
    euler = diffusers.EulerDiscreteScheduler(beta_start=0.001, timestep_spacing="trailing")
    mine = drop_in.DPMSolverMultistepScheduler.from_config(euler.config, use_karras_sigmas=True)
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(euler.config, use_karras_sigmas=True)
    assert {**mine.config} == {**theirs.config}
    assert _error(_run(mine), _run(theirs)) < 1e-5


NOISED = [
    *_with("DDPMScheduler", {}),
    *_with("EulerDiscreteScheduler", {}),
    *_with("DPMSolverMultistepScheduler", {}, {"use_flow_sigmas": True}),
    *_with("SASolverScheduler", {}),
    *_with("EDMEulerScheduler", {}),
    *_with("FlowMatchEulerDiscreteScheduler", {}),
]


@pytest.mark.parametrize("case", NOISED, ids=_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_for_samples(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    name, made = case
    if made:
        made = {**made, "prediction_type": "flow_prediction"}
    x, noise = torch.randn(3, 4, 5).to(dtype), torch.randn(3, 4, 5).to(dtype)
    results = []
    for kind in (getattr(diffusers, name), CLASSES[name]):
        scheduler = kind(**made)
        add = scheduler.scale_noise if name.startswith("Flow") else scheduler.add_noise
        if name.startswith("Flow"):

            def add(a, n, t, scale=scheduler.scale_noise):
                return scale(a, t, n)

        made_noise = []
        for _ in range(2):  # before set_timesteps, as in training, and after
            t = scheduler.timesteps[[1, 5, 3]]
            t = t.long() if name in ("DDPMScheduler", "SASolverScheduler") else t
            made_noise += [
                add(x, noise, t),
                add(x[:1], noise[:1], t[:1]),
                add(x, noise, t[:1].expand(3)),
            ]
            scheduler.set_timesteps(10)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(4)
            made_noise.append(add(x, noise, scheduler.timesteps[4:5].expand(3)))
        results.append(made_noise)
    close = {"rtol": 2e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, **close)


class NoSynchronising(TorchDispatchMode):
    """What would wait for a device, if the tensors were on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::is_nonzero",
            "aten::equal",
        ):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FILES)
def test_steps_read_nothing_back(name: str) -> None:
    scheduler = CLASSES[name]()
    want = _run(scheduler)  # which also fills the table, as any first step does
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).float()
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    timesteps = scheduler.timesteps
    with NoSynchronising():
        with pytest.raises(AssertionError, match="waits"):
            float(x[0, 0, 0, 0])
        for t in timesteps:
            model_input = x
            if hasattr(scheduler, "scale_model_input"):
                model_input = scheduler.scale_model_input(x, t)
            x = scheduler.step(_model(model_input), t, x, return_dict=False, **options)[0]
        if hasattr(scheduler, "add_noise"):
            scheduler.add_noise(x, x, timesteps[:1].expand(2).clone())
    assert torch.equal(x, want[-1][0])


def test_places_of_timesteps() -> None:
    own = torch.tensor([9.0, 5.0, 5.0, 1.0])
    asked = torch.tensor([5.0, 9.0, 1.0, 4.0])
    assert find(asked, own, missing_is_last=False).tolist() == [2, 0, 3, -1]
    assert find(asked, own, missing_is_last=True).tolist() == [2, 0, 3, 3]


@pytest.mark.parametrize("name", FILES)
def test_runs_on_a_device_that_can_not_be_read(name: str) -> None:
    """Tensors on the meta device have no values: whatever asks for one fails."""
    scheduler = CLASSES[name]()
    _run(scheduler, steps=6)  # makes the table, for which the schedule is read
    scheduler.set_timesteps(6)
    state = vars(scheduler)["_tabled"]
    scheduler.timesteps = state.timesteps = scheduler.timesteps.to("meta")
    state.made_from["timesteps"] = scheduler.timesteps
    state._look()
    state.own = (scheduler.timesteps.dtype, scheduler.timesteps.device)
    x = torch.empty(2, 3, 4, device="meta")
    with pytest.raises(RuntimeError):
        float(scheduler.timesteps[0])
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(x, t, x, return_dict=False)[0]
        assert getattr(scheduler, "step_index", i + 1) == i + 1
    if hasattr(scheduler, "add_noise"):
        scheduler.add_noise(x, x, scheduler.timesteps[:1].expand(2).clone())
    scheduler.set_timesteps(6)  # on the CPU, and asked for timesteps on the device
    for t in scheduler.timesteps.to("meta"):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(x, t, x, return_dict=False)[0]


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_steps_counted_on_the_device(name: str, monkeypatch) -> None:
    """The index as a tensor, as it is for timesteps that can't be known without asking a device."""
    want = _run(CLASSES[name]())
    kind = CLASSES[name]
    monkeypatch.setattr(kind, "_locate", lambda self, t, state=None: self._locate_on_device(t))
    assert _error(_run(kind(), times=lambda t: t.clone()), want) == 0
    if name == "UniPCMultistepScheduler":  # its first steps depend on where it begins
        scheduler = kind()
        scheduler.set_timesteps(8)
        x = torch.randn(2, 3)
        with pytest.raises((IndexError, RuntimeError), match="step must be from"):
            scheduler.step(x, scheduler.timesteps[2], x)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler"]
)
def test_a_batch_that_changes(name: str) -> None:
    scheduler = CLASSES[name]()
    scheduler.set_timesteps(5)
    x = torch.randn(2, 3, 4)
    for t in scheduler.timesteps[:2]:
        scheduler.step(_model(x), t, x)
    with pytest.raises(
        ValueError, match=r"in the middle of samples of shape \(2, 3, 4\), got \(1, 3, 4\)"
    ):
        scheduler.step(x[:1], scheduler.timesteps[2], x[:1])
    alone = _run(CLASSES[name](), shape=(5, 3))
    assert _error(_run(scheduler, shape=(5, 3)), alone) == 0


@pytest.mark.parametrize("stochastic", [False, True])
def test_tokens_at_timesteps_of_their_own(stochastic: bool) -> None:
    """As of videos that go on from given frames: these are clean from the start."""
    name, results = "FlowMatchEulerDiscreteScheduler", []
    for library in (diffusers, drop_in):
        scheduler = getattr(library, name)(shift=3.0, stochastic_sampling=stochastic)
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(2, 7, 4, generator=generator)
        given = torch.rand(2, 7, generator=generator) < 0.4
        outputs = []
        with NoSynchronising() if library is drop_in else contextlib.nullcontext():
            for i, t in enumerate(scheduler.timesteps):
                per_token = torch.where(given, t * 0.3, t)
                x = scheduler.step(
                    _model(x), t, x, generator=generator, per_token_timesteps=per_token
                ).prev_sample
                outputs.append((x,))
                assert scheduler.step_index == i + 1
        results.append(outputs)
    assert _error(*reversed(results)) == 0


def test_a_counter_that_is_set_back() -> None:
    """What is remembered belongs to one sequence: any other step begins anew."""
    scheduler = drop_in.DPMSolverMultistepScheduler()
    want = _run(scheduler, begin=3)
    _run(scheduler)
    scheduler._step_index = None
    scheduler.set_begin_index(3)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).float()
    for t, (expected,) in zip(scheduler.timesteps[3:], want, strict=True):
        x = scheduler.step(_model(x), t, x).prev_sample
        assert torch.equal(x, expected)
    with pytest.raises(IndexError, match="the schedule is at its end; call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_histories_can_be_read_and_written() -> None:
    theirs, ours = diffusers.DPMSolverMultistepScheduler(), drop_in.DPMSolverMultistepScheduler()
    x = torch.randn(2, 3, 4)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(20)
        assert scheduler.model_outputs == [None, None]
        assert scheduler.lower_order_nums == 0
        for t in scheduler.timesteps[:3]:
            scheduler.step(_model(x), t, x)
        assert scheduler.lower_order_nums == 2
        assert scheduler.step_index == 3
    assert torch.allclose(ours.model_outputs[-1], theirs.model_outputs[-1], rtol=1e-5, atol=1e-6)
    other = torch.randn(2, 3, 4)
    for scheduler in (theirs, ours):
        scheduler.model_outputs[-1] = other.clone()
    want, got = (s.step(_model(x), s.timesteps[3], x).prev_sample for s in (theirs, ours))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    for scheduler in (theirs, ours):
        scheduler.model_outputs = [None, None]
        scheduler.lower_order_nums = 0
    want, got = (s.step(_model(x), s.timesteps[4], x).prev_sample for s in (theirs, ours))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="lower_order_nums is 1 here and can be set to 0"):
        ours.lower_order_nums = 5


def _first_frames(scheduler: Any) -> None:
    """As pipelines do that go on with some frames of a video."""
    past = scheduler.ets if hasattr(scheduler, "ets") else scheduler.model_outputs
    for j, value in enumerate(past):
        if value is not None:
            past[j] = value[:, :, [0, -1]]
    for name in ("last_sample", "sample", "cur_sample", "cur_model_output"):
        if isinstance(value := getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, value[:, :, [0, -1]])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        ),
        ("UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverSinglestepScheduler", {}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("PNDMScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    ],
)
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_run_goes_on_with_some_frames(name: str, options: dict[str, Any], after: int) -> None:
    results = []
    for library in (diffusers, drop_in):
        scheduler = getattr(library, name)(**options)
        scheduler.set_timesteps(8)
        x = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
        for i, t in enumerate(scheduler.timesteps):
            if i == after:
                x = x[:, :, [0, -1]]
                _first_frames(scheduler)
            x = scheduler.step(_model(x), t, x).prev_sample
        results.append(x)
    assert results[1].shape == (1, 3, 2, 4)
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4)


def test_the_last_sample_can_be_read_and_replaced() -> None:
    theirs, ours = diffusers.UniPCMultistepScheduler(), drop_in.UniPCMultistepScheduler()
    x = torch.randn(2, 3, 4)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6)
        assert scheduler.last_sample is None
        for t in scheduler.timesteps[:2]:
            scheduler.step(_model(x), t, x)
    assert torch.allclose(ours.last_sample, theirs.last_sample, rtol=1e-5, atol=1e-5)
    other = torch.randn(2, 3, 4)
    for scheduler in (theirs, ours):
        scheduler.last_sample = other
    want, got = (s.step(_model(x), s.timesteps[2], x).prev_sample for s in (theirs, ours))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match="can be replaced by a tensor until the last step, got None"
    ):
        ours.last_sample = None


def test_a_memory_of_two_shapes_is_refused() -> None:
    scheduler = drop_in.UniPCMultistepScheduler()
    scheduler.set_timesteps(6)
    x = torch.randn(2, 3, 4)
    for t in scheduler.timesteps[:3]:
        scheduler.step(_model(x), t, x)
    scheduler.last_sample = torch.randn(2, 3, 2)
    for sample in (x, x[..., :2]):
        with pytest.raises(ValueError, match=r"remembers tensors of \(2, 3, 2\), \(2, 3, 4\)"):
            scheduler.step(_model(sample), scheduler.timesteps[3], sample)
    scheduler.last_sample = torch.randn(2, 3, 4)
    scheduler.step(_model(x), scheduler.timesteps[3], x)
    with pytest.raises(ValueError, match=r"samples of shape \(2, 3, 4\), got \(2, 3, 2\)"):
        scheduler.step(_model(x[..., :2]), scheduler.timesteps[4], x[..., :2])


def test_numbers_changed_by_hand() -> None:
    theirs, ours = diffusers.EulerDiscreteScheduler(), drop_in.EulerDiscreteScheduler()
    x = torch.randn(2, 3, 4)
    for change in ("sigmas", "sigmas", "config"):
        results = []
        for scheduler in (theirs, ours):
            if change == "config":
                scheduler.register_to_config(prediction_type="v_prediction")
            else:
                scheduler.set_timesteps(6)
                scheduler.step(x, scheduler.timesteps[0], x)
                scheduler.sigmas[2] *= 1.1
            scheduler._step_index = None
            results.append(scheduler.step(x, scheduler.timesteps[1], x).prev_sample)
        assert torch.allclose(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FILES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Dtypes are the library's, and the numbers not further from the exact ones than its own."""
    config = {"num_train_timesteps": 200}
    want = _run(CLASSES[name](**config), dtype=dtype)
    other = _run(getattr(diffusers, name)(**config), dtype=dtype)
    for ours, theirs in zip(want, other, strict=True):
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        assert all(bool(t.isfinite().all()) for t in ours)


def test_noise_from_a_seed() -> None:
    scheduler = drop_in.DDPMScheduler()
    scheduler.use_philox(7)
    assert _error(_run_seeded(scheduler), _run_seeded(scheduler)) == 0
    first = _run_seeded(scheduler)
    scheduler.use_philox(8)
    assert _error(_run_seeded(scheduler), first) > 0.1
    scheduler.use_philox(torch.tensor([7, 9]))
    alone = _run_seeded(scheduler)
    assert not torch.equal(alone[0][0][0], alone[0][0][1])
    scheduler.use_philox(None)
    torch.manual_seed(1)
    again = _run_seeded(scheduler)
    torch.manual_seed(1)
    assert _error(again, _run_seeded(diffusers.DDPMScheduler())) < 1e-5


def _run_seeded(scheduler: Any) -> list[tuple[Tensor, ...]]:
    scheduler.set_timesteps(5)
    x = torch.ones(2, 3, 4)
    outputs = []
    for t in scheduler.timesteps:
        outputs.append(scheduler.step(_model(x), t, x, return_dict=False))
        x = outputs[-1][0]
    return outputs


def test_noise_that_is_given() -> None:
    x, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for name, made, options in (
        ("DDIMScheduler", {}, {"eta": 0.5}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ):
        results = []
        for kind in (getattr(diffusers, name), CLASSES[name]):
            scheduler = kind(**made)
            scheduler.set_timesteps(5)
            t = scheduler.timesteps[0]
            results.append(scheduler.step(x, t, x, variance_noise=noise, **options).prev_sample)
        assert torch.allclose(*results, rtol=1e-5, atol=1e-5)
    both = {"generator": torch.Generator(), "variance_noise": noise}
    scheduler = drop_in.DDIMScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5, **both)


def test_a_generator_per_sample() -> None:
    results = []
    for kind in (
        diffusers.EulerAncestralDiscreteScheduler,
        drop_in.EulerAncestralDiscreteScheduler,
    ):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        results.append(_run(kind(), step={"generator": generators}))
    assert _error(*results) < 1e-5


TRACKED = [
    *((name, {}) for name in FILES),
    ("DDIMScheduler", {"step": {"eta": 0.5}, "clip_sample": False}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
]


@pytest.mark.parametrize("case", TRACKED, ids=_name)
def test_gradients_of_whole_runs(case: tuple[str, dict[str, Any]]) -> None:
    name, config = case
    made, more = _split(config)
    results = []
    with diffusers_float64.double():
        theirs = getattr(diffusers_float64.module(FILES[name]), name)
        schedulers = theirs(**made), _doubled(theirs)(**made)
    for scheduler in schedulers:
        for _ in range(2):  # the second run knows nothing of the graph of the first
            with diffusers_float64.double():
                scheduler.set_timesteps(6)
            start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
            weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
            x = first = start.double().requires_grad_()
            options = dict(more.get("step", {}))
            if "generator" in inspect.signature(scheduler.step).parameters:
                options["generator"] = torch.Generator().manual_seed(2)
            with torch.enable_grad():
                for t in scheduler.timesteps:
                    scaled = x
                    if hasattr(scheduler, "scale_model_input"):
                        scaled = scheduler.scale_model_input(x, t)
                    output = torch.tanh(weight * scaled + 0.1)
                    with diffusers_float64.double():
                        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
                gradients = torch.autograd.grad((x * x.detach().cos()).sum(), [first, weight])
        results.append([x.detach(), *gradients])
    for got, want in zip(results[1], results[0], strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-9


def test_gradients_of_both_outputs_and_without_any() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    for name, index in (("DDPMScheduler", 1), ("LCMScheduler", 1), ("EulerDiscreteScheduler", 1)):
        gradients = []
        for library in (diffusers, drop_in):
            scheduler = getattr(library, name)()
            scheduler.set_timesteps(5)
            t = scheduler.timesteps[-2]
            scheduler.scale_model_input(x.detach(), t)
            with torch.enable_grad():
                output = scheduler.step(0.2 * x, t, x, return_dict=False)[index]
                gradients += torch.autograd.grad(output.sum(), x)
            assert not scheduler.step(x, t, x, return_dict=False)[0].requires_grad
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_gradients_of_some_steps(name: str) -> None:
    """Steps without gradients, in between, take their place in the history."""
    results = []
    for library in (diffusers, drop_in):
        scheduler = getattr(library, name)(solver_order=3)
        scheduler.set_timesteps(16)
        weight = torch.tensor(0.3, requires_grad=True)
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
        for i, t in enumerate(scheduler.timesteps[:8]):
            with torch.set_grad_enabled(i in (1, 2, 4, 7)):
                output = torch.tanh(weight * x + 0.1)
                x = scheduler.step(output, t, x, return_dict=False)[0]
            assert x.requires_grad == (i in (1, 2, 4, 7))
        with torch.enable_grad():
            results.append((x.detach(), *torch.autograd.grad(x.sum(), weight)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_gradients_of_noising() -> None:
    for name in ("DDPMScheduler", "EulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
        x, noise = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
        results = []
        for library in (diffusers, drop_in):
            scheduler = getattr(library, name)()
            scheduler.set_timesteps(5)
            t = scheduler.timesteps[:1]
            noising = getattr(scheduler, "add_noise", None)
            with torch.enable_grad():
                if noising is None:
                    noisy = scheduler.scale_noise(x, t[0], noise)
                else:
                    noisy = noising(x, noise, t)
                results.append(torch.stack(torch.autograd.grad(noisy.sum(), [x, noise])))
        torch.testing.assert_close(*results)


def test_last_steps_that_the_library_gets_wrong() -> None:
    for final in ("zero", "sigma_min"):
        made = {"solver_type": "bh1", "final_sigmas_type": final, "lower_order_final": False}
        for outputs in _run(drop_in.UniPCMultistepScheduler(**made)):
            assert bool(outputs[0].isfinite().all())
    flow = drop_in.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    assert bool(_run(flow, steps=1)[0][0].isfinite().all())
    assert flow.sigmas.tolist() == [1.0, 0.0]
    unipc = drop_in.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", shift_terminal=0.1
    )
    assert bool(_run(unipc, steps=1)[0][0].isfinite().all())
    large = _run(drop_in.DDPMScheduler(variance_type="fixed_large_log"))
    assert _error(large, _run(drop_in.DDPMScheduler(variance_type="fixed_large"))) == 0


REFUSED = [
    ("SASolverScheduler", {"corrector_order": 13}, "corrector_order=13 is not .* be 1 to 12"),
    ("SASolverScheduler", {"predictor_order": 0}, "predictor_order=0 is not .* be 1 to 12"),
]


@pytest.mark.parametrize(("name", "made", "message"), REFUSED)
def test_options_that_are_refused(name: str, made: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLASSES[name](**made)
    theirs = getattr(diffusers, name)(**made)
    with pytest.raises(ValueError, match=message):
        drop_in.patch(theirs)
    assert type(theirs) is getattr(diffusers, name)


def test_sa_solver_of_orders_that_the_library_stops_at() -> None:
    made = {"predictor_order": 6, "corrector_order": 7, "tau_func": lambda t: 0.0}
    runs = [_run(library.SASolverScheduler(**made), steps=4) for library in (drop_in, diffusers)]
    assert _error(*runs) < 2e-4
    with pytest.raises(AssertionError):
        _run(diffusers.SASolverScheduler(**made), steps=8)
    assert bool(_run(drop_in.SASolverScheduler(**made), steps=8)[-1][0].isfinite().all())


def test_unipc_of_orders_that_no_table_has() -> None:
    made = {"solver_order": 13}
    runs = [_run(library.UniPCMultistepScheduler(**made)) for library in (drop_in, diffusers)]
    assert _error(*runs) == 0
    scheduler = drop_in.UniPCMultistepScheduler(**made)
    _run(scheduler)
    assert [value is None for value in scheduler.model_outputs] == [True] * 5 + [False] * 8
    assert scheduler.lower_order_nums == 8


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("times", [[0, 1000, 1], [-1]])
def test_noise_at_timesteps_that_are_none(backend: str | None, times: list[int]) -> None:
    x, t = torch.randn(len(times), 4), torch.tensor(times)
    wrong = -1 if times == [-1] else 1000
    with mmfast.use_backend(backend) if backend else contextlib.nullcontext():
        with pytest.raises(IndexError, match=f"timesteps must be from 0 to 999, got {wrong}"):
            drop_in.DDIMScheduler().add_noise(x, x, t)
        with pytest.raises(IndexError, match=f"timestep {wrong} is none of the scheduler's"):
            drop_in.EulerDiscreteScheduler().add_noise(x, x, t)
    with pytest.raises(TypeError, match=r"timesteps must be integers, got torch\.float32"):
        drop_in.DDIMScheduler().add_noise(x, x, t + 0.5)


def test_calls_that_are_refused() -> None:
    x = torch.randn(2, 3, 4)
    flow = drop_in.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    heun = drop_in.FlowMatchHeunDiscreteScheduler()
    heun.set_timesteps(4)
    with pytest.raises(ValueError, match="Passing integer indices"):
        flow.step(x, 3, x)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        drop_in.UniPCMultistepScheduler().step(x, 3, x)
    with pytest.raises(ValueError, match="model_output must have shape"):
        flow.step(x[:1], flow.timesteps[0], x)
    deis = drop_in.DEISMultistepScheduler(use_flow_sigmas=True, use_exponential_sigmas=True)
    deis.set_timesteps(4)
    between = "use_flow_sigmas=True takes sigmas of 0 to 1, .* use_exponential_sigmas=True: set"
    with pytest.raises(ValueError, match=between):
        deis.step(x, deis.timesteps[0], x)
    lms = drop_in.LMSDiscreteScheduler()
    lms.set_timesteps(4)
    with pytest.raises(TypeError, match=r"order must be an int, got 2\.0"):
        lms.step(x, lms.timesteps[0], x, order=2.0)
    with pytest.raises(ValueError, match="order must be from 1 to 12, got 0"):
        lms.step(x, lms.timesteps[0], x, order=0)
    heun.set_begin_index(3)
    with pytest.raises(ValueError, match="it can begin at an even index, got 3"):
        heun.step(x, heun.timesteps[3], x)


@pytest.mark.parametrize("name", FILES)
def test_patch_and_undo(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    want = _run(getattr(diffusers, name)())
    report = drop_in.patch(scheduler)
    assert type(scheduler) is CLASSES[name]
    assert isinstance(scheduler, getattr(diffusers, name))
    assert "1 of 1 schedulers run on mmfast" in str(report)
    assert _error(_run(scheduler), want) < 1e-5
    assert drop_in.patch(scheduler).swapped  # a second patch changes nothing
    report.undo()
    report.undo()
    assert type(scheduler) is getattr(diffusers, name)
    assert _error(_run(scheduler), want) == 0


def test_copies_and_pickles() -> None:
    scheduler = drop_in.DPMSolverMultistepScheduler()
    want = _run(scheduler)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(other) is type(scheduler)
        assert _error(_run(other), want) == 0


def _tau(t: float) -> float:
    return 1.0 if 200 <= t <= 800 else 0.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("name", FILES)
def test_copies_go_on_with_a_run(name: str, copied: Any) -> None:
    steps = 8
    if name == "DPMSolverSinglestepScheduler":
        steps = 7  # three steps in, a group of two is open
    options = {"tau_func": _tau} if name == "SASolverScheduler" else {}  # theirs is no global one
    scheduler = CLASSES[name](**options)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(_model(x), t, x, return_dict=False)[0]
    other = copied(scheduler)
    results = []
    for each in (scheduler, other):
        torch.manual_seed(0)
        y = x
        for t in each.timesteps[3:]:
            y = each.step(_model(y), t, y, return_dict=False)[0]
        results.append(y)
    assert torch.equal(*results)
    # Where timesteps of the first were, others may lie; the copy goes by its own.
    assert other._tabled.addresses.keys() != scheduler._tabled.addresses.keys()


def test_what_can_not_be_patched() -> None:
    class Own(diffusers.DDPMScheduler):
        pass

    with pytest.raises(
        ValueError, match="CMStochasticIterativeScheduler: the class is not supported"
    ):
        drop_in.patch(diffusers.CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match="Own"):
        drop_in.patch(Own())
    with pytest.raises(ValueError, match="no scheduler of Linear can be swapped"):
        drop_in.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got int; a pipeline or a scheduler of diffusers can be"):
        mmfast.integrations.patch(3)


@pytest.fixture(scope="module")
def unet(one_thread):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "PNDM"])
def test_pipelines_make_the_same_images(kind: str, unet, tmp_path) -> None:
    pipeline_class = getattr(diffusers, f"{kind}Pipeline", diffusers.DDIMPipeline)
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    if not hasattr(diffusers, f"{kind}Pipeline"):
        pytest.skip(f"this version has no {kind}Pipeline")
    pipeline = pipeline_class(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Any:
        generator = torch.Generator().manual_seed(3)
        made = pipeline(2, generator=generator, num_inference_steps=6, output_type="np").images
        return torch.from_numpy(made)

    before = images()
    with mmfast.integrations.patch(pipeline) as report:
        assert type(pipeline.scheduler) is CLASSES[f"{kind}Scheduler"]
        names = [entry.name for entry in report.swapped]
        assert names == ["unet.mid_block.attentions.0", "scheduler"]
        assert torch.allclose(images(), before, atol=1e-5)
        pipeline.save_pretrained(tmp_path)
        saved = pipeline_class.from_pretrained(tmp_path).scheduler
        assert type(saved) is getattr(diffusers, f"{kind}Scheduler")
    assert type(pipeline.scheduler) is getattr(diffusers, f"{kind}Scheduler")
    assert torch.equal(images(), before)
    drop_in.patch(pipeline)
    mmfast.integrations.unpatch(pipeline)
    assert type(pipeline.scheduler) is getattr(diffusers, f"{kind}Scheduler")
    with pytest.raises(ValueError, match="is patched"):
        mmfast.integrations.unpatch(pipeline)


def test_a_pipeline_made_with_one(unet, tmp_path) -> None:
    pipeline = diffusers.DDIMPipeline(unet=unet, scheduler=drop_in.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.DDIMScheduler
    assert math.isclose(again.scheduler.config.beta_end, 0.02)


def _before_and_after(pipeline: Any, **call: Any) -> tuple[Tensor, Tensor]:
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for patched in (False, True):
        if patched:
            mmfast.integrations.patch(pipeline)
        generator = torch.Generator().manual_seed(3)
        made = pipeline(**call, generator=generator, output_type="np").images
        images.append(torch.from_numpy(made))
    return images[0], images[1]


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    ],
)
def test_pipelines_from_an_image(name: str, made: dict[str, Any], one_thread) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 2}
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        **blocks,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **blocks,
    )
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae,
        unet=model,
        scheduler=getattr(diffusers, name)(beta_schedule="scaled_linear", **made),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    before, after = _before_and_after(
        pipeline,
        image=torch.rand(1, 3, 16, 16),
        strength=0.7,
        prompt_embeds=torch.randn(1, 7, 16),
        negative_prompt_embeds=torch.randn(1, 7, 16),
        num_inference_steps=6,
    )
    assert torch.allclose(after, before, atol=1e-5)


def test_pipelines_with_sigmas_of_their_own(one_thread) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        transformer=model,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    before, after = _before_and_after(
        pipeline,
        prompt_embeds=torch.ones(1, 5, 32),
        pooled_prompt_embeds=torch.ones(1, 32),
        num_inference_steps=4,
        height=8,
        width=8,
    )
    assert torch.allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_tangents(name: str) -> None:
    """Of noising and of steps, in the dtype of their tensors."""
    x, direction = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    noise, found = torch.randn(2, 3, 4), []
    for library in (diffusers, drop_in):
        scheduler = getattr(library, name)()
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[-1]

        def both(x: Tensor, scheduler: Any = scheduler, t: Any = t) -> tuple[Tensor, Tensor]:
            noisy = scheduler.add_noise(x, noise, torch.tensor([3, 5]))
            return noisy, scheduler.step(_model(x), t, x, return_dict=False)[0]

        with torch.autograd.forward_ad.dual_level():
            made = both(torch.autograd.forward_ad.make_dual(x, direction))
            found.append([torch.autograd.forward_ad.unpack_dual(each).tangent for each in made])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)
