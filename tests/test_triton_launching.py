"""Launches that leave out Triton's binding, on a driver that compiles, and notes what would run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfast import backends

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("Triton interprets in this process", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from mmfast.kernels import launching, offline, sampler_step
from mmfast.schedule.layout import Layout
from mmfast.schedule.table import row_numbers


@triton.jit(do_not_specialize=["free"])
def _kernel(x_ptr, y_ptr, scale: tl.float64, size, free, FACTOR: tl.constexpr):
    o_n = tl.arange(0, 16)
    b_x = tl.load(x_ptr + o_n, mask=o_n < size, other=0.0) * scale.to(tl.float32) + free
    if y_ptr is not None:
        tl.store(y_ptr + o_n, b_x * FACTOR)


class Driver(offline._Driver):
    """One that launches: ``calls`` has grid, stream, function and arguments."""

    def __init__(self) -> None:
        super().__init__(offline.TARGETS["sm_90"])
        self.calls: list[tuple[Any, ...]] = []
        self.device, self.stream = 0, 7
        self.utils.load_binary = lambda name, *_: (name, object(), 32, 0, 1024)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def run(*arguments: Any) -> None:
            grid, (stream, function), rest = arguments[:3], arguments[3:5], arguments[9:]
            numbers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in rest]
            self.calls.append((grid, stream, function, numbers))

        return run


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setattr(launching, "_compiled", {})
    for kernel in (_kernel, sampler_step.sampler_step_kernel):
        fresh = type(kernel.device_caches)(kernel.create_binder)
        monkeypatch.setattr(kernel, "device_caches", fresh)
    sampler_step._plan.cache_clear()
    yield made
    sampler_step._plan.cache_clear()


@pytest.fixture
def binds(monkeypatch):
    """How often Triton binds arguments."""
    counted = SimpleNamespace(number=0)
    run = JITFunction.run

    def counting(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        counted.number += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counting)
    return counted


def tensor(dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    memory = torch.zeros(64, dtype=dtype)
    begin = -memory.data_ptr() % 16 // memory.element_size()
    return memory[begin + offset :][:32]


def same(driver: Driver, *args: Any, factor: int = 2, **options: Any) -> None:
    """A launch is what Triton's own is."""
    launching.launch(_kernel, (3, 2), *args, FACTOR=factor, **options)
    _kernel[(3, 2)](*args, FACTOR=factor, **options)
    assert driver.calls[-2] == driver.calls[-1]


def test_what_is_launched_again_is_not_bound_again(driver, binds):
    x, y = tensor(), tensor()
    for other in (tensor(), y):
        launching.launch(_kernel, (1,), x, other, 2.0, 16, 5, FACTOR=2, num_warps=1)
    assert binds.number == 1
    assert driver.calls[0][3][:2] == [x.data_ptr(), driver.calls[0][3][1]]
    assert driver.calls[1] == ((1, 1, 1), 7, driver.calls[0][2], [
        x.data_ptr(), y.data_ptr(), 2.0, 16, 5, 2,
    ])  # fmt: skip


def test_another_kind_is_bound(driver, binds):
    x, y = tensor(), tensor()
    first = (x, y, 2.0, 7, 5)
    kinds = [
        (tensor(torch.bfloat16), y, 2.0, 7, 5),
        (tensor(offset=1), y, 2.0, 7, 5),
        (x, tensor(offset=1), 2.0, 7, 5),
        (x, None, 2.0, 7, 5),
        (x, y, 2.0, 1, 5),
        (x, y, 2.0, 32, 5),
        (x, y, 2.0, 1 << 33, 5),
        (x, y, 2.0, (1 << 33) + 1, 5),
        (x, y, 2.0, 7, 1 << 31),
    ]
    for args in (first, *kinds):
        launching.launch(_kernel, (1,), *args, FACTOR=2)
    assert binds.number == len({call[2] for call in driver.calls}) == 1 + len(kinds)
    # Values that no code depends on.
    for args in ((x, y, 3.0, 9, 16), (x, y, 1.0, -3, 1), (x, y, 2.0, 7, -(1 << 31))):
        launching.launch(_kernel, (1,), *args, FACTOR=2)
        assert driver.calls[-1][2] is driver.calls[0][2]
    assert binds.number == 1 + len(kinds)


def test_other_constants_devices_and_streams(driver, binds):
    args = tensor(), tensor(), 2.0, 16, 5
    for constants in ({"FACTOR": 2}, {"FACTOR": 3}, {"FACTOR": 2, "num_warps": 1}):
        launching.launch(_kernel, (1,), *args, **constants)
    driver.device = 1
    launching.launch(_kernel, (1,), *args, FACTOR=2)
    assert binds.number == 4
    assert len({call[2] for call in driver.calls}) == 4
    driver.device, driver.stream = 0, 8
    launching.launch(_kernel, (5, 4, 3), *args, FACTOR=2)
    assert driver.calls[-1][:3] == ((5, 4, 3), 8, driver.calls[0][2])
    assert binds.number == 4


def test_hooks_are_called(driver, binds):
    args = tensor(), tensor(), 2.0, 16, 5
    seen = []
    for _ in range(2):
        launching.launch(_kernel, (1,), *args, FACTOR=2)
    assert binds.number == 1
    _kernel.add_pre_run_hook(lambda *given, **_: seen.append(given))
    try:
        launching.launch(_kernel, (1,), *args, FACTOR=2)
    finally:
        _kernel.pre_run_hooks.clear()
    assert len(seen) == 1
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        launching.launch(_kernel, (1,), *args, FACTOR=2)
    finally:
        hook.remove(print)
    assert binds.number == 3
    launching.launch(_kernel, (1,), *args, FACTOR=2)
    assert binds.number == 3


def test_compiling_only_is_not_remembered(driver, monkeypatch):
    args = tensor(), tensor(), 2.0, 16, 5
    with offline.compiling(offline.TARGETS["sm_90"]) as compiled:
        for _ in range(2):
            launching.launch(_kernel, (1,), *args, FACTOR=2)
    assert len(compiled) == 2
    assert not launching._compiled


def test_compile_time_arguments_come_last(driver):
    @triton.jit
    def other(FACTOR: tl.constexpr, x_ptr):
        tl.store(x_ptr, FACTOR)

    with pytest.raises(ValueError, match="must have its compile-time arguments last"):
        launching.launch(other, (1,), tensor(), FACTOR=2)


NUMBERS = st.sampled_from([1, 2, 15, 16, 64, -16, 0, (1 << 31) - 1, 1 << 31, -(1 << 31) - 1])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 4]), NUMBERS, NUMBERS, st.booleans()), max_size=5))
def test_launches_are_tritons(driver, calls):
    for offset, size, free, absent in calls * 2:
        y = None if absent else tensor(torch.bfloat16, offset)
        same(driver, tensor(offset=offset), y, 0.5, size, free, num_warps=1)


def repeated(*numbers: int, factor: int = 2) -> launching.Repeated:
    return launching.Repeated(_kernel, (3, 2), numbers, {"FACTOR": factor, "num_warps": 1})


def test_repeated_launches_are_tritons(driver, binds):
    again = repeated(16, 5)
    kinds = [(0, 0), (0, 0), (1, 0), (0, 0), (0, 1), (4, 4), (0, 0)]
    for offset, other in kinds:
        x, y = tensor(offset=offset), tensor(offset=other)
        again(x, torch.nn.Parameter(y, requires_grad=False), 0.5 + offset)
        _kernel[(3, 2)](x, y, 0.5 + offset, 16, 5, FACTOR=2, num_warps=1)
        assert driver.calls[-2] == driver.calls[-1]
    # Two memories that begin elsewhere, and what Triton was asked for in this test.
    assert binds.number == len(kinds) + 3


def test_repeated_launches_ask_for_the_stream_and_hooks(driver, binds):
    again, x = repeated(16, 5), tensor()
    for stream in (7, 8, 9):
        driver.stream = stream
        again(x, None, 2.0)
        assert driver.calls[-1][1] == stream
    assert binds.number == 1
    seen = []
    _kernel.add_pre_run_hook(lambda *given, **_: seen.append(given))
    try:
        again(x, None, 2.0)
    finally:
        _kernel.pre_run_hooks.clear()
    assert len(seen) == 1
    again(x, None, 2.0)
    assert binds.number == 2


def test_repeated_launches_on_another_driver(driver, monkeypatch):
    again, x = repeated(16, 5), tensor()
    again(x, None, 2.0)
    again(x, None, 2.0)
    other = Driver()
    other.device = 1
    monkeypatch.setattr(triton.runtime.driver, "_active", other)
    again(x, None, 2.0)
    assert len(driver.calls) == 2
    assert len(other.calls) == 1


def test_constants_are_told_apart_by_name(driver, binds):
    args = tensor(), tensor(), 2.0, 16, 5
    for options in ({"num_warps": 2}, {"num_stages": 2}):
        same(driver, *args, **options)
    assert len({call[2] for call in driver.calls}) == 2


def test_a_samplers_steps_are_bound_once(driver, binds):
    """A loop's steps: other rows, other memory of the model's outputs."""
    table = torch.ones(4, Layout(2).columns, dtype=torch.float64)
    history, step = torch.ones(2, 3, 64), torch.zeros((), dtype=torch.int64)
    kept = []
    for _ in range(4):
        x, output = tensor()[:32].expand(3, 32).contiguous(), torch.ones(3, 32)
        kept.append((x, output))
        sampler_step.sampler_step(
            x, output, None, 1.0, None, table, step, None, None, None, None, x, history, None, None
        )
    assert binds.number == 1
    assert len(driver.calls) == 4


def strided(t: torch.Tensor) -> torch.Tensor:
    """Equal, of samples with a gap between them."""
    return torch.cat([t, t], 1)[:, : t.shape[1]]


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("apart", ["", "x", "model_output", "history", "model_input"])
def test_a_samplers_launch_says_where_samples_are(driver, slots, batch, apart):
    """Strides are those of what is launched on, whether numbers lie together or not."""
    table = torch.ones(4, Layout(slots).columns, dtype=torch.float64)
    step = torch.zeros((), dtype=torch.int64)
    x, output, doubled = (torch.ones(n, 64) for n in (batch, batch, 2 * batch))
    history = torch.ones(slots, batch, 64)
    if apart == "history":
        history = torch.ones(slots, 2 * batch, 64)[:, ::2]
    x = strided(x) if apart == "x" else x
    output = strided(output) if apart == "model_output" else output
    doubled = strided(doubled) if apart == "model_input" else doubled
    for _ in range(2):
        sampler_step.sampler_step(
            x, output, None, 1.0, None, table, step, None, None, None, None, x, history, None,
            doubled,
        )  # fmt: skip
    names = sampler_step.sampler_step_kernel.arg_names
    for call in driver.calls:
        got = dict(zip(names, call[3], strict=True))
        assert got["x_ptr"] == got["out_ptr"] == x.data_ptr()
        assert got["h_ptr"] == (history.data_ptr() if slots else None)
        assert got["i_ptr"] == doubled.data_ptr()
        # Of a single sample any.
        many = batch > 1
        for name, t in (("x", x), ("m", output), ("o", x)):
            assert got[f"stride_{name}"] == (t.stride(0) if many else 0)
        assert got["stride_i"] == doubled.stride(0)
        assert got["stride_hs"] == (history.stride(0) if slots else 0)
        assert got["stride_hb"] == (history.stride(1) if slots and many else 0)
        assert got["COPIES"] == 2
    assert len(driver.calls) == 2


def test_every_step_of_a_loop_is_the_same_launch(driver, binds):
    table = torch.ones(4, Layout(0).columns, dtype=torch.float64)
    rows = row_numbers(4, torch.device("cpu"))
    assert [int(row) for row in rows] == [0, 1, 2, 3]
    x = tensor().view(1, 32)
    for row in rows:
        sampler_step.sampler_step(
            x, x, None, 1.0, None, table, row, None, None, None, None, x, None, None, None
        )
    assert binds.number == 1
