"""Schedulers of diffusers that are patched, restored or changed in the middle of a run."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import diffusers_float64  # noqa: E402
from test_integrations_schedulers import (  # noqa: E402
    CASES,
    FILES,
    _doubled,
    _error,
    _model,
    _name,
    _quiet,  # noqa: F401
    _run,
    _split,
)

import mmfast.integrations.diffusers as drop_in  # noqa: E402
from mmfast.integrations.diffusers.schedulers import CLASSES  # noqa: E402
from mmfast.integrations.diffusers.swapping import SchedulerSwap  # noqa: E402


def _before(calls: dict[int, Callable[[], Any]]) -> Callable[[Any], Any]:
    """Timesteps as they are, and something done before some of them."""
    count = itertools.count()

    def told(t: Any) -> Any:
        calls.get(next(count), lambda: None)()
        return t

    return told


@pytest.mark.parametrize("case", [case for case in CASES if CLASSES[case[0]]._remembers], ids=_name)
def test_runs_that_are_patched_and_restored(case: tuple[str, dict[str, Any]]) -> None:
    """The numbers of a run that nobody touched; with two calls a step, between them too."""
    name, config = case
    made, options = _split(config)
    with diffusers_float64.double():
        theirs = getattr(diffusers_float64.module(FILES[name]), name)
        scheduler = theirs(**made)
        want = _run(copy.deepcopy(scheduler), dtype=torch.float64, **options)
        swap = SchedulerSwap(scheduler, theirs, _doubled(theirs))
        changes = {1: swap.make, 2: swap.undo, 3: swap.make, 6: swap.undo}
        got = _run(scheduler, dtype=torch.float64, times=_before(changes), **options)
    assert type(scheduler) is theirs
    if not bool(want[-1][0].isfinite().all()):  # UniPC to sigma 0, without lower_order_final
        want, got = want[:-1], got[:-1]
    assert _error(got, want) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FILES)
def test_by_the_functions_of_a_program(name: str, dtype: torch.dtype) -> None:
    """``patch`` and ``undo``, and nothing stays behind. Steps keep their dtypes."""
    scheduler = getattr(diffusers, name)()
    other = copy.deepcopy(scheduler)
    want = _run(other, dtype=dtype)
    reports: list[Any] = []
    got = _run(
        scheduler,
        dtype=dtype,
        times=_before(
            {
                1: lambda: reports.append(drop_in.patch(scheduler)),
                4: lambda: reports[0].undo(),
            }
        ),
    )
    assert type(scheduler) is getattr(diffusers, name)
    assert vars(scheduler).keys() <= vars(other).keys()
    assert _error(got, want) < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("name", FILES)
def test_a_run_from_the_middle(name: str) -> None:
    """From an image: fewer steps to look back on than the index says."""
    outputs = []
    made = getattr(diffusers, name)()
    begin = 0 if name in ("DDPMScheduler", "PNDMScheduler") else 4
    for cuts in ((), (5, 6, 7)):
        scheduler = copy.deepcopy(made)
        swap = SchedulerSwap(scheduler, getattr(diffusers, name), CLASSES[name])
        changes = dict(zip(cuts, (swap.make, swap.undo, swap.make), strict=False))
        times = _before({cut - begin: change for cut, change in changes.items()})
        outputs.append(_run(scheduler, begin=begin, times=times))
    assert _error(outputs[1], outputs[0]) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in FILES
        if CLASSES[name]._remembers and name != "PNDMScheduler"  # of other numbers too
    ],
)
def test_numbers_changed_in_the_middle(name: str) -> None:
    """A schedule or an option that is changed by hand does not end a run."""

    def change(scheduler: Any) -> None:
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas * 1.01
        if "lower_order_final" in scheduler.config:
            scheduler.register_to_config(lower_order_final=not scheduler.config.lower_order_final)

    outputs = []
    for library in (diffusers, drop_in):
        scheduler = getattr(library, name)()
        # Between two steps, of those that make two calls for each.
        outputs.append(_run(scheduler, times=_before({4: lambda s=scheduler: change(s)}))[:-1])
    assert _error(outputs[1], outputs[0]) < 1e-5


@pytest.mark.parametrize("changed", ["sigmas_interpol", "sigmas_down", "sigmas_up"])
@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
@pytest.mark.parametrize("inplace", [False, True])
def test_other_numbers_changed_in_the_middle(name: str, changed: str, inplace: bool) -> None:
    def change(scheduler: Any) -> None:
        values = getattr(scheduler, changed)
        if inplace:
            values *= 0.98
        else:
            setattr(scheduler, changed, values * 0.98)

    if not hasattr(CLASSES[name](), changed):
        pytest.skip("it has none")
    outputs = []
    for library in (diffusers, drop_in):
        scheduler = getattr(library, name)()
        outputs.append(_run(scheduler, times=_before({4: lambda s=scheduler: change(s)})))
    assert _error(outputs[1], outputs[0]) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LMSDiscreteScheduler", ({"order": 4}, {"order": 3}, {"order": 2})),
        ("LMSDiscreteScheduler", ({"order": 2}, {"order": 4}, {"order": 1})),
        ("LMSDiscreteScheduler", ({"order": 1}, {"order": 3}, {"order": 4})),
        ("LMSDiscreteScheduler", ({"order": 3}, {"order": 1}, {"order": 4})),
        ("FlowMatchHeunDiscreteScheduler", ({"s_churn": 3.0}, {"s_churn": 0.0}, {"s_noise": 2.0})),
    ],
)
def test_options_changed_in_the_middle(name: str, options: tuple[dict[str, Any], ...]) -> None:
    outputs = []
    for library in (diffusers, drop_in):
        scheduler = getattr(library, name)()
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(3)
        drawn = "generator" in inspect.signature(scheduler.step).parameters
        more = {"generator": generator} if drawn else {}
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
        for i, t in enumerate(scheduler.timesteps):
            each = options[i // 2 % 3]  # the same for both calls of a step
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(_model(x), t, x, **each, **more).prev_sample
        outputs.append([(x,)])
    assert _error(outputs[1], outputs[0]) < 1e-5


def test_restored_after_steps_counted_on_the_device(monkeypatch) -> None:
    """The counter is read back then, and not before."""
    want = _run(diffusers.UniPCMultistepScheduler())
    kind = CLASSES["UniPCMultistepScheduler"]
    monkeypatch.setattr(kind, "_locate", lambda self, t, state=None: self._locate_on_device(t))
    scheduler = kind()
    swap = SchedulerSwap(scheduler, diffusers.UniPCMultistepScheduler, kind)

    def restore() -> None:
        assert isinstance(scheduler.step_index, torch.Tensor)
        assert swap.undo()

    assert _error(_run(scheduler, times=_before({4: restore})), want) < 1e-5
    assert scheduler.step_index == 8
