"""A plot of what is bound by memory: shares of a copy's bandwidth, of mmfast and of others."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks import gpu_goals
from benchmarks.results import Results

_MARKS = {"plain torch": ("o", "#7f7f7f"), "torch.compile": ("s", "#e377c2")}
_OWN = ("D", "#2ca02c")


def streams(results: Results) -> Any:
    """A line for each case; None where none was measured, or no copy."""
    copy = gpu_goals.copied(results)
    rows = [
        r
        for r in results.rows
        if r.op.removesuffix("_bwd") in gpu_goals.STREAMS
        and "tiny" not in r.case
        and r.gbps
        and r.seconds
        and (r.kind == "mmfast" or r.subject in _MARKS)
    ]
    if not rows or not copy:
        return None
    cases = list(dict.fromkeys((r.op, r.case) for r in rows))
    figure = Figure(figsize=(9.0, 1.2 + 0.22 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        mark, colour = _MARKS.get(row.subject, _OWN)
        rate = (row.gbps or 0.0) * (row.seconds or 0.0) / gpu_goals.device_seconds(row)
        place = len(cases) - 1 - cases.index((row.op, row.case))
        name = "mmfast" if row.kind == "mmfast" else row.subject
        axes.plot(100 * rate / copy, place, mark, color=colour, markersize=5, label=name)
    axes.axvline(100 * gpu_goals.OF_COPY, color="#444444", linewidth=0.8, linestyle="--")
    axes.set_yticks(
        range(len(cases)),
        [f"{op}, {case.replace('_', ' ')}" for op, case in reversed(cases)],
        fontsize=7,
    )
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the copy's bandwidth, of the bytes that have to be moved")
    axes.set_title(results.facts["device"])
    axes.grid(axis="x", alpha=0.3)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(named.values(), named.keys(), fontsize=7)
    return figure
