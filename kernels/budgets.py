"""What compiled kernels may need, and must use: ``budgets.json``, committed beside the kernels.

Held to it are registers, spills, shared memory, matrix instructions and loads of 128 bits of the
variants that it names, of all that ``python -m mmfast.kernels.offline`` compiles: at least those of
the test suite, and attention at every head size. Where a kernel has several configurations, the
worst counts: most of what is needed, least of what is used. The numbers are those of one version of
Triton, which the file names.

``python -m mmfast.kernels.budgets`` prints them as tables for documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
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
    wide: int = 1 << 30  # loads of 128 bits or more, and copies of whole tiles

    @classmethod
    def of(cls, compiled: Compiled) -> Needs:
        """What came of one configuration."""
        widths = [w for widths in compiled.loads.values() for w in widths.elements()]
        return cls(
            compiled.registers or 0,
            compiled.spills or 0,
            compiled.shared,
            sum(compiled.matrix_instructions.values()),
            sum(bits >= 128 for bits in widths) + compiled.copies,
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
        variants: by name.
        choices: hashes of what the table of tuned sizes could choose from when the numbers were
            taken, by variant and target, where it could.
    """

    triton: str = triton.__version__
    variants: dict[str, Table] = field(default_factory=dict)
    choices: dict[str, dict[str, str]] = field(default_factory=dict)

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
            return cls(content["triton"], variants, content["choices"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} does not hold budgets: {error!r}") from error

    def save(self, path: Path = FILE) -> None:
        """Write the file, a line for each kernel."""
        lines = []
        for name, rows in sorted(self.variants.items()):
            inner = (f'"{kernel}": {_line(table)}' for kernel, table in sorted(rows.items()))
            lines.append(f"{json.dumps(name)}: {{\n    " + ",\n    ".join(inner) + "}")
        chosen = [f"{json.dumps(n)}: {json.dumps(c)}" for n, c in sorted(self.choices.items())]
        columns = json.dumps([f.name for f in fields(Needs)])
        text = (
            f'{{"triton": "{self.triton}",\n "columns": {columns},\n'
            ' "choices": {\n   ' + ",\n   ".join(chosen) + "},\n"
            ' "variants": {\n   ' + ",\n   ".join(lines) + "}}\n"
        )
        with replacing(path) as file:
            file.write_text(text)

    @property
    def applies(self) -> bool:
        """Whether the numbers are of the Triton that is here."""
        return self.triton == triton.__version__

    def exceeded(self, variant: Variant, compiled: Iterable[Compiled]) -> list[str]:
        """What is beyond its budget, or has none, of all configurations of a variant; nothing of
        one that the file does not name."""
        rows = self.variants.get(variant.name)
        if rows is None:
            return []
        found = []
        for (kernel, target), needs in _worst(compiled).items():
            budget = rows.get(kernel, {}).get(target)
            if budget is None:
                found.append(f"{kernel}, {target}: no budget")
            else:
                found += [f"{kernel}, {target}: {what}" for what in needs.beyond(budget)]
        return found

    def refresh(self, variant: Variant, compiled: Iterable[Compiled]) -> None:
        """Take over what was compiled."""
        if not self.applies:
            self.triton, self.variants, self.choices = triton.__version__, {}, {}
        for (kernel, target), needs in _worst(compiled).items():
            self.variants.setdefault(variant.name, {}).setdefault(kernel, {})[target] = needs

    def chosen_from(self, variant: Variant, choices: Mapping[str, str]) -> None:
        """Keep, by target, what :func:`mmfast.kernels.offline.choices` says."""
        known = {**self.choices.get(variant.name, {}), **choices}
        if any(known.values()):
            self.choices[variant.name] = known
        else:
            self.choices.pop(variant.name, None)


def _worst(compiled: Iterable[Compiled]) -> dict[tuple[str, str], Needs]:
    found: dict[tuple[str, str], Needs] = {}
    for one in compiled:
        key = one.way(), one.target.name
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
    """A row for each kernel of the test suite's variants and of attention's, a column for each
    target."""
    from mmfast.kernels import offline

    shown = {v.name for v in offline.variants() if v.quick or "attention" in v.name}
    variants = {name: rows for name, rows in budgets.variants.items() if name in shown}
    tables = variants.values()
    targets = list(dict.fromkeys(t for table in tables for row in table.values() for t in row))
    lines = [
        "| variant | kernel | " + " | ".join(targets) + " |",
        "|---|---|" + "---|" * len(targets),
    ]
    for name, rows in sorted(variants.items(), key=lambda item: _in_order(item[0])):
        for kernel, row in rows.items():
            cells = (_cell(row[t]) if t in row else "" for t in targets)
            lines.append(f"| {name} | {kernel.replace('_kernel', '')} | {' | '.join(cells)} |")
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
