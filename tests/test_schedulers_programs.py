"""Schedulers of diffusers used as the library's own tests use them, with the numbers they publish.

Numbers: huggingface/diffusers, ``tests/schedulers/``: the sum of the absolute values at the end of
a loop over a ramp, for a model that returns x t / (t + 1).
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

import mmfast.integrations.diffusers as drop_in  # noqa: E402
from mmfast.integrations.diffusers import SCHEDULERS  # noqa: E402

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
SOLVER = {"solver_order": 2, "final_sigmas_type": "sigma_min"}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0}


def _ramp() -> Tensor:
    return (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def _model(x: Tensor, t: Any) -> Tensor:
    return x * t / (t + 1)


@pytest.fixture(autouse=True)
def _untracked():
    diffusers.utils.logging.set_verbosity_error()
    with torch.no_grad():
        yield


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "config", "steps", "total", "tolerance"),
    [
        ("DDPM", LINEAR, None, 258.9606, 1e-2),
        ("DDPM", LINEAR | V, None, 202.0296, 1e-2),
        ("DDIM", LINEAR, 10, 172.0067, 1e-2),
        ("DDIM", LINEAR | V, 10, 52.5302, 1e-2),
        ("DDIM", LINEAR | {"beta_start": 0.01}, 10, 149.8295, 1e-2),
        ("PNDM", LINEAR, 10, 198.1318, 1e-2),
        ("PNDM", LINEAR | V, 10, 67.3986, 1e-2),
        ("DPMSolverMultistep", LINEAR | SOLVER | {"lower_order_final": False}, 10, 253.55, 0.77),
        ("DPMSolverMultistep", LINEAR | SOLVER | V | {"lower_order_final": False}, 10, 172.9, 0.77),
        ("UniPCMultistep", LINEAR | SOLVER, 10, 189.24, 0.77),
        ("UniPCMultistep", LINEAR | SOLVER | V, 10, 77.88, 0.77),
        ("DEISMultistep", LINEAR | {"solver_order": 2}, 10, 183.67, 0.77),
        ("LCM", SCALED, 1, 18.7097, 1e-3),
        ("LCM", SCALED, 10, 197.7616, 1e-3),
        ("EDMEuler", EDM | {"num_train_timesteps": 256}, 10, 34.1855, 1e-3),
    ],
)  # where a mean is published, of 768 numbers: it times 768
def test_published_sums(name, config, steps, total, tolerance):
    scheduler = getattr(drop_in, f"{name}Scheduler")(**config)
    if steps is not None:
        scheduler.set_timesteps(steps)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.manual_seed(0)
    x = _ramp() * float(scheduler.init_noise_sigma)
    for t in reversed(range(1000)) if steps is None else scheduler.timesteps:
        y = scheduler.scale_model_input(x, t)
        x = scheduler.step(_model(y, t), t, x, **options).prev_sample
    assert float(x.abs().sum()) == pytest.approx(total, abs=tolerance)


SIGMAS = LINEAR | {"num_train_timesteps": 1100}
LATE = {"lower_order_final": False} | SOLVER


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "config", "steps", "start", "total", "tolerance"),
    [
        ("DDPM", LINEAR, None, 998, 387.9466, 1e-2),
        ("DDIM", LINEAR, 10, 8, 354.5418, 1e-2),
        ("EulerDiscrete", SIGMAS, 10, 8, 57062.9297, 0.1),
        ("EulerAncestralDiscrete", SIGMAS, 10, 8, 56163.0508, 0.1),
        ("HeunDiscrete", SIGMAS, 10, 8, 75074.8906, 0.1),
        ("LMSDiscrete", SIGMAS, 10, 8, 27663.6895, 0.1),
        ("KDPM2Discrete", SIGMAS, 10, 8, 70408.4062, 0.1),
        ("DEISMultistep", LINEAR | {"solver_order": 2}, 10, 8, 315.3016, 1e-2),
        ("DPMSolverMultistep", LINEAR | LATE, 10, 5, 318.4111, 1e-2),
        ("DPMSolverSinglestep", LINEAR | SOLVER, 10, 5, 269.2187, 1e-2),
        ("UniPCMultistep", LINEAR | SOLVER, 10, 8, 315.5757, 1e-2),
        ("EDMDPMSolverMultistep", EDM | LATE | {"sigma_data": 0.5}, 10, 5, 8.1661, 1e-2),
    ],
)
def test_published_sums_from_an_image(name, config, steps, start, total, tolerance):
    """The image is the ramp, in the models' scale, and the noise the ramp upside down."""
    scheduler = getattr(drop_in, f"{name}Scheduler")(**config)
    if steps is not None:
        scheduler.set_timesteps(steps)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters and "Solver" not in name:
        options["generator"] = torch.manual_seed(0)
    times = scheduler.timesteps[start * scheduler.order :]
    noise = (torch.arange(768).flip(-1) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    x = _ramp() if "Solver" in name else _ramp() * float(scheduler.init_noise_sigma)
    x = scheduler.add_noise(x, noise, times[:1])
    for t in times:
        # Those whose input is scaled go on with it, in the library's tests.
        x = x if "Solver" in name else scheduler.scale_model_input(x, t)
        x = scheduler.step(_model(x, t), t, x, **options).prev_sample
    assert float(x.abs().sum()) == pytest.approx(total, abs=tolerance)


def _both(name, config, times, **options):
    """What steps of ours and of the library's give at some timesteps, each from the same sample."""
    x = 10 * torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(1))
    made = []
    for library in (drop_in, diffusers):
        scheduler = getattr(library, f"{name}Scheduler")(**config)
        if name != "DDPM":
            scheduler.set_timesteps(10)
        outputs = []
        for t in times(scheduler.timesteps):
            if "generator" in inspect.signature(scheduler.step).parameters:
                options["generator"] = torch.manual_seed(0)
            outputs += scheduler.step(0.1 * x + 1, t, x, return_dict=False, **options)
        made.append(torch.stack(outputs))
    return made


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDPM", {"beta_start": 0.1, "beta_end": 2.0}),
        ("DDPM", {"rescale_betas_zero_snr": True}),
        ("DDIM", {"beta_start": 0.1, "beta_end": 2.0}),
        ("LCM", {"beta_start": 0.1, "beta_end": 2.0}),
        ("TCD", {"beta_start": 0.1, "beta_end": 2.0}),
    ],
)
def test_steps_of_schedules_that_others_spoil(name, config):
    """Betas above 1 leave no schedule, and no signal no sample: steps elsewhere do not care."""
    torch.testing.assert_close(*_both(name, config, lambda t: [t[-1]]), rtol=2e-5, atol=1e-5)
    config = config | {"clip_sample": False}
    with pytest.raises(ValueError, match="no step from timestep"):
        _both(name, config, lambda t: [t[0]])


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_noise_that_says_nothing_of_a_clipped_sample(name):
    """Divided by 0 and clipped, it is the sign of the difference."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    made = _both(name, config, lambda t: [t[0]])
    torch.testing.assert_close(*made, rtol=2e-5, atol=1e-5)
    assert bool((made[0][1].abs() == 1).all())


def test_variances_of_unknown_kinds():
    made = _both("DDPM", {"variance_type": "other"}, lambda t: [t[0], t[-1]])
    torch.testing.assert_close(*made, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["DDPM", "DDIM", "DEISMultistep", "DPMSolverMultistep", "UniPCMultistep", "SASolver", "LCM"],
)
@pytest.mark.parametrize("most", [0.5, 2.0])
def test_thresholds(name, most):
    config = {"thresholding": True, "sample_max_value": most}
    made = _both(name, config, lambda t: t[:4])
    torch.testing.assert_close(*made, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "LMSDiscrete"],
)
def test_equal_timesteps(name):
    """Of 25 steps for 25 trained timesteps two are the same. The library is lost after them."""
    x, runs = _ramp(), []
    for library in (drop_in, diffusers):
        scheduler = getattr(library, f"{name}Scheduler")(num_train_timesteps=25)
        scheduler.set_timesteps(25)
        y, outputs = x, []
        for t in scheduler.timesteps:
            scheduler.scale_model_input(y, t)
            y = scheduler.step(0.1 * y, t, y).prev_sample
            outputs.append(y)
        runs.append(outputs)
    same = next((i for i, y in enumerate(runs[1]) if not bool(y.isfinite().all())), 25)
    torch.testing.assert_close(runs[0][:same], runs[1][:same], rtol=2e-5, atol=1e-5)
    assert all(bool(y.isfinite().all()) for y in runs[0])


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "DEISMultistep",
        "UniPCMultistep",
        "EDMDPMSolverMultistep",
    ],
)
def test_a_history_of_strangers_before_a_run(name, tmp_path):
    """It is set and overwritten, on a scheduler and on one of its saved configuration."""
    residual = 0.1 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for library in (diffusers, drop_in):
        kind = getattr(library, f"{name}Scheduler")
        kind(solver_order=3).save_config(tmp_path)
        for scheduler in (kind(solver_order=3), kind.from_pretrained(tmp_path)):
            scheduler.set_timesteps(10)
            scheduler.model_outputs = [residual + 0.2, residual + 0.15, residual + 0.1]
            x = 10 * residual
            for t in scheduler.timesteps[:4]:
                x = scheduler.step(residual, t, x).prev_sample
            results.append(x)
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["PNDM", "IPNDM", "LMSDiscrete"])
def test_the_same_of_those_that_keep_it_elsewhere(name, tmp_path):
    kind = getattr(drop_in, f"{name}Scheduler")
    residual = 0.1 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    kind().save_config(tmp_path)
    results = []
    for scheduler in (kind(), kind.from_pretrained(tmp_path)):
        scheduler.set_timesteps(10)
        attribute = "derivatives" if name == "LMSDiscrete" else "ets"
        setattr(scheduler, attribute, [residual + 0.2, residual + 0.15, residual + 0.1])
        scheduler.scale_model_input(residual, scheduler.timesteps[0])
        x = 10 * residual
        for t in scheduler.timesteps[:4]:
            x = scheduler.step(residual, t, x).prev_sample
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep"])
def test_steps_at_numbers(name):
    """Timesteps as they come out of a loop over ints; a tuple holds what the object holds."""
    residual = 0.1 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for library in (diffusers, drop_in):
        for return_dict in (True, False):
            scheduler = getattr(library, f"{name}Scheduler")()
            scheduler.set_timesteps(10)
            x = 10 * residual
            for t in scheduler.timesteps.tolist()[:3]:
                options = {"generator": torch.manual_seed(0)} if name == "DDPM" else {}
                made = scheduler.step(residual, t, x, return_dict=return_dict, **options)
                x = made.prev_sample if return_dict else made[0]
            results.append(x)
            assert x.shape == residual.shape
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=2e-5, atol=1e-5)


def test_a_run_twice_that_goes_on_with_its_history():
    scheduler = drop_in.IPNDMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(10)
    x = _ramp()
    for _ in range(2):
        for t in scheduler.timesteps:
            x = scheduler.step(_model(x, t), t, x).prev_sample
        scheduler._step_index = None
    assert float(x.abs().mean()) == pytest.approx(2540529, abs=10)


@pytest.mark.parametrize("skip", [False, True])
def test_steps_of_pndm_by_name_and_anywhere(skip):
    residual = 0.1 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    past = [residual + 0.2, residual + 0.15, residual + 0.1, residual + 0.05]
    results = []
    for library in (diffusers, drop_in):
        outputs = []
        for given, calls in (
            (True, (("step_prk", 0), ("step_prk", 1), ("step_plms", 60), ("step_plms", 5))),
            (False, (("step", 980), ("step", 33), ("step", 7), ("step", 960))),
        ):
            scheduler = library.PNDMScheduler(skip_prk_steps=skip)
            scheduler.set_timesteps(50)
            if given:
                scheduler.ets = list(past)
            if skip and given:
                calls = calls[2:]
            for name, t in calls:
                outputs.append(getattr(scheduler, name)(residual, t, 10 * residual).prev_sample)
            scheduler.set_timesteps(10)
            x = 10 * residual
            for t in scheduler.timesteps[:5]:
                x = scheduler.step(residual, t, x).prev_sample
            outputs.append(x)
        results.append(torch.stack(outputs))
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_inputs_scaled_before_anything_is_set(name):
    """A whole number says where; steps alone refuse it, of those whose timesteps are not whole."""
    results = []
    for library in (diffusers, drop_in):
        scheduler = getattr(library, name)()
        if hasattr(scheduler, "scale_model_input"):
            t = 0.0 if scheduler.timesteps is None else float(scheduler.timesteps[0])
            t = int(t) if t.is_integer() else t
            results.append(scheduler.scale_model_input(_ramp(), t))
    if results:
        torch.testing.assert_close(*results, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"])
def test_a_call_after_the_last_changes_nothing(name):
    scheduler = getattr(drop_in, f"{name}Scheduler")()
    scheduler.set_timesteps(10)
    x = _ramp()
    ends = scheduler.step(0.1 * x, scheduler.timesteps[-1], x).prev_sample
    assert torch.equal(scheduler.step(0.1 * x, 1, ends).prev_sample, ends)
    with pytest.raises(IndexError, match="the schedule is at its end"):
        scheduler.step(0.1 * x, 1, ends)
