"""Tables of the results, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table
from rich.text import Text

from benchmarks import gpu_goals
from benchmarks.goals import fastest, goals
from benchmarks.results import Curve, Results, Row, letters_of


@dataclass
class Table:
    """Sections of rows of strings; all columns but the first are numbers."""

    title: str
    columns: Sequence[str]
    sections: list[tuple[str, list[list[str]]]] = field(default_factory=list)

    def add(self, heading: str, row: list[str]) -> None:
        """A row at the end, in a section of its own if the last one has another heading."""
        if not self.sections or self.sections[-1][0] != heading:
            self.sections.append((heading, []))
        self.sections[-1][1].append(row)

    def rich(self) -> rich.table.Table:
        """For the terminal."""
        table = rich.table.Table(title=self.title, title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for heading, rows in self.sections:
            if heading:
                table.add_row(Text(heading, style="bold"))
            for row in rows:
                own = row[0].startswith("mmfast")
                table.add_row(*(Text(cell) for cell in row), style="green" if own else "")
            table.add_section()
        return table

    def markdown(self) -> str:
        """For a file."""
        lines = [f"## {self.title}", ""]
        for heading, rows in self.sections:
            if heading:
                lines += [f"### {heading}", ""]
            lines += [
                "| " + " | ".join(self.columns) + " |",
                "|---|" + "---:|" * (len(self.columns) - 1),
                *("| " + " | ".join(row) + " |" for row in rows),
                "",
            ]
        return "\n".join(lines)


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return "-"
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1e3 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def size(count: int | None) -> str:
    """Bytes as MiB."""
    if count is None:
        return "-"
    return f"{count / 2**20:.1f} MiB" if count < 100 << 20 else f"{count / 2**20:.0f} MiB"


def peak(results: Results, threads: int) -> float | None:
    """GFLOP/s of the fastest exact-enough products here: of bfloat16, or as fast of float32."""
    rates = results.ceilings.get(threads, {})
    kinds = ("bfloat16 matrix instructions", "bfloat16 dot instructions", "bfloat16", "float32")
    return max((rates.get(f"{kind} GFLOP/s", 0.0) for kind in kinds), default=0.0) or None


def all_tables(results: Results) -> list[Table]:
    """A table per op, the curves left out, and that of the goals."""
    tables = []
    for op in dict.fromkeys(r.op for r in results.rows):
        rows = [r for r in results.rows if r.op == op and r.sweep is None and r.kind != "level"]
        if rows:
            tables.append(_op_table(op, rows, results))
    tables += _parts_tables([r for r in results.rows if r.parts])
    levels = [r for r in results.rows if r.kind == "level"]
    if levels:
        tables.append(_level_table(levels))
    if results.curves:
        tables.append(_training_table(results.curves))
    reached = (goals if results.facts["device_type"] == "cpu" else gpu_goals.goals)(results)
    if reached:
        table = Table("Goals", ("goal", "threads", "wanted", "reached", "met"))
        rows_ = [[g.what, str(g.threads), g.wanted, g.reached, _tick(g.met)] for g in reached]
        table.sections.append(("", rows_))
        tables.append(table)
    return tables


def _tick(yes: bool) -> str:
    return "✓" if yes else "✗"


def _faster(own: Row | None, other: Row | None) -> str:
    """How mmfast compares with another."""
    if own is None or other is None or not own.seconds or not other.seconds:
        return "-"
    ratio = other.seconds / own.seconds
    return f"{ratio:.3g}x faster" if ratio >= 1 else f"{1 / ratio:.3g}x slower"


def _op_table(op: str, rows: list[Row], results: Results) -> Table:
    counts = sorted({r.threads for r in rows})
    most = counts[-1]
    columns = ["", *_thread_columns(results, counts), "spread", "mmfast is"]
    columns += ["GFLOP/s", "of peak", "GB/s", "memory", "Match"]
    letters = letters_of(op)
    table = Table(f"{op} ({letters})" if letters else op, columns)
    for case in dict.fromkeys(r.case for r in rows):
        here = [r for r in rows if r.case == case]
        section = []
        own = fastest([r for r in here if r.threads == most], "mmfast")
        for subject in dict.fromkeys(r.subject for r in here):
            by_threads = {r.threads: r for r in here if r.subject == subject}
            if by_threads[most].seconds is None and by_threads[most].kind == "compile":
                absent = ["-"] * (len(columns) - 2)
                section.append([subject, *absent, by_threads[most].note])
            elif by_threads[most].seconds is not None:
                section.append(_line(by_threads, counts, own, results))
        if section:
            table.sections.append((f"{here[0].title}, {here[0].data}", section))
    return table


def _thread_columns(results: Results, counts: list[int]) -> list[str]:
    if results.facts["device_type"] != "cpu":
        return ["time", "as a graph"]
    return [f"{n} thread{'s' if n > 1 else ''}" for n in counts]


def _line(
    by_threads: dict[int, Row], counts: list[int], own: Row | None, results: Results
) -> list[str]:
    row, limit = by_threads[counts[-1]], peak(results, counts[-1])
    assert row.seconds is not None
    spread = (row.high or 0.0) - (row.low or 0.0)
    scaled = "~" if row.measured < row.shape["N"] else ""
    times = [scaled + duration(by_threads[n].seconds) if n in by_threads else "-" for n in counts]
    if results.facts["device_type"] != "cpu":
        times.append(duration(row.graph))
    ratio = "-" if row.kind == "mmfast" else _faster(own, row)
    return [
        row.subject,
        *times,
        f"±{50 * spread / row.seconds:.0f} %",
        ratio,
        f"{row.gflops:.4g}" if row.gflops else "-",
        f"{100 * row.gflops / limit:.0f} %" if row.gflops and limit else "-",
        f"{row.gbps:.3g}" if row.gbps else "-",
        size(row.memory),
        "-" if row.match is None else row.match or "✓",
    ]


def _parts_tables(rows: list[Row]) -> list[Table]:
    """Where the time of training steps goes, a table for each op."""
    tables = []
    for op in dict.fromkeys(r.op for r in rows):
        here = [r for r in rows if r.op == op]
        names = list(dict.fromkeys(name for r in here for name in r.parts or ()))
        table = Table(f"Where the time of {op} goes", ("", *names, "all", "memory"))
        for row in here:
            cells = [duration((row.parts or {}).get(name)) for name in names]
            cells += [duration(sum((row.parts or {}).values())), size(row.memory)]
            threads = f"{row.threads} thread{'s' * (row.threads > 1)}"
            table.add(f"{row.title}, {row.data}, {threads}", [row.subject, *cells])
        tables.append(table)
    return tables


def _training_table(curves: list[Curve]) -> Table:
    columns = ("", "time", "reconstruction error", "codes used", "perplexity", "indices")
    table = Table(f"{len(curves[0].digests)} steps of a VQ-VAE on photographs", columns)
    first = curves[0]
    for curve in curves:
        same, steps = curve.agrees(first), len(curve.digests)
        verdict = f"identical in all {steps} steps" if same == steps else f"differ at step {same}"
        table.add(
            "",
            [
                curve.subject,
                duration(curve.seconds),
                f"{curve.error[-1]:.4g}",
                str(curve.used[-1]),
                f"{curve.perplexity[-1]:.1f}",
                "-" if curve is first else verdict,
            ],
        )
    return table


def _level_table(rows: list[Row]) -> Table:
    table = Table(
        "nearest_code, with mmfast and faiss held to lower instruction sets (N x K x D)",
        ("instruction set", "mmfast", "faiss flat", "mmfast is", "Match"),
    )
    for case in dict.fromkeys(r.case.partition("@")[0] for r in rows):
        here = [r for r in rows if r.case.partition("@")[0] == case]
        section = []
        for level in dict.fromkeys(r.note for r in here):
            same = {r.subject: r for r in here if r.note == level}
            own, other = same.get("mmfast (cpp)"), same.get("faiss flat")
            if own is None or own.seconds is None:
                continue
            section.append(
                [
                    level,
                    duration(own.seconds),
                    duration(other.seconds if other else None),
                    _faster(own, other),
                    own.match or "✓",
                ]
            )
        table.sections.append((f"{here[0].title}, {here[0].data}", section))
    return table
