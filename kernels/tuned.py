"""Sizes of tiles that were found best on a device: ``tuned.json``, committed beside the kernels.

A launch takes the configuration that the table has for its kind of device and its key, else the
first that fits: nothing is searched for in a call. ``python -m mmfast.kernels.tuned --write``, on a
GPU, times every configuration that fits, and keeps the best. An entry is of the kernel as it was
then; one of another source is passed over.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from mmfast.files import replacing
from mmfast.kernels.common import device_kind, interpreting

FILE = Path(__file__).with_name("tuned.json")
_LAUNCH = ("num_warps", "num_stages")


@dataclass
class Entry:
    """What was found for a kernel on a kind of device.

    Attributes:
        device: by name, where it was measured.
        triton: the version.
        source: hash of the kernel's.
        choices: configurations by key.
    """

    device: str
    triton: str
    source: str
    choices: dict[str, dict[str, int]] = field(default_factory=dict)


Table = dict[str, dict[str, Entry]]  # by kernel and kind of device


def load(path: Path = FILE) -> Table:
    """Read the file.

    Raises:
        ValueError: it is none of ours.
    """
    try:
        content = json.loads(path.read_text())
        return {
            kernel: {kind: Entry(**entry) for kind, entry in kinds.items()}
            for kernel, kinds in content.items()
        }
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not hold tuned sizes: {error!r}") from error


def save(table: Table, path: Path = FILE) -> None:
    """Write the file, whole or not at all."""
    content = {
        kernel: {kind: asdict(entry) for kind, entry in sorted(kinds.items())}
        for kernel, kinds in sorted(table.items())
    }
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")


def source_of(kernel: JITFunction) -> str:
    """Hash of its source, of the functions it calls, and of the constants that they take."""
    seen: dict[str, str] = {}

    def look(function: JITFunction) -> None:
        seen[function.__name__] = function.src
        for name in sorted(function.fn.__code__.co_names):
            found = function.fn.__globals__.get(name)
            if isinstance(found, JITFunction) and found.__name__ not in seen:
                look(found)
            elif isinstance(found, tl.constexpr):
                seen[name] = repr(found.value)

    look(kernel)
    text = "\0".join(part for item in sorted(seen.items()) for part in item)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Tuned:
    """A kernel whose configuration the table chooses; it is launched like any other.

    Args:
        configs: those to choose from, by default the first that fits.
        key: names of compile-time arguments, and of facts, on which the choice depends.
        fitting: those of ``configs`` that fit the device for given arguments.
    """

    def __init__(
        self,
        kernel: Any,
        configs: Sequence[triton.Config],
        key: Sequence[str],
        fitting: Callable[..., list[triton.Config]],
    ) -> None:
        self.kernel, self.configs, self.key, self.fitting = kernel, configs, key, fitting
        self.forced: triton.Config | None = None
        self._chosen: dict[tuple[str, tuple[tuple[str, Any], ...]], triton.Config] = {}

    @property
    def name(self) -> str:
        """The kernel's, by which the table knows it."""
        return str(self.kernel.__name__)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.run, grid=grid)

    def run(
        self, *args: Any, grid: Any, facts: Mapping[str, Any] | None = None, **constants: Any
    ) -> Any:
        """Launch it. Arguments that depend on the configuration are functions of all constants;
        ``facts`` are not the kernel's, but what the choice depends on as well."""
        config = self.forced or self.choose({**constants, **(facts or {})})
        return self.launch(config, args, grid, constants)

    def launch(
        self, config: triton.Config, args: Sequence[Any], grid: Any, constants: Mapping[str, Any]
    ) -> Any:
        """With this configuration."""
        known = {**constants, **config.kwargs}
        made = (a(known) if callable(a) else a for a in args)
        return self.kernel[grid](*made, **constants, **config.all_kwargs())

    def key_of(self, constants: Mapping[str, Any]) -> str:
        """What the table calls a problem."""
        return ", ".join(f"{name} {constants[name]}" for name in self.key)

    def candidates(self, constants: Mapping[str, Any]) -> list[triton.Config]:
        """What fits the device."""
        if interpreting():
            return list(self.configs)
        return self.fitting(list(self.configs), **constants)

    def choose(self, constants: Mapping[str, Any]) -> triton.Config:
        """By the table, else the first that fits."""
        kind = "interpreter" if interpreting() else device_kind()
        key = kind, tuple(constants.items())
        if key not in self._chosen:
            fitting = self.candidates(constants)
            known = self.known(kind, self.key_of(constants))
            self._chosen[key] = next((c for c in fitting if numbers(c) == known), fitting[0])
        return self._chosen[key]

    def known(self, kind: str, key: str) -> dict[str, int] | None:
        """What the table has, if it is of this source."""
        entry = _table().get(self.name, {}).get(kind)
        if entry is None or entry.source != source_of(self.kernel):
            return None
        return entry.choices.get(key)

    def seen_in(self, call: Callable[[], Any]) -> dict[str, Any]:
        """Constants and facts of the last launch in a call."""
        seen: dict[str, Any] = {}

        def remember(constants: Mapping[str, Any]) -> triton.Config:
            seen.update(constants)
            return type(self).choose(self, constants)

        with mock.patch.object(self, "choose", remember):
            call()
        return seen

    @contextmanager
    def forcing(self, config: triton.Config | None) -> Iterator[None]:
        """Launches inside the block take this one; None: what :meth:`choose` says."""
        before, self.forced = self.forced, config
        try:
            yield
        finally:
            self.forced = before


def numbers(config: triton.Config) -> dict[str, int]:
    """As the table keeps it."""
    return {**config.kwargs, **{name: getattr(config, name) for name in _LAUNCH}}


@functools.cache
def _table() -> Table:
    return load()


@dataclass(frozen=True)
class Problem:
    """A call of which the kernel is a large part.

    Attributes:
        constants: that it launches the kernel with, and facts.
        call: of which the time is taken.
        right: whether it returned what it should; None where all configurations return the same.
    """

    constants: Mapping[str, Any]
    call: Callable[[], Any]
    right: Callable[[Any], bool] | None = None


def fastest(
    kernel: Tuned, problem: Problem, seconds: Callable[[Callable[[], Any]], float]
) -> dict[str, int]:
    """The configuration that fits and takes the least ``seconds`` of the problem's call.

    One that cannot be launched, or whose result is wrong, is passed over with a warning.

    Raises:
        RuntimeError: there is no other.
    """
    times: list[tuple[float, triton.Config]] = []
    for config in kernel.candidates(problem.constants):
        with kernel.forcing(config):
            try:
                if problem.right is not None and not problem.right(problem.call()):
                    raise ArithmeticError("its result is wrong")
                times.append((seconds(problem.call), config))
            except (ArithmeticError, RuntimeError, triton.TritonError) as error:
                what = f"{kernel.name}, {kernel.key_of(problem.constants)}: {numbers(config)}"
                warnings.warn(f"{what} is passed over: {error}", stacklevel=2)
    if not times:
        raise RuntimeError(f"{kernel.name}: none of its configurations works here")
    _, best = min(times, key=lambda pair: pair[0])
    return numbers(best)


def search(
    table: Table,
    kernel: Tuned,
    kind: str,
    problems: Iterable[Problem],
    seconds: Callable[[Callable[[], Any]], float],
    again: bool = False,
) -> Iterator[Table]:
    """``table`` with one choice more at a time, or with all of them new if ``again``."""
    source = source_of(kernel.kernel)
    old = table.get(kernel.name, {}).get(kind)
    name = torch.cuda.get_device_name()
    entry = Entry(name, triton.__version__, source)
    if old is not None and old.source == source and not again:
        entry.choices = dict(old.choices)
    for problem in problems:
        key = kernel.key_of(problem.constants)
        if key not in entry.choices:
            entry.choices[key] = fastest(kernel, problem, seconds)
            yield {**table, kernel.name: {**table.get(kernel.name, {}), kind: entry}}


def lines(table: Table, kernels: Sequence[Tuned]) -> list[str]:
    """What the table holds, and what of it is passed over."""
    found = []
    by_name = {kernel.name: kernel for kernel in kernels}
    for name, kinds in sorted(table.items()):
        for kind, entry in sorted(kinds.items()):
            fresh = name in by_name and entry.source == source_of(by_name[name].kernel)
            how = "" if fresh else ", of another source: passed over"
            found.append(f"{name}, {kind}, measured on {entry.device}{how}")
            found += [f"  {key}: {choice}" for key, choice in sorted(entry.choices.items())]
    return found or ["nothing was measured yet: the first configuration that fits is taken"]


def compile_share(
    tuning: Iterable[tuple[Tuned, Callable[..., Iterable[Problem]]]],
    device: torch.device,
    number: int,
    of: int,
) -> int:
    """Compile every ``of``-th of all that would be tried, from ``number`` on, into Triton's cache.
    Nothing is launched, so that results are arbitrary; returns how many were compiled."""
    run, launch = JITFunction.run, Tuned.launch
    taken: list[triton.Config] = []

    def compile_only(self: JITFunction, *args: Any, **options: Any) -> Any:
        return run(self, *args, **(options | {"warmup": True})) if taken else None

    def launch_only(
        self: Tuned, config: triton.Config, args: Any, grid: Any, constants: Any
    ) -> None:
        if config is not self.forced:
            return
        taken.append(config)
        try:
            launch(self, config, args, grid, constants)
        except (RuntimeError, triton.TritonError) as error:
            print(f"{self.name}, {numbers(config)}: {error}".splitlines()[0], flush=True)
        finally:
            taken.pop()

    count = compiled = 0
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Tuned, "launch", launch_only),
    ):
        for turn in _in_turns(tuning, device):
            for kernel, problem in turn:
                for config in kernel.candidates(problem.constants):
                    if count % of == number:
                        with kernel.forcing(config):
                            problem.call()
                        compiled += 1
                    count += 1
    return compiled


def _in_turns(
    tuning: Iterable[tuple[Tuned, Callable[..., Iterable[Problem]]]], device: torch.device
) -> Iterator[list[tuple[Tuned, Problem]]]:
    """The first problem of each kernel, the second, and so on."""
    made = [(kernel, iter(problems(device))) for kernel, problems in tuning]
    for turn in itertools.zip_longest(*(left for _, left in made)):
        yield [(k, p) for (k, _), p in zip(made, turn, strict=True) if p is not None]


def _compile_all(words: Sequence[str], processes: int) -> None:
    """In so many processes, each with its share."""
    command = [sys.executable, "-m", "mmfast.kernels.tuned", *words, "--share"]
    shares = [f"{i}/{processes}" for i in range(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, share], env=environment) for share in shares]
    for process in started:
        process.wait()


def _seconds(call: Callable[[], Any]) -> float:
    """Median of a call on the device. Configurations differ by more than what longer would tell."""
    taken: float = triton.testing.do_bench(call, warmup=5, rep=40, return_mode="median")
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the table, or search on the GPU that is here and write it."""
    from mmfast.kernels import nearest_code, scaled_dot_product_attention

    parser = argparse.ArgumentParser(prog="python -m mmfast.kernels.tuned", description=__doc__)
    parser.add_argument("--write", action="store_true", help="search on this GPU, and keep it")
    parser.add_argument("--again", action="store_true", help="also for what the table has")
    parser.add_argument("--table", type=Path, default=FILE, help="default: %(default)s")
    parser.add_argument("--only", metavar="REGEX", default="", help="kernels, by their names")
    parser.add_argument(
        "--processes", type=int, default=1, help="in which all is compiled before it is timed"
    )
    parser.add_argument("--share", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    table = load(given.table)
    tuning = [nearest_code.tuning, *scaled_dot_product_attention.tuning]
    tuning = [
        (kernel, problems) for kernel, problems in tuning if re.search(given.only, kernel.name)
    ]
    if not tuning:
        parser.error(f"--only {given.only!r} matches no kernel")
    device = torch.device("cuda")
    if given.share:
        number, of = map(int, given.share.split("/"))
        print(f"{compile_share(tuning, device, number, of)} configurations compiled", flush=True)
        return 0
    if given.write:
        if not torch.cuda.is_available():
            parser.error("--write needs a GPU, and there is none")
        if given.processes > 1:
            _compile_all(["--only", given.only], given.processes)
        kind = device_kind()
        # In turns: whoever cuts this off has something of every kernel, what matters most first.
        for i, turn in enumerate(_in_turns(tuning, device)):
            for kernel, problem in turn:
                print(f"{kernel.name}, {kernel.key_of(problem.constants)}", flush=True)
                try:
                    # What is measured anew is so from its first on.
                    anew = given.again and i == 0
                    for found in search(table, kernel, kind, (problem,), _seconds, anew):
                        save(found, given.table)
                        table = found
                except RuntimeError as error:
                    print(f"  {error}".splitlines()[0], flush=True)
    print(*lines(table, [kernel for kernel, _ in tuning]), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
