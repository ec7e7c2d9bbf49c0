"""The table of tiles that were found best, and what is taken where it has nothing."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from mmfast import backends

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("Triton interprets in this process", allow_module_level=True)
import triton
import triton.language as tl

from mmfast.kernels import nearest_code, offline, tuned
from mmfast.kernels.tuned import Entry, Problem, Tuned

SCREEN, PROBLEMS = nearest_code.tuning
CONSTANTS = {"PADDED_D": 64, "STEP_D": 64}
KEY = "PADDED_D 64"
SECOND = {
    "BLOCK_N": 64, "BLOCK_K": 64, "TMA": True, "AHEAD": True, "STAGES": 3, "num_warps": 4,
    "num_stages": 3,
}  # fmt: skip


@triton.jit
def helper(x):
    return x + 1


FACTOR = tl.constexpr(3)


@triton.jit
def some_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), helper(x) * FACTOR)


class Recorded:
    """A kernel that is not launched."""

    __name__ = "recorded"

    def __init__(self) -> None:
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options))


def fresh() -> Tuned:
    """The lookup's, that has chosen nothing yet."""
    return Tuned(SCREEN.kernel, SCREEN.configs, SCREEN.key, SCREEN.fitting)


def table_of(choices, kind: str = "sm_90", source: str | None = None) -> tuned.Table:
    source = tuned.source_of(SCREEN.kernel) if source is None else source
    return {SCREEN.name: {kind: Entry("some GPU", "3", source, choices)}}


@pytest.fixture
def table(monkeypatch):
    """Sets what the table holds."""

    def hold(content: tuned.Table) -> None:
        monkeypatch.setattr(tuned, "_table", lambda: content)

    return hold


def chosen(target: str, constants=CONSTANTS) -> dict[str, int]:
    with offline.compiling(offline.TARGETS[target]):
        return tuned.numbers(fresh().choose(constants))


@pytest.mark.parametrize("target", offline.TARGETS)
def test_without_an_entry_the_first_that_fits(target, table):
    table({})
    with offline.compiling(offline.TARGETS[target]):
        first = SCREEN.candidates(CONSTANTS)[0]
    assert chosen(target) == tuned.numbers(first)


def test_the_tables_choice(table):
    table(table_of({KEY: SECOND}))
    assert chosen("sm_90") == SECOND
    # Of another kind of device, or another width, it says nothing.
    for target, constants in (("sm_80", CONSTANTS), ("sm_90", {"PADDED_D": 128, "STEP_D": 128})):
        table({})
        plain = chosen(target, constants)
        table(table_of({KEY: SECOND}))
        assert chosen(target, constants) == plain


@pytest.mark.parametrize(
    "content",
    [
        table_of({KEY: SECOND}, source="of another time"),
        table_of({KEY: {**SECOND, "BLOCK_N": 16}}),  # no longer among those to choose from
    ],
    ids=["stale", "unknown"],
)
def test_entries_that_are_passed_over(content, table):
    table({})
    plain = chosen("sm_90")
    table(content)
    assert chosen("sm_90") == plain


def test_a_launch_takes_the_choice(table, monkeypatch):
    monkeypatch.setattr(tuned, "device_kind", lambda: "sm_90")
    kernel = Recorded()
    configs = [triton.Config({"BLOCK": size}, num_warps=4, num_stages=2) for size in (64, 128)]
    launched = Tuned(kernel, configs, ["D"], lambda configs, **constants: configs)
    table({})
    launched[(3,)]("x", D=5)
    with launched.forcing(configs[1]):
        launched[(3,)]("x", D=5)
    launched[(3,)]("x", D=5)
    options = [options for _, _, options in kernel.launches]
    assert [o["BLOCK"] for o in options] == [64, 128, 64]
    assert kernel.launches[0][:2] == ((3,), ("x",))
    assert options[0] == {"D": 5, "BLOCK": 64} | configs[0].all_kwargs()


def test_the_source_is_that_of_all_that_is_called(monkeypatch):
    before = tuned.source_of(some_kernel)
    assert tuned.source_of(some_kernel) == before
    module = some_kernel.fn.__globals__
    with monkeypatch.context() as patch:
        patch.setitem(module, "FACTOR", tl.constexpr(4))
        assert tuned.source_of(some_kernel) != before
    with monkeypatch.context() as patch:
        patch.setattr(helper, "_src", helper.src + "# another\n")
        assert tuned.source_of(some_kernel) != before
    assert tuned.source_of(some_kernel) == before
    assert tuned.source_of(SCREEN.kernel) != tuned.source_of(nearest_code.nearest_code_pack_kernel)


def searched(content, again: bool = False, widths=(64, 128)):
    """Tables as they come, with the sizes that were timed; the third candidate is the fastest."""
    kernel, timed = fresh(), []

    def seconds(call) -> float:
        timed.append((call(), tuned.numbers(kernel.forced)))
        return abs(sum(width == timed[-1][0] for width, _ in timed) - 3)

    problems = [
        Problem({"PADDED_D": width, "STEP_D": width}, lambda width=width: width) for width in widths
    ]
    with offline.compiling(offline.TARGETS["sm_90"]):
        found = list(tuned.search(content, kernel, "sm_90", problems, seconds, again))
        candidates = [tuned.numbers(c) for c in kernel.candidates(CONSTANTS)]
    assert kernel.forced is None
    return [dict(t[SCREEN.name]["sm_90"].choices) for t in found], timed, candidates


def test_search(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    found, timed, candidates = searched({})
    assert [(c["TMA"], c["AHEAD"]) for c in candidates] == (
        [(True, True)] * 3 + [(True, False)] * 5 + [(False, False)] * 4
    )
    assert [width for width, _ in timed] == [64] * 12 + [128] * 10  # two of them would spill
    assert [c for width, c in timed if width == 64] == candidates
    assert found[-1][KEY] == candidates[2]
    assert len(found) == 2  # kept one after the other


def test_a_search_goes_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    held = table_of({KEY: SECOND})
    found, timed, _ = searched(held)
    assert {width for width, _ in timed} == {128}
    assert found[-1][KEY] == SECOND
    found, timed, candidates = searched(held, again=True)
    assert {width for width, _ in timed} == {64, 128}
    assert found[-1][KEY] == candidates[2]
    # Of another source nothing is kept.
    found, _, candidates = searched(table_of({KEY: SECOND, "PADDED_D 16": SECOND}, source="old"))
    assert found[-1].keys() == {KEY, "PADDED_D 128"}


def test_other_devices_stay(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    held = table_of({KEY: SECOND}, kind="sm_80")
    held["another_kernel"] = {"sm_90": Entry("some GPU", "3", "source", {})}
    with offline.compiling(offline.TARGETS["sm_90"]):
        problem = Problem(CONSTANTS, lambda: None)
        (found,) = tuned.search(held, fresh(), "sm_90", [problem], lambda call: 1.0)
    assert found["another_kernel"] == held["another_kernel"]
    assert found[SCREEN.name].keys() == {"sm_80", "sm_90"}


def test_what_does_not_work_is_passed_over(monkeypatch):
    """In a search: the fastest is wrong, the next cannot be launched."""
    kernel = fresh()
    with offline.compiling(offline.TARGETS["sm_90"]):
        candidates = kernel.candidates(CONSTANTS)

        def call() -> int:
            number = candidates.index(kernel.forced)
            if number == 1:
                raise RuntimeError("out of something")
            return number

        def seconds(call) -> float:
            return float(call())

        right = Problem(CONSTANTS, call, lambda number: number != 0)
        with pytest.warns(UserWarning, match="passed over: (its result|out of)") as given:
            assert tuned.fastest(kernel, right, seconds) == tuned.numbers(candidates[2])
        assert len(given) == 2
        nothing = Problem(CONSTANTS, call, lambda number: False)
        warned = pytest.warns(UserWarning, match="passed over")
        with warned, pytest.raises(RuntimeError, match="none of its"):
            tuned.fastest(kernel, nothing, seconds)


def test_facts_decide_too(table, monkeypatch):
    monkeypatch.setattr(tuned, "device_kind", lambda: "sm_90")
    kernel = Recorded()
    configs = [triton.Config({"BLOCK": size}, num_warps=4, num_stages=2) for size in (64, 128)]
    launched = Tuned(
        kernel, configs, ["D"], lambda configs, LONG, **constants: configs if LONG else configs[1:]
    )
    table({})
    for long in (True, False):
        seen = launched.seen_in(lambda long=long: launched[(3,)]("x", D=5, facts={"LONG": long}))
        assert seen == {"D": 5, "LONG": long}
    assert [options["BLOCK"] for _, _, options in kernel.launches] == [64, 128]
    assert all("LONG" not in options for _, _, options in kernel.launches)


def test_problems_cover_every_width():
    with offline.compiling(offline.TARGETS["sm_90"]):
        made = PROBLEMS(torch.device("meta"))
        assert [p.constants["PADDED_D"] for p in made] == [16, 32, 64, 128, 256, 512]
        for width in (1, 8, 17, 72, 200, 256, 300, 512):
            assert set(nearest_code._padded(width)) == {"PADDED_D", "STEP_D"}
            assert nearest_code._padded(width)["PADDED_D"] >= width


def test_tables_survive_the_disk(tmp_path):
    held, path = table_of({KEY: SECOND}), tmp_path / "tuned.json"
    tuned.save(held, path)
    assert tuned.load(path) == held
    tuned.save(tuned.load(), path)
    assert path.read_text() == tuned.FILE.read_text()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"sm_90": {"device": ""}}}'])
def test_foreign_tables_are_refused(content, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="does not hold tuned sizes"):
        tuned.load(path)


def test_what_is_committed_was_measured_and_can_be_chosen():
    from mmfast.kernels import scaled_dot_product_attention as attention

    kernels = {kernel.name: kernel for kernel, _ in (nearest_code.tuning, *attention.tuning)}
    for name, kinds in tuned.load().items():
        names = [set(tuned.numbers(config)) for config in kernels[name].configs]
        for entry in kinds.values():
            assert entry.device
            for key, choice in entry.choices.items():
                assert all(f"{of} " in key for of in kernels[name].key)
                assert name != SCREEN.name or choice in map(tuned.numbers, SCREEN.configs)
                assert name == SCREEN.name or any(of <= set(choice) for of in names)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "tuned.json"
    held = table_of({KEY: SECOND})
    held[SCREEN.name]["sm_80"] = dataclasses.replace(held[SCREEN.name]["sm_90"], source="old")
    tuned.save(held, path)
    assert tuned.main(["--table", str(path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("sm_80, measured on some GPU, of another source: passed over")
    assert told[2].endswith("sm_90, measured on some GPU")
    path.write_text(json.dumps({}))
    assert tuned.main(["--table", str(path)]) == 0
    assert "nothing was measured yet" in capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tuned.main(["--write", "--table", str(path)])
        assert "--write needs a GPU" in capsys.readouterr().err


@pytest.fixture
def path(monkeypatch, tmp_path):
    """An empty table of what is tuned, for a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(tuned, "device_kind", lambda: "sm_90")
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    return path


def test_kernels_take_turns(monkeypatch, path):
    """Whoever cuts a search off has the first problem of each."""
    from mmfast.kernels import scaled_dot_product_attention as attention

    def kernel(name: str, count: int):
        made = SimpleNamespace(name=name, kernel=SCREEN.kernel, key_of=str)
        return made, lambda device: iter([Problem({name: i}, print) for i in range(count)])

    seen = []

    def fastest(kernel, problem, seconds):
        seen.append(kernel.key_of(problem.constants))
        return {"BLOCK_N": len(seen)}

    monkeypatch.setattr(nearest_code, "tuning", kernel("a", 3))
    monkeypatch.setattr(attention, "tuning", [kernel("b", 1), kernel("c", 2)])
    monkeypatch.setattr(tuned, "fastest", fastest)
    turns = ["{'a': 0}", "{'b': 0}", "{'c': 0}", "{'a': 1}", "{'c': 1}", "{'a': 2}"]
    monkeypatch.setattr(tuned, "_seconds", len)
    for words, times in ((["--write"], 1), (["--write"], 1), (["--write", "--again"], 2)):
        assert tuned.main([*words, "--table", str(path)]) == 0
        assert seen == turns * times
        held = {name: list(kinds["sm_90"].choices) for name, kinds in tuned.load(path).items()}
        assert held == {"a": turns[:1] + turns[3::2], "b": turns[1:2], "c": turns[2::2]}


def test_one_kernel_that_never_works_keeps_no_others(monkeypatch, path, capsys):
    from mmfast.kernels import scaled_dot_product_attention as attention

    def kernel(name: str):
        made = SimpleNamespace(name=name, kernel=SCREEN.kernel, key_of=str)
        return made, lambda device: iter([Problem({name: 0}, print)])

    def fastest(kernel, problem, seconds):
        if kernel.name == "a":
            raise RuntimeError("none of its configurations works here")
        return {"BLOCK_N": 1}

    monkeypatch.setattr(nearest_code, "tuning", kernel("a"))
    monkeypatch.setattr(attention, "tuning", [kernel("b"), kernel("c")])
    monkeypatch.setattr(tuned, "fastest", fastest)
    assert tuned.main(["--write", "--only", "a|b", "--table", str(path)]) == 0
    assert "none of its configurations works" in capsys.readouterr().out
    assert tuned.load(path).keys() == {"b"}


def test_all_that_is_tried_is_compiled_in_shares(monkeypatch):
    """Whoever times it finds it in Triton's cache, and nothing is launched meanwhile."""
    from mmfast.kernels import scaled_dot_product_attention as attention

    asked = []

    def run(kernel, *args, warmup, grid, **options):
        asked.append((kernel.__name__, warmup, options["BLOCK_M"], options["num_warps"]))

    def problems(device):
        for length in (64, 256):
            made = torch.zeros(4, 1, 2, length, 64, dtype=torch.bfloat16)
            yield attention._problem(attention.forward, False, made)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    driver = offline._Driver(offline.TARGETS["sm_90"])
    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        wanted = [c for p in problems(None) for c in attention.forward.candidates(p.constants)]
        asked.clear()
        tuning = [(attention.forward, problems)]
        counts = [tuned.compile_share(tuning, None, i, 3) for i in range(3)]
    assert sum(counts) == len(wanted) == len(asked) > 6
    assert max(counts) - min(counts) <= 1
    assert sorted(asked) == sorted(
        ("attention_forward_kernel", True, c.kwargs["BLOCK_M"], c.num_warps) for c in wanted
    )
