"""How the benchmarks take times, and the memory of a call."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch

from benchmarks import cases, contest, memory, peers, rotation, schedulers, subjects, timing
from benchmarks.modules import Step
from benchmarks.spent import FIRST, ROUNDS, Spent

CPU = torch.device("cpu")


def test_contenders_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.interleave(calls, CPU, seconds=0)
    assert set(times) == {"a", "b"}
    for taken in times.values():
        assert taken.rounds >= 3
        assert 0 < taken.low <= taken.median <= taken.high
    turns = [a for a, b in zip(order, [*order[1:], ""], strict=True) if a != b]
    assert len(turns) >= 4


def test_a_slow_contender_is_timed_once_unless_it_is_close():
    effort = contest.Effort(0.0, slow=0.1)

    def once(kind: str, seconds: float, **more) -> bool:
        peer = peers.Peer(lambda: lambda: None, **more)
        entry = contest.Entry(subjects.Subject("", kind, peer), lambda: None, 1, "", 0, seconds)
        return entry.once(effort, fastest=0.2)

    assert once("peer", 2.0)
    assert not once("peer", 0.3)
    assert not once("peer", 0.9)  # of one call of less than a second much can be new pages
    assert once("floor", 0.9)
    assert not once("mmfast", 2.0)
    assert once("peer", 0.3, aside=True)


def test_steady_contenders_need_few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_cpu_sample", lambda *_: 0.1)
    times = timing.interleave({"a": lambda: None}, CPU, 60.0, known={"a": 0.1})
    assert times["a"].rounds == 3


def test_contenders_that_are_not_steady_have_their_time(monkeypatch):
    samples = itertools.cycle((0.01, 0.05))
    monkeypatch.setattr(timing, "_cpu_sample", lambda *_: next(samples))
    known = {"a": 0.1}
    assert timing.interleave({"a": lambda: None}, CPU, 60.0, known)["a"].rounds > 3
    assert timing.interleave({"a": lambda: None}, CPU, 0.0, known)["a"].rounds == 3


def test_overhead_is_timed_in_loops_of_its_own():
    order = []
    step = Step(lambda: order.append("reset"), lambda: order.append("a"))
    times = timing.overhead({"a": step, "b": lambda: order.append("b")}, CPU)
    runs = [(name, len(list(group))) for name, group in itertools.groupby(order)]
    assert max(n for name, n in runs if name == "a") > timing._BLOCK_CALLS
    assert max(n for name, n in runs if name == "a") <= schedulers._SPARE
    assert times["a"].rounds == times["b"].rounds == timing._TURNS * timing._BLOCKS


def test_a_short_call_is_timed_after_one_of_its_own():
    """Whether it is repeated within a sample or not."""
    order = []

    def short(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    calls = {"a": short("a", timing._SAMPLE), "b": short("b", timing._SAMPLE / 4)}
    timing.interleave(calls, CPU, seconds=0)
    runs = [len(list(group)) for _, group in itertools.groupby(order)]
    assert min(runs[2:]) >= 2


def test_a_steps_reset_is_not_timed():
    order = []
    step = Step(lambda: order.append("reset"), lambda: order.append("step"))
    timing.interleave({"a": step}, CPU, seconds=0)
    assert order[:2] == ["reset", "step"]
    assert "step" in order[-2:]
    before = len(order)
    taken, _ = timing.once(Step(lambda: time.sleep(0.05), lambda: None), CPU)
    assert taken < 0.05
    assert len(order) == before


def test_time_spent_is_told():
    spent = Spent()
    for part in (FIRST, ROUNDS, ROUNDS):
        with spent.on("op/case", part, "someone"):
            pass
    by_op, slowest = spent.tables()
    assert by_op.sections[0][1][0][0] == "op"
    assert [r[:2] for r in slowest.sections[0][1]] != []
    assert len(spent.seconds) == 2
    assert spent.total == sum(spent.seconds.values())


def test_threads_are_limited():
    before = torch.get_num_threads()
    with timing.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_memory_of_a_call():
    size = 64 << 20
    result, seconds, taken = memory.watch(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert len(result) == size
    assert seconds > 0
    if taken is None:
        pytest.skip("this system does not tell")
    assert 0.9 * size < taken < 1.5 * size


def test_copies_are_more_than_the_caches_hold(monkeypatch):
    monkeypatch.setattr(rotation, "last_cache", lambda: 1 << 20)
    x = torch.zeros(1 << 16)  # a quarter of it

    found = rotation.copies((x, x[1:], [x], None, 3))

    assert found[0][0] is x
    assert len(found) == 9
    whole, part, (again,), *_ = found[1]
    assert whole is again
    assert part.data_ptr() == whole.data_ptr() + 4
    assert len({copied[0].data_ptr() for copied in found}) == 9
    assert rotation.last_cache() > 0


def test_calls_in_turns_keep_their_results():
    made = [torch.zeros(1), torch.ones(1)]
    call = rotation.in_turns([made[0].clone, made[1].clone])

    first, second, third = call(), call(), call()

    assert [float(r) for r in (first, second, third)] == [1, 0, 1]
    assert len({r.data_ptr() for r in (first, second, third)}) == 3
    assert rotation.in_turns([call]) is call


def test_steps_in_turns_are_reset_together():
    states = [5, 5]

    def step(i):
        states[i] += 1
        return states[i]

    turns = rotation.in_turns(
        [Step(lambda i=i: states.__setitem__(i, 0), lambda i=i: step(i)) for i in range(2)]
    )

    assert isinstance(turns, Step)
    turns.reset()
    assert [turns.step() for _ in range(4)] == [1, 1, 2, 2]


def test_contenders_bound_by_memory_change_their_arguments(monkeypatch):
    monkeypatch.setattr(rotation, "last_cache", lambda: 1 << 10)
    case = next(c for c in cases.all_cases() if c.op == "add_noise" and c.quick)
    given = case.make(CPU)
    subject = next(s for s in subjects.subjects(case.op) if s.name == "plain torch")
    seen = []
    peer = dataclasses.replace(
        subject.peer, make=lambda *a: lambda: (seen.append(a[0].data_ptr()), a[0])[1]
    )
    turns = [given, case.make(CPU)]

    entry = contest.enter(
        case,
        dataclasses.replace(subject, peer=peer, kind="floor"),
        given,
        None,
        CPU,
        contest.Effort(0.0),
        turns[1:],
    )
    seen.clear()
    for _ in range(4):
        entry.call()

    assert len(set(seen)) == 2
    assert seen[:2] == seen[2:]
