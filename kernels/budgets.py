"""What compiled kernels may need, and must use: ``budgets.json``, committed beside the kernels.

Held to it are registers, spills, shared memory, matrix instructions and loads of 128 bits of all
that ``python -m mmfast.kernels.offline`` compiles. Variants that multiply matrices, and those of
the test suite, have budgets of their own, others that of their kernel. Where a kernel has several
configurations, the worst counts: most of what is needed, least of what is used. The numbers are
those of one version of Triton, which the file names.

``python -m mmfast.kernels.budgets`` prints them as tables for documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton

from mmfast.files import replacing

if TYPE_CHECKING:
    from mmfast.kernels.offline import Compiled, Variant

FILE = Path(__file__).with_name("budgets.json")


@dataclass(frozen=True)
class Needs:
    """Of one kernel on one target. The last two are what it must use at least."""

    registers: int = 0  # per thread
    spilled: int = 0  # bytes per thread
    shared: int = 0  # bytes per program
    matrix: int = 1 << 30  # instructions
    wide: int = 1 << 30  # loads of 128 bits or more

    @classmethod
    def of(cls, compiled: Compiled) -> Needs:
        """What came of one configuration."""
        widths = [w for widths in compiled.loads.values() for w in widths.elements()]
        return cls(
            compiled.registers or 0,
            compiled.spills or 0,
            compiled.shared,
            sum(compiled.matrix_instructions.values()),
            sum(bits >= 128 for bits in widths),
        )

    def worst(self, other: Needs) -> Needs:
        """Of two configurations or variants."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Needs(*(max(p) if i < 3 else min(p) for i, p in enumerate(pairs)))

    def beyond(self, budget: Needs) -> Iterator[str]:
        """What exceeds the budget, or falls short of it."""
        words = (
            "registers",
            "bytes spilled",
            "bytes of shared memory",
            "matrix instructions",
            "loads of 128 bits or more",
        )
        for i, (word, got, limit) in enumerate(
            zip(words, astuple(self), astuple(budget), strict=True)
        ):
            if got > limit if i < 3 else got < limit:
                yield f"{got} {word}, the budget is {limit}"


Table = dict[str, dict[str, Needs]]  # by kernel and target


@dataclass
class Budgets:
    """The file's content.

    Attributes:
        triton: the version that the numbers are of.
        kernels: of any variant.
        variants: of those that have their own, by name.
    """

    triton: str = triton.__version__
    kernels: Table = field(default_factory=dict)
    variants: dict[str, Table] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = FILE) -> Budgets:
        """Read the file.

        Raises:
            ValueError: it is none of ours.
        """
        try:
            content = json.loads(path.read_text())
            if content["columns"] != [f.name for f in fields(Needs)]:
                raise ValueError(f"columns {content['columns']}")
            variants = {name: _table(rows) for name, rows in content["variants"].items()}
            return cls(content["triton"], _table(content["kernels"]), variants)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} does not hold budgets: {error!r}") from error

    def save(self, path: Path = FILE) -> None:
        """Write the file, a line for each kernel."""
        lines = [f'"{name}": {_line(table)}' for name, table in sorted(self.kernels.items())]
        own = []
        for name, rows in sorted(self.variants.items()):
            inner = (f'"{kernel}": {_line(table)}' for kernel, table in sorted(rows.items()))
            own.append(f"{json.dumps(name)}: {{\n    " + ",\n    ".join(inner) + "}")
        columns = json.dumps([f.name for f in fields(Needs)])
        text = (
            f'{{"triton": "{self.triton}",\n "columns": {columns},\n'
            ' "kernels": {\n   ' + ",\n   ".join(lines) + "},\n"
            ' "variants": {\n   ' + ",\n   ".join(own) + "}}\n"
        )
        with replacing(path) as file:
            file.write_text(text)

    @property
    def applies(self) -> bool:
        """Whether the numbers are of the Triton that is here."""
        return self.triton == triton.__version__

    def exceeded(self, variant: Variant, compiled: Iterable[Compiled]) -> list[str]:
        """What is beyond its budget, or has none, of all configurations of a variant."""
        rows = self.variants.get(variant.name, self.kernels)
        found = []
        for (kernel, target), needs in _worst(compiled).items():
            budget = rows.get(kernel, {}).get(target)
            if budget is None:
                found.append(f"{kernel}, {target}: no budget")
            else:
                found += [f"{kernel}, {target}: {what}" for what in needs.beyond(budget)]
        return found

    def refresh(self, variant: Variant, compiled: Sequence[Compiled]) -> None:
        """Take over what was compiled. Budgets of kernels, which not all their variants may have
        been compiled for, only become wider."""
        if not self.applies:
            self.triton, self.kernels, self.variants = triton.__version__, {}, {}
        for (kernel, target), needs in _worst(compiled).items():
            row = self.kernels.setdefault(kernel, {})
            row[target] = row.get(target, Needs()).worst(needs)
            if variant.quick or variant.matrix:
                own = self.variants.setdefault(variant.name, {})
                own.setdefault(kernel, {})[target] = needs


def _worst(compiled: Iterable[Compiled]) -> dict[tuple[str, str], Needs]:
    found: dict[tuple[str, str], Needs] = {}
    for one in compiled:
        key = one.kernel, one.target.name
        found[key] = found.get(key, Needs()).worst(Needs.of(one))
    return found


def _table(content: Mapping[str, Mapping[str, Any]]) -> Table:
    return {
        kernel: {target: Needs(*numbers) for target, numbers in row.items()}
        for kernel, row in content.items()
    }


def _line(row: Mapping[str, Needs]) -> str:
    return json.dumps({target: astuple(needs) for target, needs in row.items()})


def markdown(budgets: Budgets) -> str:
    """A row for each variant and kernel with budgets of their own, a column for each target."""
    targets = list(dict.fromkeys(t for row in budgets.kernels.values() for t in row))
    lines = [
        "| variant | kernel | " + " | ".join(targets) + " |",
        "|---|---|" + "---|" * len(targets),
    ]
    for name, rows in sorted(budgets.variants.items(), key=lambda item: _in_order(item[0])):
        for kernel, row in rows.items():
            cells = (_cell(row[t]) if t in row else "" for t in targets)
            lines.append(f"| {name} | {kernel.removesuffix('_kernel')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Numbers in a name by their size."""
    parts = re.split(r"(\d+)", name)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def _cell(needs: Needs) -> str:
    spilled = f", {needs.spilled} spilled" if needs.spilled else ""
    numbers = needs.registers, f"{needs.shared / 1024:.3g}", needs.matrix, needs.wide
    return ", ".join(map(str, numbers)) + spilled


if __name__ == "__main__":
    print(markdown(Budgets.load()))
