"""What schedulers of diffusers show, and take, between the calls of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

import diffusers_float64  # noqa: E402
from test_integrations_schedulers import CASES, FILES, _doubled, _model, _name, _split  # noqa: E402

import mmfast  # noqa: E402
import mmfast.integrations.diffusers as drop_in  # noqa: E402
from mmfast.integrations.diffusers.schedulers import CLASSES  # noqa: E402

NAMES = ("sample", "dt", "prev_derivative", "state_in_first_order")
TWICE = [case for case in CASES if CLASSES[case[0]]._twice]
LEFT = {
    "DPMSolverSinglestepScheduler": ("sample",),
    "PNDMScheduler": ("cur_sample", "cur_model_output", "counter"),
    "UniPCMultistepScheduler": ("last_sample", "timestep_list", "this_order", "lower_order_nums"),
    "SASolverScheduler": (
        "last_sample",
        "last_noise",
        "timestep_list",
        "this_predictor_order",
        "this_corrector_order",
        "lower_order_nums",
    ),
}
ABSENT = "absent"


def _shown(scheduler: Any, names: Iterable[str] = NAMES) -> dict[str, Any]:
    shown = {name: getattr(scheduler, name, ABSENT) for name in names}
    copies = {list: list.copy, Tensor: Tensor.clone}  # the library adds to some in place
    return {name: copies.get(type(it), lambda it: it)(it) for name, it in shown.items()}


def _check(got: dict[str, Any], want: dict[str, Any], error: float) -> None:
    for name, value in want.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(got[name], value, rtol=error, atol=error)
        else:
            assert got[name] is value or got[name] == value, name


def _run(scheduler: Any, dtype: torch.dtype, step: dict[str, Any], at: Any) -> Tensor:
    """The result; ``at`` is called with the scheduler after each step."""
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
    x = x * float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else x
    if "generator" in type(scheduler).step.__code__.co_varnames:
        step = {**step, "generator": generator}
    for i, t in enumerate(scheduler.timesteps):
        at(scheduler, i)
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "init_noise_sigma") else x
        x = scheduler.step(_model(scaled), t, x, **step, return_dict=False)[0]
    at(scheduler, len(scheduler.timesteps))
    return x


def _both(
    name: str, made: dict[str, Any], step: dict[str, Any], names: Iterable[str], runs: int = 1
) -> list[list[dict[str, Any]]]:
    """What the library's scheduler and ours show around every step, in double precision."""
    seen: list[list[dict[str, Any]]] = []
    with diffusers_float64.double():
        theirs = getattr(diffusers_float64.module(FILES[name]), name)
        for kind in (theirs, _doubled(theirs)):
            shown: list[dict[str, Any]] = []
            scheduler = kind(**made)
            for _ in range(runs):
                _run(
                    scheduler,
                    torch.float64,
                    step,
                    lambda s, i, to=shown: to.append(_shown(s, names)),
                )
            seen.append(shown)
    return seen


@pytest.mark.parametrize("case", TWICE, ids=_name)
@torch.no_grad()
def test_attributes_are_the_librarys(case: tuple[str, dict[str, Any]]) -> None:
    """Before a run, after each call, and after the run."""
    name, config = case
    made, options = _split(config)
    # The second run begins as the first one did.
    want, got = _both(name, made, options.get("step", {}), NAMES, runs=2)
    again = len(want) // 2  # after set_timesteps, where the library has what was left
    assert sum(isinstance(each["sample"], Tensor) for each in want[:again]) == 5
    for i, (ours, library) in enumerate(zip(got, want, strict=True)):
        if i != again:
            _check(ours, library, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in FILES if CLASSES[name]._twice])
@torch.no_grad()
def test_attributes_keep_their_dtypes(name: str, dtype: torch.dtype) -> None:
    seen: list[list[dict[str, Any]]] = []
    for library in (diffusers, drop_in):
        shown: list[dict[str, Any]] = []
        _run(getattr(library, name)(), dtype, {}, lambda s, i, to=shown: to.append(_shown(s)))
        seen.append(shown)
    for ours, theirs in zip(*reversed(seen), strict=True):
        if dtype == torch.float32:
            _check(ours, theirs, 1e-4)
        for key, value in theirs.items():  # whose numbers are rounded many times
            if isinstance(value, Tensor):
                assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape)
                assert bool(ours[key].isfinite().all())


@pytest.mark.parametrize("changed", ["sample", "prev_derivative"])
@pytest.mark.parametrize("name", [name for name in FILES if CLASSES[name]._twice])
@torch.no_grad()
def test_what_is_set_is_gone_on_with(name: str, changed: str) -> None:
    if changed != "sample" and name.startswith("KDPM2"):
        pytest.skip("it has none")

    def change(scheduler: Any, i: int) -> None:
        if i == 3:
            setattr(scheduler, changed, 1.25 * getattr(scheduler, changed))
            assert not scheduler.state_in_first_order

    theirs, ours, plain = (
        _run(getattr(library, name)(), torch.float32, {}, at)
        for library, at in (
            (diffusers, change),
            (drop_in, change),
            (drop_in, lambda scheduler, i: None),
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in FILES if CLASSES[name]._twice])
@torch.no_grad()
def test_copies_between_the_calls(name: str) -> None:
    """They go on alike, and what is set to what it is changes nothing."""

    def at(scheduler: Any, i: int) -> None:
        if i != 3:
            return
        x, found = torch.ones_like(scheduler.sample), []
        for sets in (False, True):
            copied = copy.deepcopy(scheduler)
            _check(_shown(copied), _shown(scheduler), 0.0)
            assert copied.sample is not scheduler.sample
            if sets:
                copied.sample = copied.sample
            torch.manual_seed(0)
            found.append(copied.step(x, copied.timesteps[i], x, return_dict=False)[0])
            assert copied.sample is None
        torch.testing.assert_close(*found)
        assert scheduler.sample is not None

    _run(getattr(drop_in, name)(), torch.float32, {}, at)


@torch.no_grad()
def test_the_length_of_a_step_is_that_of_the_sigmas() -> None:
    def change(scheduler: Any, i: int) -> None:
        if i == 3:
            scheduler.dt = scheduler.dt
            with pytest.raises(ValueError, match=r"dt is that of the sigmas, -.*, got -1\.0"):
                scheduler.dt = -1.0

    for name in ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
        _run(getattr(drop_in, name)(), torch.float32, {}, change)


@torch.no_grad()
def test_reading_changes_nothing() -> None:
    """Not the numbers, and a run that reads between its calls does not begin anew."""
    for name in FILES:
        if CLASSES[name]._twice:
            read, unread = (
                _run(getattr(drop_in, name)(), torch.float32, {}, at)
                for at in (lambda s, i: _shown(s), lambda s, i: None)
            )
            assert torch.equal(read, unread), name


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in LEFT], ids=_name)
@torch.no_grad()
def test_what_steps_leave_is_the_librarys(case: tuple[str, dict[str, Any]]) -> None:
    name, config = case
    made, _ = _split(config)
    want, got = _both(name, made, {}, LEFT[name])
    if name != "PNDMScheduler" or config.get("skip_prk_steps"):
        assert isinstance(want[1][LEFT[name][0]], Tensor)
    for left in ("last_sample", "sample"):  # the last step keeps nothing for another one
        want[-1].pop(left, None)
    for ours, library in zip(got, want, strict=True):
        _check(ours, library, 1e-9)


@pytest.mark.parametrize(
    ("config", "changed", "at"),
    [
        (("DPMSolverSinglestepScheduler", {}), "sample", 1),
        (
            ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}),
            "sample",
            2,
        ),
        (("PNDMScheduler", {"skip_prk_steps": True}), "cur_sample", 1),
        (("PNDMScheduler", {}), "cur_sample", 2),
        (("PNDMScheduler", {}), "cur_model_output", 3),
        (("UniPCMultistepScheduler", {}), "last_sample", 2),
        (("SASolverScheduler", {}), "last_sample", 2),
        (("SASolverScheduler", {}), "last_noise", 2),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_steps_keep_can_be_replaced(
    config: tuple[str, dict[str, Any]], changed: str, at: int
) -> None:
    """The run goes on with it as the library's does."""
    name, made = config

    def change(scheduler: Any, i: int) -> None:
        if i == at:
            setattr(scheduler, changed, 1.25 * getattr(scheduler, changed))

    def keep(scheduler: Any, i: int) -> None:
        if i == at:
            setattr(scheduler, changed, getattr(scheduler, changed))

    theirs, ours, plain, kept = (
        _run(getattr(library, name)(**made), torch.float32, {}, at)
        for library, at in (
            (diffusers, change),
            (drop_in, change),
            (drop_in, lambda scheduler, i: None),
            (drop_in, keep),
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, plain, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_steps_do_not_keep_is_refused() -> None:
    def change(scheduler: Any, i: int) -> None:
        if i == 2:
            assert scheduler.cur_sample is None
            assert scheduler.cur_model_output == 0
            scheduler.cur_sample, scheduler.cur_model_output = None, 0
            for name in ("cur_sample", "cur_model_output"):
                with pytest.raises(ValueError, match=f"{name} is (None|0) after these steps"):
                    setattr(scheduler, name, torch.zeros(2, 3, 4))

    _run(drop_in.PNDMScheduler(skip_prk_steps=True), torch.float32, {}, change)
    for name, other in (("last_noise", "last_sample"), ("last_sample", "last_noise")):
        with pytest.raises(ValueError, match=rf"shape of {other}, \(2, 3, 4\), got \(3,\)"):
            _run(
                drop_in.SASolverScheduler(),
                torch.float32,
                {},
                lambda scheduler, i, name=name: i and setattr(scheduler, name, torch.zeros(3)),
            )
    with pytest.raises(ValueError, match=r"remembers tensors of \(2, 3, 4\), \(7, 7\)"):
        _run(
            drop_in.DPMSolverSinglestepScheduler(),
            torch.float32,
            {},
            lambda scheduler, i: i == 1 and setattr(scheduler, "sample", torch.zeros(7, 7)),
        )


@torch.no_grad()
def test_copies_keep_the_dtype() -> None:
    def at(scheduler: Any, i: int) -> None:
        if i == 1:
            for name in ("sample", "cur_sample"):
                if hasattr(scheduler, name):
                    assert getattr(copy.deepcopy(scheduler), name).dtype == torch.bfloat16

    for scheduler in (drop_in.DPMSolverSinglestepScheduler(), drop_in.PNDMScheduler()):
        _run(scheduler, torch.bfloat16, {}, at)


@torch.no_grad()
def test_the_last_noise_is_that_of_the_kernel() -> None:
    def at(scheduler: Any, i: int) -> None:
        if i:
            want = mmfast.randn((2, 3, 4), seed=7, offset=i - 1)
            for each in (copy.deepcopy(scheduler), scheduler):
                torch.testing.assert_close(each.last_noise, want, rtol=0, atol=0)

    scheduler = drop_in.SASolverScheduler()
    scheduler.use_philox(7)
    scheduler.set_timesteps(5)
    x = torch.ones(2, 3, 4)
    for i, t in enumerate(scheduler.timesteps):
        at(scheduler, i)
        x = scheduler.step(x, t, x, return_dict=False)[0]


@pytest.mark.parametrize("name", ["SASolverScheduler", "DPMSolverMultistepScheduler"])
@torch.no_grad()
def test_noise_of_the_kernel_goes_on(name: str) -> None:
    """It is that of a step's index, where a run is taken up in its middle too."""

    def made(scheduler: Any, change: bool = False) -> Tensor:
        scheduler.use_philox(7)
        scheduler.set_timesteps(6)
        x = torch.ones(2, 3, 4)
        for i, t in enumerate(scheduler.timesteps):
            if i == 4 and change:
                scheduler.sigmas = scheduler.sigmas * 1.0
            x = scheduler.step(x, t, x, return_dict=False)[0]
        return x

    options = {"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPM") else {}
    plain, changed = (made(getattr(drop_in, name)(**options), change) for change in (False, True))
    torch.testing.assert_close(changed, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_steps_leave_can_be_set_before_a_run() -> None:
    def change(scheduler: Any, i: int) -> None:
        if i == 0:
            scheduler.this_order = 1
        if i == 2:
            with pytest.raises(ValueError, match="this_order is what the steps so far make it"):
                scheduler.this_order = 1

    scheduler = drop_in.UniPCMultistepScheduler()
    _run(scheduler, torch.float32, {}, change)
    scheduler.set_timesteps(5)
    scheduler.this_order = 2
    assert scheduler.this_order == 2
