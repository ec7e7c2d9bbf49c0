"""Compile the Triton kernels for GPUs that are not here: ``python -m mmfast.kernels.offline``.

A kernel file declares in ``offline_variants()`` what is worth compiling. A variant is launched as
always, on CPU tensors, under a driver that knows a target and has no device: Triton specialises
and compiles as it would there, for every configuration that tuning would try, and the launch
itself is left out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from mmfast.kernels.tuned import Tuned, numbers


@dataclass(frozen=True)
class Target:
    """A kind of GPU."""

    name: str
    gpu: GPUTarget
    shared_limit: int  # bytes for one block
    multiprocessors: int


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, 108),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, 132),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, 148),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 304),
    )
}


@dataclass(frozen=True)
class Variant:
    """A launch worth compiling."""

    name: str
    # Launches on CPU tensors that it makes, with about so many rows and so many codes.
    launch: Callable[[int, int], Any]
    # Kernels that must use matrix instructions.
    matrix: frozenset[str] = frozenset()
    # Kernels, and source text of loads of which the widest must be of 128 bits.
    wide: tuple[tuple[str, str], ...] = ()
    # Part of the test suite, not only of the whole matrix.
    quick: bool = False


_WAYS = ("TMA", "AHEAD", "SPECIAL", "ORDERED")  # compile-time arguments of the attention kernels


@dataclass(frozen=True)
class Compiled:
    """What came of one kernel with one configuration."""

    kernel: str
    target: Target
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    shared: int  # bytes
    registers: int | None  # None: no cuobjdump to tell
    spills: int | None  # bytes of local memory per thread
    matrix_instructions: dict[str, int]
    # Widths in bits of the loads from global memory, by file's name and line.
    loads: dict[tuple[str, int], collections.Counter[int]]
    copies: int  # of whole tiles, by descriptors
    specialisation: str = field(repr=False)  # equal for launches that share the code
    assembly: str = field(repr=False)
    binary: bytes = field(repr=False)

    def loads_of(self, text: str) -> set[int]:
        """Widths of the loads in the lines with ``text``."""
        return {
            bits
            for (name, line), widths in self.loads.items()
            if text in _line(name, line)
            for bits in widths
        }

    def way(self) -> str:
        """The kernel, and by which of its ways for Hopper, if it has several."""
        return ", ".join([self.kernel, *(n for n in _WAYS if self.constants.get(n) is True)])

    def configuration(self) -> str:
        """The constants and the size of the launch, in words."""
        constants = ", ".join(f"{k} {v}" for k, v in self.constants.items())
        return f"{constants}; {self.num_warps} warps, {self.num_stages} stages"


@functools.cache
def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _line(name: str, number: int) -> str:
    """A line of a kernel file; empty for other files. Triton's cache may know another folder."""
    path = Path(__file__).parent / name
    return _lines(path)[number - 1] if number and path.is_file() else ""


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.utils = SimpleNamespace(get_device_properties=self._properties)

    def _properties(self, device: Any) -> dict[str, int]:
        return {
            "max_shared_mem": self._target.shared_limit,
            "multiprocessor_count": self._target.multiprocessors,
            "warpSize": self._target.gpu.warp_size,
        }

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_current_device(self) -> str:
        return f"offline {self._target.name}"

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def compiling(target: Target) -> Iterator[list[CompiledKernel]]:
    """Triton launches inside the block compile for ``target`` and end up in the list."""
    compiled: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> CompiledKernel:
        kernel = run(self, *args, **(kwargs | {"warmup": True}))
        compiled.append(kernel)
        return kernel

    def every_configuration(
        self: Tuned, *args: Any, grid: Any, facts: Any = None, **constants: Any
    ) -> None:
        for config in self.candidates({**constants, **(facts or {})}):
            self.launch(config, args, grid, constants)

    driver = triton.runtime.driver
    with (
        mock.patch.object(driver, "_active", _Driver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Tuned, "run", every_configuration),
    ):
        yield compiled


def cuobjdump() -> Path | None:
    """NVIDIA's tool beside Triton that tells the resources of a binary."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return path if path.exists() else None


def _nvidia_resources(binary: bytes) -> tuple[int | None, int | None]:
    tool = cuobjdump()
    if tool is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    # Scalar registers are kept in lanes of vector registers, not in memory.
    spilled = 4 * value("vgpr_spill_count")
    return value("vgpr_count"), max(spilled, value("private_segment_fixed_size"))


_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma\w+)")
_FILES = re.compile(r'\.file\s+(\d+)\s.*?([^"/]+)"$', re.MULTILINE)
_LOADS = re.compile(
    r"\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)"
    r"|\bld\.global[\w.:]*?(?:\.v(?P<count>\d))?\.[busf](?P<bits>\d+)\s"
    r"|\bcp\.async\.c[ag]\.shared\.global[^,\n]*,[^,\n]*,\s*(?P<bytes>\w+)"
    r"|\b(?:global|buffer)_load_(?P<name>\w+)"
)
_AMD_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def _loads(assembly: str) -> dict[tuple[str, int], collections.Counter[int]]:
    names = dict(_FILES.findall(assembly))
    place = ("", 0)
    loads: dict[tuple[str, int], collections.Counter[int]]
    loads = collections.defaultdict(collections.Counter)
    for found in _LOADS.finditer(assembly):
        if found["line"]:
            place = (names[found["file"]], int(found["line"]))
        elif found["bits"]:
            loads[place][int(found["count"] or 1) * int(found["bits"])] += 1
        elif found["bytes"]:
            loads[place][8 * int(found["bytes"], 0)] += 1
        else:
            name = found["name"]
            loads[place][_AMD_BITS.get(name, 8 if "byte" in name else 16)] += 1
    return dict(loads)


def _describe(kernel: CompiledKernel, target: Target) -> Compiled:
    nvidia = target.gpu.backend == "cuda"
    assembly = kernel.asm["ptx" if nvidia else "amdgcn"]
    binary = kernel.asm["cubin" if nvidia else "hsaco"]
    registers, spills = _nvidia_resources(binary) if nvidia else _amd_resources(assembly)
    source = kernel.src
    return Compiled(
        kernel=source.fn.__name__,
        target=target,
        constants={source.fn.arg_names[i]: v for (i,), v in source.constants.items()},
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        shared=kernel.metadata.shared,
        registers=registers,
        spills=spills,
        matrix_instructions=dict(collections.Counter(_MATRIX.findall(assembly))),
        loads=_loads(assembly),
        copies=assembly.count("cp.async.bulk.tensor"),
        specialisation=kernel.hash,
        assembly=assembly,
        binary=binary,
    )


def compile_variant(
    variant: Variant, target: Target, rows: int = 64, codes: int = 64
) -> list[Compiled]:
    """Every kernel that the variant launches, in every configuration that would be tried."""
    with compiling(target) as kernels:
        variant.launch(rows, codes)
    # The same code may be launched more than once.
    return [_describe(k, target) for k in {k.hash: k for k in kernels}.values()]


def specialisations(variant: Variant, target: Target, rows: int, codes: int) -> list[str]:
    """What tells the launched codes apart, without looking at them."""
    with compiling(target) as kernels:
        variant.launch(rows, codes)
    return [k.hash for k in kernels]


def choices(variant: Variant, target: Target) -> str:
    """What the table of tuned sizes may choose for the variant's kernels, as a hash; empty where
    there is no choice. Nothing is compiled."""
    found: list[str] = []

    def note(self: Tuned, *args: Any, grid: Any, facts: Any = None, **constants: Any) -> None:
        configs = self.candidates({**constants, **(facts or {})})
        found.extend(f"{self.name}: {numbers(c)}, {c.maxnreg}" for c in configs)

    choose = Tuned.choose

    def noted(self: Tuned, known: Any) -> triton.Config:
        found.extend(f"{self.name}: {numbers(c)}, {c.maxnreg}" for c in self.candidates(known))
        return choose(self, known)

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(target)),
        mock.patch.object(JITFunction, "run", return_value=None),
        mock.patch.object(Tuned, "run", note),
        mock.patch.object(Tuned, "choose", noted),
    ):
        variant.launch(64, 64)
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12] if found else ""


def complaints(variant: Variant, compiled: Compiled) -> list[str]:
    """What is wrong with it."""
    found = []
    if compiled.spills:
        found.append(f"{compiled.spills} bytes per thread are spilled")
    if compiled.shared > compiled.target.shared_limit:
        found.append(f"{compiled.shared} bytes of shared memory")
    if compiled.kernel in variant.matrix and not compiled.matrix_instructions:
        found.append("no matrix instructions")
    for kernel, text in variant.wide if not compiled.copies else ():
        if kernel == compiled.kernel and max(widths := compiled.loads_of(text), default=0) < 128:
            found.append(f"{text!r} loads {sorted(widths)} bits")
    return found


def modules() -> list[ModuleType]:
    """The kernel files that declare variants."""
    package = importlib.import_module(__package__ or "mmfast.kernels")
    loaded = [
        importlib.import_module(f"{package.__name__}.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
        if m.name != "offline"
    ]
    return [m for m in loaded if hasattr(m, "offline_variants")]


def variants(quick: bool = False) -> list[Variant]:
    """All variants, or those of the test suite."""
    declared = itertools.chain.from_iterable(m.offline_variants() for m in modules())
    return [v for v in declared if v.quick or not quick]


def _print_table(found: list[tuple[Variant, Compiled]]) -> None:
    table = Table("variant", "kernel", "target", "configuration")
    for name in ("registers", "spills", "shared", "matrix instructions"):
        table.add_column(name, justify="right")
    table.add_column("complaints")
    for variant, compiled in found:
        instructions = compiled.matrix_instructions
        table.add_row(
            variant.name,
            compiled.kernel,
            compiled.target.name,
            compiled.configuration(),
            "?" if compiled.registers is None else str(compiled.registers),
            "?" if compiled.spills is None else str(compiled.spills),
            str(compiled.shared),
            ", ".join(f"{count} {name}" for name, count in instructions.items()),
            "; ".join(complaints(variant, compiled)),
        )
    # Piped into a file there is no width to keep to.
    console = Console()
    Console(width=None if console.is_terminal else 250).print(table)


def _print_markdown(found: list[tuple[Variant, Compiled]]) -> None:
    """A row for each tile of a kernel, a column for each target."""
    targets = list(dict.fromkeys(compiled.target.name for _, compiled in found))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for variant, compiled in found:
        tile = " x ".join(str(v) for k, v in compiled.constants.items() if k.startswith("BLOCK"))
        cell = f"{compiled.registers}, {compiled.shared / 1024:.3g}"
        if compiled.spills:
            cell += f", {compiled.spills} spilled"
        row = rows.setdefault((variant.name, compiled.kernel, tile), {})
        row[compiled.target.name] = cell
    print("| " + " | ".join(["variant", "kernel", "tile", *targets]) + " |")
    print("|" + "---|" * (3 + len(targets)))
    for row_name, row in rows.items():
        print("| " + " | ".join([*row_name, *(row.get(t, "") for t in targets)]) + " |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print the table; status 1 if there are complaints, or budgets are exceeded."""
    from mmfast.kernels import budgets
    from mmfast.kernels.budgets import Budgets

    parser = argparse.ArgumentParser(
        prog="python -m mmfast.kernels.offline",
        description="Compile the Triton kernels for GPUs that are not here.",
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="only what the test suite compiles")
    parser.add_argument("-k", default="", metavar="TEXT", help="variants with TEXT in their name")
    parser.add_argument(
        "--kernel", default="", metavar="TEXT", help="report kernels with TEXT in their name"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="registers and KiB of shared memory, for documents"
    )
    parser.add_argument(
        "--write-budgets",
        action="store_true",
        help=f"take over what comes into {budgets.FILE.name}",
    )
    given = parser.parse_args(arguments)
    some = given.quick or given.k or given.kernel or given.target
    limits = Budgets() if given.write_budgets and not some else Budgets.load()
    found: list[tuple[Variant, Compiled]] = []
    wrong = []
    for variant in (v for v in variants(given.quick) if given.k in v.name):
        # Without the code, of which there is much.
        compiled = [
            dataclasses.replace(c, assembly="", binary=b"")
            for name in given.target or TARGETS
            for c in compile_variant(variant, TARGETS[name])
            if given.kernel in c.kernel
        ]
        found += ((variant, c) for c in compiled)
        if given.write_budgets:
            limits.refresh(variant, compiled)
            if not given.kernel:
                limits.chosen_from(
                    variant, {n: choices(variant, TARGETS[n]) for n in given.target or TARGETS}
                )
            limits.save()
        wrong += [f"{variant.name}: {what}" for what in limits.exceeded(variant, compiled)]
    (_print_markdown if given.markdown else _print_table)(found)
    if not limits.applies:
        wrong = []
        print(f"The budgets are those of Triton {limits.triton}: not compared.", file=sys.stderr)
    print(*wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong) or any(complaints(variant, compiled) for variant, compiled in found))


if __name__ == "__main__":
    raise SystemExit(main())
